"""No work and no memory is lost: stages are freed, needs are checked first, signals and damage cost little."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from ddil_core.distillation import conversion, matching, progressive, training
from ddil_core.distillation.aggregate import AggregatedDataset, States
from ddil_core.distillation.checks import most_states, require_capacity
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.distill import distill
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.methods import METHODS
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.files import replacing
from ddil_core.support.lock import LOCK
from tests.pipelines import TEACHER, save_pipeline

BASE = {"batch_size": 2, "pool": 6, "warmup": 1, "save_every": 2}
PHASES = [{"until": 0.6, "aggregated": 0.25, "p_teacher": 0.85}, {"until": 1, "aggregated": 0.5, "p_teacher": 0.2}]
SMALL = BASE | {"stages": [{"steps": 2, "updates": 6}], "ddil": {"collect_every": 2, "phases": PHASES}}
UNET = "student/unet/diffusion_pytorch_model.safetensors"


def go(teacher: Path, out: Path, **told: Any) -> Path:
    told = SMALL | told
    return distill(
        str(teacher), "shapes", METHODS[told.get("method", "pd")].config.model_validate(told), out, device="cpu"
    )


def alive() -> tuple[int, int]:
    """How many U-Nets and optimisers there are."""
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    networks, optimisers = (
        sum(count for kind, count in kinds.items() if issubclass(kind, wanted))
        for wanted in (UNet2DConditionModel, torch.optim.Optimizer)
    )
    return networks, optimisers


RUNS: dict[str, dict[str, Any]] = {
    "pd": {"convert": {"updates": 2}, "stages": [{"steps": 2**n, "updates": 2} for n in (3, 2, 1)]},
    "dmd2": {"method": "dmd2", "stages": None, "updates": 2, "critic_updates": 1, "teacher_steps": 4, "gan": {},
             "regression": {"pairs": 4, "teacher_steps": 2, "updates": 2}},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_stage_leaves_only_its_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No optimiser, no average and no critic outlives a stage.

    In PD the ε-teacher, the v-teacher and the last stage's student do. In DMD2 the teacher and the regression's
    generator do.
    """
    teacher = save_pipeline(tmp_path / "teacher", TEACHER, seed=1, prediction="epsilon")
    monkeypatch.setattr(
        sys.modules["ddil_core.distillation.distill"], "frozen_heap", nullcontext
    )  # gc lists all objects
    before, counted = alive(), list[tuple[int, int]]()

    def counting(*args: Any) -> Any:
        counted.append(tuple(now - then for now, then in zip(alive(), before, strict=True)))  # type: ignore[arg-type]
        return training.train_stage(*args)

    for module in (conversion, progressive, matching):
        monkeypatch.setattr(module, "train_stage", counting)
    told = {key: value for key, value in (SMALL | RUNS[name]).items() if value is not None}
    distill(
        str(teacher),
        "shapes",
        METHODS[told.get("method", "pd")].config.model_validate(told),
        tmp_path / "out",
        device="cpu",
    )
    assert counted == {"pd": [(1, 0), (2, 0), (3, 0), (3, 0)], "dmd2": [(1, 0), (2, 0)]}[name]


def config(kind: type[Any], **told: Any) -> Any:
    return kind.model_validate({"ddil": {"phases": PHASES}} | told)


STAGES = [{"steps": 8, "updates": 10_000}, {"steps": 4, "updates": 10_000}]
LARGE: dict[str, tuple[Any, int, int | None]] = {
    "pd": (config(ProgressiveConfig, stages=STAGES, batch_size=512), 12_807, 31),
    "lcm": (config(ConsistencyConfig, updates=1000, batch_size=512), 12_853, 31),
    "dmd2": (config(MatchingConfig, updates=1000, batch_size=512), 12_807, 31),
    "too small for one update": (
        config(ProgressiveConfig, stages=STAGES, ddil={"phases": PHASES, "capacity": 15}), 807, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_dataset_too_small_for_a_later_phase_is_refused_at_the_start(folder: Path, tmp_path: Path, name: str) -> None:
    told, capacity, every = LARGE[name]
    with pytest.raises(WrongCommand) as error:
        distill(str(folder), "shapes", told, tmp_path / "out", device="cpu")
    sentence = str(error.value)
    assert not (tmp_path / "out").exists() and "\n" not in sentence
    other = "" if every is None else f", or --set ddil.collect_every={every}"
    assert sentence.endswith(f"; say --set ddil.capacity={capacity}{other}")
    ddil = told.ddil
    changes = [{"capacity": capacity}] + ([{"collect_every": every}] if every else [])
    for change in changes:  # what is advised is enough, and nothing less is
        require_capacity(told.model_copy(update={"ddil": ddil.model_copy(update=change)}))
    for change in [{"capacity": capacity - 1}] + ([{"collect_every": every + 1}] if every else []):
        with pytest.raises(WrongCommand):
            require_capacity(told.model_copy(update={"ddil": ddil.model_copy(update=change)}))


@pytest.mark.parametrize("uses", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_need_of_progressive_distillation_is_what_a_stage_comes_to_hold(uses: int, steps: int) -> None:
    """Never more, and in this many tries as much, or so nearly that whole trajectories account for the rest."""
    for batch, every, share in ((7, 3, 0.5), (5, 1, 1.0), (12, 4, 0.25)):
        told = config(ProgressiveConfig, stages=[{"steps": steps, "updates": 60}], batch_size=batch)
        ddil = told.ddil.model_copy(update={"uses": uses, "collect_every": every, "phases": ()})
        phase = told.ddil.phases[0].model_copy(update={"until": 1.0, "aggregated": share})
        need = most_states(ddil.model_copy(update={"phases": (phase,)}), told.collections()[0], batch)
        dataset, held = AggregatedDataset(need, uses, (1, 1, 1)), 0
        generator = torch.Generator().manual_seed(0)
        for step in range(60):
            count = -(-batch * share // 1)
            if dataset.pending < count:
                wanted = min(every, 60 - step) * int(count) - dataset.pending
                number = -(-wanted // (uses * steps)) * steps
                z = torch.zeros(number, 1, 1, 1)
                rows = torch.zeros(number, dtype=torch.long)
                dataset.enqueue(dataset.add(States(z, z, rows, rows)), generator)
                held = max(held, len(dataset))
            dataset.take(int(count))
        assert need - uses * steps - int(batch * share) <= held <= need


def test_what_was_learnt_does_not_depend_on_the_capacity(folder: Path, tmp_path: Path) -> None:
    """Begun with one, resumed with another, it is the run of either, and ``run.yaml`` says what was changed."""
    go(folder, tmp_path / "whole")
    out = tmp_path / "changed"
    stopped(folder, out, at=3)
    assert not (out / "student").exists()
    with pytest.raises(WrongCommand, match=r"holds \d+ states, and ddil\.capacity is 1;|too small for the stage"):
        go(folder, out, ddil=SMALL["ddil"] | {"capacity": 1})  # type: ignore[operator]
    more = {"capacity": 99} | dict(SMALL["ddil"])  # type: ignore[call-overload]
    go(folder, out, ddil=more, save_every=1, gradient_checkpointing=True, watch={"every": 100}, teacher_batch_size=3)
    a, b = (load_file(run / UNET) for run in (tmp_path / "whole", out))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    told = yaml.safe_load((out / "run.yaml").read_text())
    assert set(told["changeable"]) == set(ProgressiveConfig.CHANGEABLE)
    (change,) = told["changes"]
    assert change | {"at": ""} == {
        "at": "", "ddil.capacity": 99, "save_every": 1, "gradient_checkpointing": True, "teacher_batch_size": 3,
        "watch": told["config"]["watch"],
    }  # fmt: skip
    assert told["config"]["save_every"] == 1
    for key, value in (("seed", 1), ("learning_rate", 0.1), ("batch_size", 4)):
        with pytest.raises(WrongCommand) as error:
            go(folder, out, **{key: value})
        held = told["config"][key]
        assert str(error.value) == f"the folder {out} holds another run ({key} is {held} there); choose another --out"


def stopped(teacher: Path, out: Path, at: int) -> None:
    """A run that SIGTERM stops in an update, in this process."""
    from ddil_core.distillation.progressive import ProgressiveStage
    from ddil_core.support import ending

    before = [signal.getsignal(number) for number in ending.SIGNALS]
    update = ProgressiveStage.update

    def signalled(stage: ProgressiveStage, step: int) -> Any:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(stage, step)

    ending.listen()
    try:
        with pytest.MonkeyPatch.context() as patched, pytest.raises(ending.Interrupted) as error:
            patched.setattr(ProgressiveStage, "update", signalled)
            go(teacher, out)
    finally:
        for number, handler in zip(ending.SIGNALS, before, strict=True):
            signal.signal(number, handler)
        ending._received.number, ending._received.listening = None, False
    checkpoint = out / "checkpoints" / f"stage-1-of-1.{at + 1}.pt"
    assert str(error.value) == (
        f"stopped by SIGTERM: update {at + 1} of 6 of the stage '4 → 2 steps' is saved in {checkpoint}; run the "
        "same command again to go on"
    )
    assert torch.load(checkpoint, weights_only=True)["step"] == at + 1
    assert error.value.exit_status == 143


def command(teacher: Path, out: Path, *more: str) -> list[str]:
    protocol = out.parent / "protocol.yaml"
    protocol.write_text(yaml.safe_dump({"method": "pd"} | SMALL))
    words = ("distill", "--teacher", teacher, "--protocol", protocol, "--out", out, "--device", "cpu")
    return [*map(str, words), *more]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "240"}


def until_logged(log: Path) -> None:
    """Wait until a log has a line."""
    for _ in range(4800):  # a busy machine takes its time to import torch
        if log.is_file() and log.read_text().endswith("\n"):
            return
        time.sleep(0.05)
    raise AssertionError("it never came so far")


def test_a_signal_ends_the_command_with_a_checkpoint_and_its_status(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = ("--set", "stages=[{steps: 2, updates: 100000}]", "--set", "save_every=100000")
    program = [sys.executable, "-m", "ddil_eval.cli"]
    process = subprocess.Popen(
        [*program, *command(folder, out, *long)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    until_logged(out / "log.jsonl")
    process.send_signal(signal.SIGTERM)
    before = time.monotonic()
    said, errors = process.communicate(timeout=60)
    assert time.monotonic() - before < 30
    assert (process.returncode, said) == (143, "")
    last = errors.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM: update ") and last.endswith("; run the same command again to go on")
    assert "Traceback" not in errors and not (out / LOCK).exists()
    (checkpoint,) = (out / "checkpoints").glob("stage-1-of-1.*.pt")
    assert torch.load(checkpoint, weights_only=True)["step"] >= 50


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let this process write no file of more than ``size`` bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_no_checkpoint(folder: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """The system takes no file as large as a checkpoint."""
    out = tmp_path / "out"
    stopped(folder, out, at=2)
    checkpoint, before = out / "checkpoints" / "stage-1-of-1.4.pt", files(out / "checkpoints")
    with largest_file(max(map(len, before.values())) // 2):
        done = cli(*command(folder, out))
    assert done.exit_code == 1
    assert f"error: {checkpoint} could not be written (File too large; " in done.stderr.splitlines()[-1]
    assert files(out / "checkpoints") == before and {"stage-1-of-1.2.pt", "stage-1-of-1.3.pt"} < before.keys()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_before_the_run_is_described_leaves_a_folder_that_is_taken(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replacing(out / "run.yaml") as temporary:
        temporary.write_text("teacher: ")
        left = temporary.name
    (out / "run.yaml").unlink()
    for name in (left, LOCK, "run.partial"):
        (out / name).write_text("teacher: ")
    go(folder, out)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "log.jsonl", "run.yaml", "student"]


DAMAGE = {
    "no text": b"\xff\xfe\x00\x80",
    "no YAML": b"teacher: [",
    "nested": b"[" * 5000,
    "a date that is none": b"teacher: 2020-99-99",
    "a list": b"- teacher",
    "nothing": b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_description_is_one_sentence_and_written_again_on_request(
    folder: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    path = out / "run.yaml"
    path.write_bytes(DAMAGE[damage])
    with pytest.raises(DdilError) as error:
        go(folder, out)
    sentence = str(error.value)
    assert sentence.startswith(f"the file {path} is damaged (") and "\n" not in sentence
    assert sentence.endswith(
        "); delete it and repeat the command that began the run, with --resume, which writes it again"
    )


def test_a_run_goes_on_without_its_description_and_with_a_damaged_log(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stopped(folder, out, at=3)
    (out / "run.yaml").unlink()
    log = out / "log.jsonl"
    good = json.dumps({"stage": "4 → 2 steps", "step": 2, "loss": 1.0}).encode() + b"\n"
    log.write_bytes(b"\xff\x00\n" + good + b'{"stage": "4"}\n[1, 2]\n{"stage": 1, "step": "x"}\n\n' + b'{"half')
    told = ProgressiveConfig.model_validate(SMALL)
    with pytest.raises(WrongCommand, match="is not empty and holds no run"):
        distill(str(folder), "shapes", told, out, device="cpu")
    distill(str(folder), "shapes", told, out, device="cpu", resume=True)
    assert f"5 of 6 lines of the log {log} are damaged and were removed" in capsys.readouterr().err
    assert [json.loads(line)["step"] for line in log.read_bytes().splitlines()] == [2, 6]
    assert (out / "student").is_dir() and (out / "run.yaml").is_file()
