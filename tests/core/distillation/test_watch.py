"""The alarm: what it measures of latents whose figures are known, what it says, and that looking changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.parameterization import Reflection
from ddil_core.distillation.config import WatchConfig
from ddil_core.distillation.distill import distill
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation.training_log import Window, require_finite
from ddil_core.distillation.watch import Watch, alarms, measure_latents
from ddil_core.support.errors import DdilError
from tests.core.closed_form import normal

BOUND = Reflection("clamp", torch.zeros(2), torch.full((2,), 4.0))


def data(count: int = 400) -> LatentPool:
    mean = 2 * normal(count, 2, 4, 4) + 1
    return LatentPool(mean.half(), torch.zeros_like(mean).half(), {})


def figures(z: torch.Tensor) -> dict[str, float]:
    return measure_latents(z, data(), BOUND, images=4)


def test_latents_like_the_data_raise_no_alarm() -> None:
    found = figures(2 * normal(400, 2, 4, 4, seed=1) + 1)
    assert found["mean_shift"] < 0.1 and found["diversity"] == pytest.approx(1, abs=0.05)
    assert found["clipped"] == pytest.approx(0.0668 + 0.0062, abs=0.01)  # P(|1 + 2 n| > 4)
    assert alarms(found, WatchConfig(clipped=0.1)) == []


def test_few_prompts_are_off_by_chance_without_an_alarm() -> None:
    """Every prompt has its own mean here.

    The mean of four prompts is 0.8 deviations from the data's, which is no fault.
    """
    own = 2 * normal(400, 2, 1, 1, seed=4).expand(-1, -1, 4, 4) + 0.5 * normal(400, 2, 4, 4)
    pool = LatentPool(own.half(), torch.zeros_like(own).half(), {})
    four = own[:4].repeat_interleave(4, 0)
    assert float(((four.mean((0, 2, 3)) - own.mean((0, 2, 3))) / own.std((0, 2, 3))).abs().max()) > 0.8
    assert measure_latents(four, pool, BOUND, images=4)["mean_shift"] == 0
    assert measure_latents(four + 6, pool, BOUND, images=4)["mean_shift"] > 1


def test_each_failure_has_its_sentence() -> None:
    noise = 2 * normal(400, 2, 4, 4, seed=1) + 1
    collapsed = noise[::4].repeat_interleave(4, 0) + 0.01 * normal(400, 2, 4, 4, seed=2)
    cases = {
        "the latents' mean is 1.9": noise + 4,
        "the student saturates: a channel has 3.": 3 * noise - 2,
        "the student collapses: a channel has 0.1": 0.1 * noise + 0.9,
        "the student collapses: images of one prompt differ 0.0": collapsed,
        "the student draws numbers that are not finite": noise * float("nan"),
    }
    for sentence, z in cases.items():
        assert any(said.startswith(sentence) for said in alarms(figures(z), WatchConfig(clipped=1))), sentence
    assert any(
        "of its latents lie outside the data's range" in said for said in alarms(figures(3 * noise), WatchConfig())
    )


def test_means_of_pairs_are_weighted_and_left_out_where_empty() -> None:
    logs = [
        {"a": 1.0, "b": torch.tensor([1.0, 1.0]), "c": torch.zeros(2)},
        {"a": 3.0, "b": torch.tensor([0.0, 3.0]), "c": torch.zeros(2)},
    ]
    window = Window()
    for entry in logs:
        window.add(entry)
    assert window.join(None) == {"a": 2.0, "b": 0.25}


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(DdilError, match="^the loss of the stage 'LCM' is not finite at update 50: begin another run"):
        require_finite({"loss": float("nan")}, "LCM", 50, "nothing is kept")


def test_looking_changes_nothing_and_says_what_it_sees(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = {"updates": 4, "batch_size": 4, "pool": 12, "w_embedding": 16, "save_every": 2}
    watched = base | {"watch": {"every": 2, "prompts": 2, "images": 2}}
    for name, told in (("plain", base), ("watched", watched)):
        distill(str(folder), "shapes", METHODS["lcm"].config.model_validate(told), tmp_path / name, device="cpu")
    a, b = (
        load_file(tmp_path / name / "student/unet/diffusion_pytorch_model.safetensors") for name in ("plain", "watched")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    lines = [json.loads(line) for line in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "watch" in line] == [2, 4]
    assert {"clipped_fraction_t0-249", "clipped_fraction_t750-999"} & set(lines[-2])
    assert sorted(path.name for path in (tmp_path / "watched" / "grids").iterdir()) == [
        "consistency-2.png",
        "consistency-4.png",
    ]
    with Image.open(tmp_path / "watched" / "grids" / "consistency-2.png") as grid:
        assert (
            grid.width > 2 * 2 * 64 + 200 and grid.height > 2 * 2 * 64
        )  # two images a row, twice as large, and labels
    assert "warning: LCM, update 4: the student saturates" in capfd.readouterr().err  # it is untrained


def test_a_kill_between_a_checkpoint_and_its_measurement_loses_no_grid(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"updates": 4, "batch_size": 4, "pool": 12, "w_embedding": 16, "save_every": 2,
            "watch": {"every": 2, "prompts": 2, "images": 2}}  # fmt: skip
    config, measure = METHODS["lcm"].config.model_validate(told), Watch.__call__

    def killed(watch: Watch, step: int, means: dict[str, float] | None) -> None:
        if step == 2:
            raise KeyboardInterrupt
        measure(watch, step, means)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Watch, "__call__", killed)
        distill(str(folder), "shapes", config, tmp_path / "run", device="cpu")
    distill(str(folder), "shapes", config, tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "watch" in line] == [2, 4]
    grids = sorted(path.name for path in (tmp_path / "run" / "grids").iterdir())
    assert grids == ["consistency-2.png", "consistency-4.png"]


def test_a_tracker_gets_the_log(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = {"updates": 2, "batch_size": 4, "pool": 12, "w_embedding": 16, "trackers": ["tensorboard"]}
    distill(str(folder), "shapes", METHODS["lcm"].config.model_validate(told), tmp_path / "run", device="cpu")
    events = EventAccumulator(str(tmp_path / "run" / "tracked" / "ddil")).Reload()
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    (found,) = events.Scalars("consistency/loss")
    assert (found.step, found.value) == (2, pytest.approx(line["loss"], rel=1e-5))
