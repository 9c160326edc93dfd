"""The loop: resumed anywhere it is the same run; averages; checkpoints that a kill leaves whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from torch import nn

from ddil_core.distillation.loop import CheckpointError, Ema, Logs, fit, load_checkpoint, save_checkpoint
from ddil_core.support.errors import DdilError


class Killed(Exception):
    """Stands for a kill that arrives in the middle of an update."""


class Run:
    """A regression whose data come from the step alone, with momentum and an average to be kept over a resume."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.05)
        self.ema = Ema(self.net, 0.9)
        self.folder, self.steps_seen = folder, list[int]()

    def go(self, steps: int = 12, die_at: int | None = None, save_every: int = 5) -> Run:
        def update(step: int) -> Logs:
            self.steps_seen.append(step)
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            loss = (self.net(x) - x[:, :2]).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.ema.update(self.net)
            if step == die_at:
                raise Killed
            return {"loss": loss.detach(), "step_squared": float(step**2)}

        fit(
            update,
            {"net": self.net, "ema": self.ema, "optimizer": self.optimizer},
            steps=steps,
            checkpoint=self.folder / "run.pt",
            log=self.folder / "log.jsonl",
            title="test",
            save_every=save_every,
            log_every=4,
        )
        return self

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for m in (self.net, self.ema.module) for p in m.parameters()])


def test_killed_at_any_update_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole").go()
    for die_at in (0, 4, 5, 7, 11):
        folder = tmp_path / f"killed-{die_at}"
        with pytest.raises(Killed):
            Run(folder).go(die_at=die_at)
        resumed = Run(folder).go()
        assert resumed.steps_seen[0] == 5 * (die_at // 5)  # at the last checkpoint, not from the start
        assert torch.equal(resumed.weights(), whole.weights())
    done = Run(tmp_path / "whole").go()
    assert done.steps_seen == []
    assert torch.equal(done.weights(), whole.weights())


def test_a_log_line_holds_means_since_the_last(tmp_path: Path) -> None:
    Run(tmp_path).go(steps=10)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("test", 4), ("test", 8), ("test", 10)]
    assert [line["step_squared"] for line in lines] == [(0 + 1 + 4 + 9) / 4, (16 + 25 + 36 + 49) / 4, (64 + 81) / 2]


def test_after_a_kill_the_log_repeats_no_line(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Run(tmp_path).go(die_at=9)
    log = tmp_path / "log.jsonl"
    other = json.dumps({"stage": "another", "step": 99}) + "\n"
    log.write_text(other + log.read_text() + '{"stage": "te')  # and half a line
    Run(tmp_path).go(steps=10)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("another", 99),
        ("test", 4),
        ("test", 8),
        ("test", 10),
    ]


@pytest.mark.parametrize("key", ["loss", "critic_loss"])
def test_a_loss_that_is_not_finite_is_never_saved(tmp_path: Path, key: str) -> None:
    net, checkpoint = nn.Linear(2, 2), tmp_path / "run.pt"

    def update(step: int) -> Logs:
        return {"loss": 1.0, "critic_loss": 1.0} | ({key: float("nan")} if step == 3 else {})

    told: dict[str, Any] = {"steps": 100, "checkpoint": checkpoint, "log": tmp_path / "log.jsonl", "title": "DMD2"}
    with pytest.raises(DdilError) as error:
        fit(update, {"net": net}, save_every=2, log_every=50, **told)
    assert str(error.value) == (
        f"the {key.replace('_', ' ')} of the stage 'DMD2' is not finite at update 4: lower learning_rate or "
        "gradient_clip; the checkpoint before is kept"
    )
    assert load_checkpoint(checkpoint, {"net": net}) == 2


def test_ema_is_the_weighted_mean_of_all_weights() -> None:
    module = nn.Linear(1, 1)
    ema = Ema(module, decay=0.3)
    expected = [p.detach().double().clone() for p in module.parameters()]
    for n in range(8):
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn_like(p))
        ema.update(module)
        mu = min(0.3, (1 + n) / (10 + n))
        expected = [mu * e + (1 - mu) * p.detach().double() for e, p in zip(expected, module.parameters(), strict=True)]
    for average, e in zip(ema.module.parameters(), expected, strict=True):
        np.testing.assert_allclose(average.numpy(), e.numpy(), rtol=1e-5, atol=1e-6)
        assert not average.requires_grad
    assert not ema.module.training


def test_a_kill_while_saving_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, path = nn.Linear(2, 2), tmp_path / "run.pt"
    save_checkpoint(path, 3, {"net": first})

    def torn(_: object, file: BinaryIO) -> None:
        file.write(b"half of a file")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", torn)
        with pytest.raises(Killed):
            save_checkpoint(path, 4, {"net": nn.Linear(2, 2)})
    found = nn.Linear(2, 2)
    assert load_checkpoint(path, {"net": found}) == 3
    assert torch.equal(found.weight, first.weight)


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, 3, {"net": nn.Linear(4, 5) if damage == "other" else nn.Linear(2, 2)})
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "other": content}[damage])
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, {"net": nn.Linear(2, 2)})
    message = str(error.value)
    assert message.startswith(f"the checkpoint {path} cannot be read (")
    assert message.endswith("; delete it to start this stage again")
    assert "\n" not in message


def test_without_a_checkpoint_it_starts_at_zero(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none.pt", {}) == 0
