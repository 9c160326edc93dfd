"""Features beside sampling, on disk, and of references: the numbers of one thread and of memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from ddil_core.data.shapes import ShapesData
from ddil_core.support.errors import DdilError
from ddil_core.support.resources import user_folder
from ddil_eval.experiments.measurement import Cells
from ddil_eval.features.extraction import Extractors, map_ahead
from ddil_eval.features.recipes import Recipe, load_recipe
from ddil_eval.features.reference_features import content_sha256, references_folder
from ddil_eval.features.storage import cached_arrays, gather_features, read_features
from ddil_eval.metrics import Metric, Network, WeightsFile
from ddil_eval.statistics import FrechetReference
from tests.pixels import add_metric

# Beside sampling


def test_work_beside_gives_the_results_in_order() -> None:
    threads = set()

    def work(item: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.01 * (item % 3))
        return item * item

    assert list(map_ahead(range(20), work)) == [item * item for item in range(20)]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_work_overlaps_what_makes_the_items() -> None:
    """The work on each item ends only when the next one is being made."""
    begun = [threading.Event() for _ in range(9)]

    def items() -> Iterator[int]:
        for item in range(8):
            begun[item].set()
            yield item
        begun[8].set()

    assert list(map_ahead(items(), lambda item: begun[item + 1].wait(10))) == [True] * 8


def test_no_more_items_wait_than_asked() -> None:
    made, done = [], []

    def items() -> Iterator[int]:
        for item in range(12):
            made.append(item)
            assert len(made) - len(done) <= 4  # two waiting, one in work, one being made
            yield item

    list(map_ahead(items(), done.append, ahead=2))
    assert done == list(range(12))


def test_an_error_on_either_side_is_raised_and_ends_the_work() -> None:
    done = []

    def work(item: int) -> None:
        if item == 3:
            raise DdilError("the picture is broken")
        done.append(item)

    with pytest.raises(DdilError, match="the picture is broken"):
        list(map_ahead(range(100), work))
    assert done[:3] == [0, 1, 2] and len(done) < 10

    def items() -> Iterator[int]:
        yield 0
        raise DdilError("sampling failed")

    with pytest.raises(DdilError, match="sampling failed"):
        list(map_ahead(items(), done.append))


def test_extraction_beside_sampling_gives_the_same_numbers(pixel_metrics: tuple[str, ...]) -> None:
    extractors = Extractors(pixel_metrics, "cpu")
    pictures = list(ShapesData().images(40, 8))
    alone = [extractors(images, [""] * len(images)) for images in pictures]
    beside = list(map_ahead(pictures, lambda images: extractors(images, [""] * len(images))))
    for name in pixel_metrics:
        assert all(np.array_equal(a[name], b[name]) for a, b in zip(alone, beside, strict=True))


# On disk


def test_features_on_disk_are_those_of_memory(tmp_path: Path) -> None:
    parts = [{"a": np.random.default_rng(k).normal(size=(k + 1, 3)).astype(np.float32)} for k in range(5)]
    held = gather_features(iter(parts), 15, tmp_path)
    assert isinstance(held["a"], np.memmap) and held["a"].dtype == np.float32
    np.testing.assert_array_equal(held["a"], np.concatenate([part["a"] for part in parts]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npy", "a.npy.sha256"]


@pytest.mark.parametrize("kind", ["features", "chunk"])
def test_one_flipped_bit_of_stored_numbers_is_found(tmp_path: Path, kind: str) -> None:
    """A flip in the last bits of a number changes it, and every number stays finite."""
    values = np.random.default_rng(0).normal(size=(6, 3))
    path = tmp_path / ("a.npy" if kind == "features" else "a.npz")

    def read() -> np.ndarray:
        return read_features(path, 6, "features") if kind == "features" else cached_arrays(path, dict)["a"]

    if kind == "features":
        gather_features(iter([{"a": values}]), 6, tmp_path)
    else:
        cached_arrays(path, lambda: {"a": values})
    np.testing.assert_array_equal(read(), values)
    content = bytearray(path.read_bytes())
    content[content.index(values[3].tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(DdilError, match=r"does not match its checksum a.np.\.sha256.*delete (it|the file) to"):
        read()
    path.unlink()
    if kind == "chunk":
        np.testing.assert_array_equal(cached_arrays(path, lambda: {"a": values})["a"], values)
        np.testing.assert_array_equal(read(), values)


@pytest.mark.parametrize("asked", [4, 6])
def test_fewer_or_more_features_than_asked_leave_no_file(asked: int, tmp_path: Path) -> None:
    with pytest.raises(DdilError, match=f"the network a gave features of 5 images, and {asked} were expected"):
        gather_features(iter([{"a": np.zeros((5, 2))}]), asked, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_estimates_from_disk_are_those_from_memory(pixel_metrics: tuple[str, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = {"brightness": rng.normal(size=(240, 1)), "fd_mosaic": rng.normal(size=(240, 4))}
    reference = {"fd_mosaic": rng.normal(size=(100, 4))}
    rows = {"a": np.arange(120), "b": np.arange(120, 240), "mixed": rng.permutation(240)[:120]}
    on_disk = gather_features(
        ({n: v[k : k + 50] for n, v in features.items()} for k in range(0, 240, 50)), 240, tmp_path
    )
    memory, disk = (Cells(held, rows, reference) for held in (features, on_disk))
    assert memory.estimates(memory.single()) == disk.estimates(disk.single())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path: Path) -> None:
    """The scaled-down form of ``benchmarks/feature_memory.py``: 24,000 pictures' features against 2,000's."""
    reference = FrechetReference(np.random.default_rng(0).normal(size=(500, 64)))

    def measure(count: int) -> float:
        rng = np.random.default_rng(1)
        parts = ({"x": rng.normal(size=(200, 64)).astype(np.float32)} for _ in range(count // 200))
        features = gather_features(parts, count, tmp_path / str(count))["x"]
        reference.spread(features, np.arange(count) % 20)
        return psutil.Process().memory_info().rss / 2**20

    measure(2000)
    few = measure(2000)
    assert measure(24000) - few < 40


# References


class Counting:
    """A network that counts the pictures that it reads."""

    def __init__(self, folder: Path) -> None:
        self.read = 0
        self.file = folder / "weights.bin"
        self.file.write_bytes(b"first")
        weights = WeightsFile("weights.bin", place=lambda: self.file)
        network = Network("counting", "a file", lambda device: self.extract, (weights,))
        self.metric = Metric("counting", "counted", "lower", "set", network, FrechetReference)

    def extract(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        self.read += len(images)
        return images.mean(axis=(1, 2)).astype(np.float32)


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setenv("DDIL_CACHE", str(tmp_path / "cache"))
    found = Counting(tmp_path)
    add_metric(monkeypatch, found.metric)
    return found


class Pictures(ShapesData):
    """The shapes world's pictures, some of them changed."""

    brighter = 0

    def images(self, count: int, batch_size: int = 7) -> Iterator[np.ndarray]:
        for images in super().images(count, batch_size):
            yield np.clip(images.astype(np.int64) + self.brighter, 0, 255).astype(np.uint8)


def reference_of(counting: Counting, data: ShapesData, count: int = 20, recipe: Recipe | None = None) -> np.ndarray:
    counting.read = 0
    return Extractors(["counting"], "cpu", recipe).reference(data, count)["counting"]


def test_a_reference_is_computed_once_and_read_in_another_process_s_place(counting: Counting) -> None:
    first = reference_of(counting, Pictures())
    assert counting.read == 20 and first.shape == (20, 3)
    again = reference_of(counting, Pictures())
    assert counting.read == 0 and isinstance(again, np.memmap)
    np.testing.assert_array_equal(first, again)


def test_a_reference_is_kept_under_all_that_it_depends_on(counting: Counting) -> None:
    reference_of(counting, Pictures())
    changed = Pictures()
    changed.brighter = 1
    for other in ({"data": changed}, {"count": 19}, {"recipe": load_recipe("gigagan")}):
        arguments = {"data": Pictures()} | other
        reference_of(counting, **arguments)
        assert counting.read == arguments.get("count", 20), other
    counting.file.write_bytes(b"other weights")
    reference_of(counting, Pictures())
    assert counting.read == 20
    keys = [json.loads(path.read_text()) for path in references_folder().rglob("key.json")]
    assert len(keys) == 5
    assert len({key["recipe"] for key in keys}) == 2 and {key["count"] for key in keys} == {19, 20}


def test_the_content_is_that_of_the_pictures_in_any_batches(counting: Counting) -> None:
    whole, changed = content_sha256(ShapesData(), 20), Pictures()
    assert content_sha256(Pictures(), 20) == whole
    changed.brighter = 1
    assert content_sha256(changed, 20) != whole != content_sha256(Pictures(), 19)


def test_a_data_set_may_say_its_content_by_its_files(counting: Counting) -> None:
    class Files(Pictures):
        def images_sha256(self, count: int) -> str:
            return f"the files' bytes {count}"

    reference_of(counting, Files())
    (key,) = [json.loads(path.read_text()) for path in references_folder().rglob("key.json")]
    assert key["pictures_sha256"] == "the files' bytes 20"


def test_a_damaged_reference_is_one_sentence(counting: Counting) -> None:
    reference_of(counting, Pictures())
    (kept,) = references_folder().rglob("*.npy")
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(
        DdilError,
        match="the stored reference features .* does not match its checksum .*; delete the file to compute them again",
    ):
        reference_of(counting, Pictures())


def test_an_interrupted_reference_is_not_kept(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking(Pictures):
        def images_sha256(self, count: int) -> str:
            return "known"

        def images(self, count: int, batch_size: int = 7) -> Iterator[np.ndarray]:
            yield from super().images(7, 7)
            raise DdilError("the disk is gone")

    with pytest.raises(DdilError, match="the disk is gone"):
        reference_of(counting, Breaking())
    assert [path for path in references_folder().rglob("*") if path.is_file()] == []


def test_the_user_s_folder_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DDIL_CACHE", str(tmp_path))
    assert user_folder() == tmp_path
    monkeypatch.delenv("DDIL_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_folder() == tmp_path / "xdg" / "ddil"
