"""Tables from nothing: a protocol lists ``ddil`` commands, which run in their order, as processes of their own.

Distillations that follow one another run in parallel, one core each. Every other command runs alone, on all cores. A
finished command is not run again. A stopped one goes on where it was, as it does by itself.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_text
from ddil_core.support.progress import clock_text, progress
from ddil_core.support.protocol import Strict

ALLOWED = ("distill", "eval", "report")
"""The commands that a recreation may run."""
SEED, OUT = "{training_seed}", "{out}"
PATIENCE = 120.0
"""Seconds that a command has to save its work when the recreation is stopped."""
ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Each of several distillations computes on one core. Their threads would wait for each other."""


class CommandConfig(Strict):
    """A command of a recreation, or one for each training seed.

    Attributes:
        run: The command line after the word ``ddil``. ``{training_seed}`` stands for the seeds of training, and
            ``{out}`` for the results folder.
        training_seeds: The number of commands, with the training seeds 0, 1 and so on. None for one command.
        core_minutes: How long one command computes, in minutes of one core of the machine of ``speed``.
    """

    run: str
    training_seeds: int | None = Field(default=None, ge=1)
    core_minutes: float = Field(gt=0)

    @field_validator("run")
    @classmethod
    def _is_a_command(cls, run: str) -> str:
        try:
            words = shlex.split(run)
        except ValueError as error:
            raise ValueError(f"the command {run!r} cannot be split into words: {error}") from error
        if not words or words[0] not in ALLOWED:
            raise ValueError(f"the command {run!r} is none of ddil's {', '.join(ALLOWED)}")
        return run

    @model_validator(mode="after")
    def _names_its_seed(self) -> CommandConfig:
        if (self.training_seeds is not None) != (SEED in self.run):
            raise ValueError(
                f"the command {self.run!r} and its training_seeds do not fit: say training_seeds exactly where the "
                f"command holds {SEED}"
            )
        return self


class RecreationConfig(Strict):
    """All commands that make some tables, in their order.

    Attributes:
        title: What they make.
        work: The folder of logs, and of notes on finished commands.
        speed: The speed of the machine on which ``core_minutes`` were measured: see ``measure_speed``.
        commands: The commands.
    """

    title: str
    work: str
    speed: float = Field(gt=0)
    commands: tuple[CommandConfig, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Command:
    """A command of a recreation.

    Attributes:
        words: The words after ``ddil``.
        core_minutes: How long it computes, in minutes of one core of the machine of the protocol.
        done: The file that says that it is finished, and holds the command and its seconds.
        log: The file of what it prints.
    """

    words: tuple[str, ...]
    core_minutes: float
    done: Path
    log: Path

    @property
    def text(self) -> str:
        return shlex.join(("ddil", *self.words))

    @property
    def is_parallel(self) -> bool:
        """Whether it may run beside its neighbours."""
        return self.words[0] == "distill"

    @property
    def is_done(self) -> bool:
        """Whether it is finished, and the folder that it wrote is still there."""
        if not self.done.is_file() or self.done.read_text(encoding="utf-8").splitlines()[:1] != [self.text]:
            return False
        written = [Path(folder) for word, folder in zip(self.words, self.words[1:], strict=False) if word == "--out"]
        return all(folder.is_dir() for folder in written)


def commands_of(config: RecreationConfig, out: Path) -> list[Command]:
    """Return all commands of a recreation, in their order.

    Args:
        config: The recreation.
        out: The results folder.
    """
    found: list[Command] = []
    for command in config.commands:
        for seed in range(command.training_seeds or 1):
            line = command.run.replace(SEED, str(seed))
            words = tuple(word.replace(OUT, str(out)) for word in shlex.split(line))
            stem = f"{len(found):03d}-{words[0]}"
            work = Path(config.work)
            found.append(Command(words, command.core_minutes, work / "done" / stem, work / "logs" / f"{stem}.log"))
    return found


def describe(config: RecreationConfig, commands: Sequence[Command], jobs: int, speed: float) -> str:
    """Say how many commands are left, and how long they will take here.

    Args:
        config: The recreation.
        commands: All of its commands.
        jobs: The number of cores.
        speed: This machine's speed.
    """
    missing = [command for command in commands if not command.is_done]
    minutes = sum(command.core_minutes for command in missing)
    here = minutes * config.speed / speed
    return (
        f"{config.title}: {len(missing)} of {len(commands)} commands are left. They take about "
        f"{clock_text(60 * here / jobs)} here, on {jobs} core{'s' * (jobs > 1)}: a core of this machine is "
        f"{speed / config.speed:.2f} times as fast as the one on which they took {minutes:.0f} minutes"
    )


def measure_speed(device: str, seconds: float = 3.0) -> float:
    """Return how many images of 4 steps the flow teacher of the shapes world draws in a second, on one core or a GPU.

    Args:
        device: The device.
        seconds: How long to measure.
    """
    import torch

    import ddil_core

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        teacher = ddil_core.load_model("shapes-flow", device)
        prompts = ["a small red circle on a grey background"] * 16
        ddil_core.sample(teacher, prompts, steps=4)  # the first batch is slower
        started, best = time.monotonic(), float("inf")
        while time.monotonic() - started < seconds:
            begun = time.monotonic()
            ddil_core.sample(teacher, prompts, steps=4)
            best = min(best, time.monotonic() - begun)
        return len(prompts) / best
    finally:
        torch.set_num_threads(threads)


def recreate(config: RecreationConfig, commands: Sequence[Command], jobs: int) -> None:
    """Run the commands that are not finished.

    Args:
        config: The recreation.
        commands: Its commands.
        jobs: The number of cores.

    Raises:
        DdilError: a command failed. Those that run beside it are finished first, and later ones are not begun.
        Interrupted: a signal came. Finished commands are kept, and the others saved what they could.
    """
    total, done = (
        sum(max(1, round(60 * command.core_minutes)) for command in some)
        for some in (commands, [command for command in commands if command.is_done])
    )
    with progress(f"{config.title} (core seconds)", total, done) as advance:
        for _, group in groupby(commands, key=lambda command: command.is_parallel or command.text):
            batch = list(group)
            parallel, failed = batch[0].is_parallel, []
            missing = [command for command in batch if not command.is_done]
            for command, seconds, status in _run(missing, jobs if parallel else 1, one_core=parallel and jobs > 1):
                if status == 0:
                    write_text(command.done, f"{command.text}\n{seconds:.0f} seconds\n")
                    advance(max(1, round(60 * command.core_minutes)), note=command.text)
                else:
                    failed.append(command)
            if failed:
                raise DdilError(
                    f"{len(failed)} command{'s' * (len(failed) > 1)} failed, first: {failed[0].text} (its log is "
                    f"{failed[0].log}); mend the cause and run the same command again to go on"
                )


def _run(commands: Sequence[Command], jobs: int, *, one_core: bool) -> Iterator[tuple[Command, float, int]]:
    """Run commands as processes, ``jobs`` at once. Yield each finished one with its seconds and its exit status."""
    waiting, running = list(commands), dict[Command, tuple[subprocess.Popen[bytes], float]]()
    environment = os.environ | (ONE_CORE if one_core else {})
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                command = waiting.pop(0)
                command.log.parent.mkdir(parents=True, exist_ok=True)
                with command.log.open("ab") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "ddil_eval.cli", *command.words],
                        stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
                    )  # fmt: skip
                running[command] = process, time.monotonic()
            time.sleep(0.2)
            for command, (process, started) in list(running.items()):
                if (status := process.poll()) is not None:
                    del running[command]
                    yield command, time.monotonic() - started, status
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
