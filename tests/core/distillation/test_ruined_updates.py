"""An update that is not finite changes nothing and is counted; many in a row, or ruined weights, stop the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddil_core.distillation import progressive
from ddil_core.distillation.checkpoints import Checkpoints
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.distill import distill
from ddil_core.distillation.optimizer import TrainedWeights, make_optimizer, step_unless
from ddil_core.support.errors import DdilError

SMALL: dict[str, Any] = {
    "batch_size": 2, "pool": 6, "warmup": 1, "save_every": 2, "stages": [{"steps": 2, "updates": 6}],
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["fused", "adamw"])
def test_a_skipped_step_is_no_step(optimizer: str) -> None:
    """Two steps, and two with a skipped one between them, end with the same weights and moments to the bit."""
    config = ProgressiveConfig.model_validate(SMALL | {"optimizer": optimizer, "weight_decay": 0.1})
    ends = []
    for skips in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        adam = make_optimizer(net.parameters(), 0.1, config)
        for step in range(3):
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, float("nan") if step == 1 else 1.0 + step)
            if step != 1 or skips:
                step_unless(adam, torch.tensor(float(step == 1)))
        ends.append((net.state_dict(), adam.state_dict()["state"]))
    (weights, state), (others, other_state) = ends
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(
        torch.equal(a[key], b[key]) for a, b in zip(state.values(), other_state.values(), strict=True) for key in a
    )


def spoil(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float], calls: list[int]) -> None:
    """Multiply the losses of some updates by a number."""
    original = progressive.pd_loss

    def loss(*args: Any) -> torch.Tensor:
        calls.append(len(calls))
        return original(*args) * factors.get(calls[-1], 1.0)

    monkeypatch.setattr(progressive, "pd_loss", loss)


def go(teacher: Path, out: Path, **told: Any) -> list[dict[str, Any]]:
    """Distil, and return the lines of the log."""
    distill(str(teacher), "shapes", ProgressiveConfig.model_validate(SMALL | told), out, device="cpu")
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_one_update_that_is_not_finite_is_skipped_and_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, {1: float("nan"), 3: float("inf"), 4: 1e6}, [])
    (line,) = go(folder, tmp_path / "out", skip_above=1e4)
    assert line["skipped"] == 0.5 and line["loss"] < 1e3  # of the three other updates
    said = " ".join(capsys.readouterr().err.split())
    assert "4 → 2 steps, update 6: 50% of the updates since the last line of the log were skipped" in said
    assert (tmp_path / "out" / "student").is_dir()


def test_too_many_in_a_row_stop_the_run_at_a_good_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, dict.fromkeys(range(3, 99), float("nan")), [])
    with pytest.raises(DdilError) as error:
        go(folder, tmp_path / "out", skip_limit=3)
    assert str(error.value) == (
        "3 updates of the stage '4 → 2 steps' in a row were skipped by update 6, because their loss or their "
        "gradient's norm was not finite, or the norm was above skip_above: begin another run "
        "(another --out) with a lower learning_rate or gradient_clip; the checkpoint stage-1-of-1.4.pt before it is kept"
    )
    assert not (tmp_path / "out" / "student").exists()
    with pytest.raises(DdilError, match="^3 updates"):  # the checkpoint knows of those before it
        go(folder, tmp_path / "out", skip_limit=3)


def test_weights_that_a_step_ruins_are_never_saved(folder: Path, tmp_path: Path) -> None:
    """They are finite, and so are the losses before each step: w ← (1 − lr · weight_decay) w."""
    with pytest.raises(DdilError) as error:
        go(folder, tmp_path / "out", learning_rate=1.0, weight_decay=1e29, stages=[{"steps": 2, "updates": 1}])
    sentence = str(error.value)
    assert sentence.startswith("the weights of the stage '4 → 2 steps' are ruined by update 1, first ")
    assert sentence.endswith("with a lower learning_rate or weight_decay; no checkpoint was saved before")
    assert not Checkpoints(tmp_path / "out" / "checkpoints" / "stage-1-of-1.pt").files()
    assert not (tmp_path / "out" / "student").exists()


@pytest.mark.parametrize("value", [9e29, float("inf"), float("nan")])
def test_ruined_weights_are_named(value: float) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weights = TrainedWeights(net, torch.float32)
    assert weights.ruined() is None
    net[1].bias.data[1] = value
    assert weights.ruined() == "1.bias"
