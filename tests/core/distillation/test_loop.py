"""The loop: resumed anywhere it is the same run; averages; checkpoints that a kill leaves whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from torch import nn

from ddil_core.distillation.checkpoints import CheckpointError, Checkpoints
from ddil_core.distillation.loop import Ema, fit
from ddil_core.distillation.training_log import Logs
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
        f"the {key.replace('_', ' ')} of the stage 'DMD2' is not finite at update 4: begin another run "
        "(another --out) with a lower learning_rate or gradient_clip; the checkpoint run.2.pt before it is kept"
    )
    assert Checkpoints(checkpoint).load({"net": net}) == 2


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
    first, checkpoints = nn.Linear(2, 2), Checkpoints(tmp_path / "run.pt", keep=1)
    checkpoints.save(3, {"net": first})

    def torn(_: object, file: BinaryIO) -> None:
        file.write(b"half of a file")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", torn)
        with pytest.raises(Killed):
            checkpoints.save(4, {"net": nn.Linear(2, 2)})
    found = nn.Linear(2, 2)
    assert checkpoints.load({"net": found}) == 3
    assert torch.equal(found.weight, first.weight)


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "a flipped bit": bytes(content)}[how])


@pytest.mark.parametrize("how", ["empty", "cut", "a flipped bit"])
def test_the_last_checkpoints_are_kept_and_the_newest_whole_one_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    nets, checkpoints = {step: nn.Linear(2, 2) for step in (2, 4, 6)}, Checkpoints(tmp_path / "run.pt")
    for step, net in nets.items():
        checkpoints.save(step, {"net": net})
    names = ["run.4.pt", "run.4.pt.sha256", "run.6.pt", "run.6.pt.sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    damaged(tmp_path / "run.6.pt", how)
    found = nn.Linear(2, 2)
    assert checkpoints.load({"net": found}) == 4 and torch.equal(found.weight, nets[4].weight)
    assert " ".join(capsys.readouterr().err.split()) == (
        f"warning: the checkpoint {tmp_path / 'run.6.pt'} cannot be read (it does not match its checksum "
        "run.6.pt.sha256); the stage goes on from run.4.pt, update 4"
    )
    checkpoints.save(5, {"net": nets[4]})  # the damaged one does not count among those that are kept
    assert [*checkpoints.files()] == [6, 5, 4]
    for step in (5, 4):
        damaged(tmp_path / f"run.{step}.pt", how)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load({"net": found})
    assert str(error.value) == (
        f"the checkpoint {tmp_path / 'run.6.pt'} cannot be read (it does not match its checksum run.6.pt.sha256), and "
        "run.5.pt neither, and run.4.pt neither; delete them to start this stage again"
    )
    checkpoints.delete()
    assert not list(tmp_path.iterdir()) and checkpoints.load({"net": found}) == 0


def test_a_checkpoint_of_other_models_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run.pt")
    checkpoints.save(3, {"net": nn.Linear(4, 5)})
    with pytest.raises(CheckpointError) as error:
        checkpoints.load({"net": nn.Linear(2, 2)})
    assert str(error.value) == (
        f"the checkpoint {tmp_path / 'run.3.pt'} cannot be read (RuntimeError); delete it to start this stage again"
    )


def test_a_checkpoint_of_an_earlier_version_is_read_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no step in its name, no checksum, no random states, and no sums of the log."""
    Run(tmp_path / "whole").go()
    with pytest.raises(Killed):
        Run(tmp_path / "old").go(die_at=7)
    saved = torch.load(tmp_path / "old" / "run.5.pt", weights_only=True)
    Checkpoints(tmp_path / "old" / "run.pt").delete()
    old = tmp_path / "old" / "run.pt"
    torch.save({key: value for key, value in saved.items() if key not in ("window", "random", "stage", "steps")}, old)
    resumed = Run(tmp_path / "old").go()
    assert resumed.steps_seen[0] == 5 and torch.equal(resumed.weights(), Run(tmp_path / "whole").go().weights())
    assert f"{old} has no checksum, because an earlier version wrote it" in " ".join(capsys.readouterr().err.split())
    assert not old.exists() and [*Checkpoints(old).files()] == [12, 10]


def test_a_resumed_run_writes_the_lines_of_a_whole_one(tmp_path: Path) -> None:
    """Also the line whose updates lie on both sides of the kill."""
    Run(tmp_path / "whole").go()
    with pytest.raises(Killed):
        Run(tmp_path / "killed").go(die_at=6)
    Run(tmp_path / "killed").go()
    assert (tmp_path / "killed" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_callbacks_that_a_kill_cut_off_are_called_again(tmp_path: Path) -> None:
    net, called = nn.Linear(2, 2), list[int]()

    def callback(step: int, means: dict[str, float] | None) -> None:
        called.append(step)
        if called == [1, 2]:
            raise Killed

    told: dict[str, Any] = {"steps": 3, "checkpoint": tmp_path / "run.pt", "log": tmp_path / "log.jsonl", "title": "x"}
    with pytest.raises(Killed):
        fit(lambda step: {"loss": 1.0}, {"net": net}, save_every=2, callbacks=[callback], **told)
    fit(lambda step: {"loss": 1.0}, {"net": net}, save_every=2, callbacks=[callback], **told)
    assert called == [1, 2, 2, 3]
