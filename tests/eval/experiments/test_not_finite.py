"""NaN and infinity are never measured: not from a damaged network, and not from damaged stored features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from ddil_core.support.errors import DdilError
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.storage import cached_arrays, read_features
from ddil_eval.metrics import Metric, Network
from ddil_eval.report.records import read_records
from ddil_eval.statistics import Estimate, FrechetReference, estimate_mean
from tests.pipelines import spoilt
from tests.pixels import add_metric

NAN, INF = float("nan"), float("inf")
Cli = Callable[..., Result]


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_damaged_system_has_no_row(
    cli: Cli, pixel_metrics: tuple[str, ...], student: Path, tmp_path: Path, component: str
) -> None:
    """Its images would be black, and black images can have the best Fréchet distance."""
    broken = spoilt(student, tmp_path / "broken", component)
    result = cli("eval", "systems", "--model", student, "--model", broken, "--data", "shapes", "--num-images", 8, "--metrics",
                 "fd_mosaic,brightness", "--set", "reference_images=16", "--device", "cpu", "--save-images",
                 "--out", tmp_path / "out")  # fmt: skip
    assert (result.exit_code, result.stdout) == (1, "")
    *_, last = result.stderr.splitlines()
    assert f"of the model '{broken}', computed in float32, are not finite" in last and last.startswith("error: ")
    assert read_records(tmp_path / "out") == []
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 8  # the sound one's


def test_a_student_that_is_damaged_takes_no_turns(
    cli: Cli, pixel_metrics: tuple[str, ...], teacher: Path, student: Path, tmp_path: Path
) -> None:
    broken = spoilt(student, tmp_path / "broken", "unet")
    result = cli("eval", "covariate-shift", "--teacher", teacher, "--student", broken, "--num-prompts", 4, "--set",
                 "metrics=[fd_mosaic]", "--set", "reference_images=8", "--set", "teacher_steps=8", "--device", "cpu",
                 "--out", tmp_path / "out")  # fmt: skip
    assert (result.exit_code, result.stdout) == (1, "")
    *_, last = result.stderr.splitlines()
    assert last.startswith(f"error: the latents of the student '{broken}', computed in float32, are not finite")
    assert "after transition 1 of 4, with steps at t = 999: its weights hold such numbers too" in last
    assert read_records(tmp_path / "out") == []


def metric(value: float, name: str = "broken", kind: Any = "mean") -> Metric:
    """Return a metric with a network that gives ``value`` for one image of each batch."""

    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        found = np.ones((1 if kind == "group" else len(images), 1), np.float32)
        found[-1] = value
        return found

    statistic = FrechetReference if kind == "set" else None
    return Metric(name, name, "lower", kind, Network(name, "nothing", lambda device: extract), statistic)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["mean", "set", "group"])
def test_features_that_are_not_finite_stop_the_work(monkeypatch: pytest.MonkeyPatch, value: float, kind: str) -> None:
    add_metric(monkeypatch, metric(value, kind=kind))
    extractors, images = Extractors(["broken"], "cpu"), np.zeros((3, 64, 64, 3), np.uint8)
    sentence = (
        "the network 'broken' of the metric broken gives features that are not finite (NaN or infinity, float32): its weights are "
        "damaged; get them again (see 'ddil metrics')"
    )

    class Data:
        reference, side = "x", None

        def images(self, count: int, batch_size: int = 64) -> list[np.ndarray]:
            return [images]

    calls: list[Callable[[], Any]] = [lambda: extractors(images, ["a"] * 3)]
    if kind == "group":
        calls = [lambda: extractors.groups(images[None], ["a"])]
    if kind == "set":
        calls.append(lambda: extractors.reference(Data(), 3))  # type: ignore[arg-type]
    for call in calls:
        with pytest.raises(DdilError) as error:
            call()
        assert str(error.value) == sentence


@pytest.mark.parametrize("value", [NAN, INF])
def test_stored_features_are_checked(tmp_path: Path, value: float) -> None:
    features = np.ones((9000, 2), np.float32)
    np.save(tmp_path / "sound.npy", features)
    assert len(read_features(tmp_path / "sound.npy", 9000, "features")) == 9000
    features[8999, 1] = value
    np.save(tmp_path / "broken.npy", features)
    with pytest.raises(
        DdilError, match=r"the stored features .*broken\.npy are damaged; delete the file to compute them again"
    ):
        read_features(tmp_path / "broken.npy", 9000, "features")


@pytest.mark.parametrize("value", [NAN, INF])
def test_stored_chunks_are_checked(tmp_path: Path, value: float) -> None:
    path = tmp_path / "chunk.npz"
    arrays = {"efflite0": np.array([[1.0, value]]), "string": np.array(["TTSS"]), "sample": np.array([3])}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(DdilError, match=r"the finished chunk .* is damaged; delete the file to make the chunk again"):
        cached_arrays(path, dict)
    np.savez(path, **(arrays | {"efflite0": np.ones((1, 2))}))  # type: ignore[arg-type]
    assert set(cached_arrays(path, dict)) == set(arrays)


def test_an_estimate_that_is_not_finite_is_refused() -> None:
    for told in (NAN, INF, -INF):
        with pytest.raises(DdilError, match="^a metric is .*, which is not finite and cannot be compared"):
            Estimate(told, told, told, n=4)
    with pytest.raises(DdilError, match="not finite"):
        estimate_mean(np.array([[1.0], [NAN], [2.0]]), np.ones(1))
