"""Tables from nothing: a protocol lists ``ddil`` commands, which run in their order, as processes of their own.

Distillations that follow one another run in parallel, one core each. Every other command runs alone, on all cores. A
finished command is not run again, unless one before it is: measurements and reports follow from distillations. A
stopped command goes on where it was, as it does by itself.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from ddil_core.support.ending import PATIENCE
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_text
from ddil_core.support.paths import user_path
from ddil_core.support.progress import clock_text, progress, warn
from ddil_core.support.protocol import Strict
from ddil_core.support.resources import find_protocol
from ddil_eval.experiments.training_seeds import for_each_seed, require_seeds
from ddil_eval.study.workers import ONE_CORE

ALLOWED = ("distill", "eval", "report")
"""The commands that a recreation may run."""
OUT = "{out}"


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
        require_seeds(self.run, self.training_seeds, f"the command {self.run!r}")
        return self


class RecreationConfig(Strict):
    """All commands that make some tables, in their order.

    Attributes:
        title: What they make.
        work: The folder of logs, and of notes on finished commands.
        speed: The speed of the machine on which ``core_minutes`` were measured: the images of 4 steps that its core
            draws in a second with ``shapes-flow``. ``--dry-run`` prints that of this machine.
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
        done: The file that says that it is finished. Its name has a hash of the command and of its protocols.
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
    def core_seconds(self) -> int:
        return max(1, round(60 * self.core_minutes))

    @property
    def is_distillation(self) -> bool:
        """Whether it makes a student. It may then run beside its neighbours, and needs nothing from them."""
        return self.words[0] == "distill"

    @property
    def is_done(self) -> bool:
        """Whether it is finished, and what it wrote is still there: the student, or the folder of results."""
        inside = "student" if self.is_distillation else "."
        folders = _values(self.words, "--out") or _values(self.words, "--results")
        return self.done.is_file() and all((Path(folder) / inside).is_dir() for folder in folders)


def _values(words: Sequence[str], option: str) -> list[str]:
    """Return the values of an option among the words of a command."""
    after = [value for word, value in pairwise(words) if word == option]
    return after + [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]


def commands_of(config: RecreationConfig, out: Path) -> list[Command]:
    """Return all commands of a recreation, in their order.

    Args:
        config: The recreation.
        out: The results folder.
    """
    found: list[Command] = []
    work = user_path(config.work, "the key 'work'")
    for command in config.commands:
        for line in for_each_seed(command.run, command.training_seeds):
            words = tuple(word.replace(OUT, str(out)) for word in shlex.split(line))
            name = f"{words[0]}-{_digest(words)[:12]}"
            log = work / "logs" / f"{len(found):03d}-{words[0]}.log"
            found.append(Command(words, command.core_minutes, work / "done" / name, log))
    return found


def _digest(words: Sequence[str]) -> str:
    """Return a hash of a command and of the protocols that it names."""
    content = hashlib.sha256("\0".join(words).encode())
    for word in words:
        if word.endswith((".yaml", ".yml")) and (path := find_protocol(Path(word))).is_file():
            content.update(path.read_bytes())
    return content.hexdigest()


def left(commands: Sequence[Command]) -> list[Command]:
    """Return the commands to run: distillations that are not done, and from the first such on all other commands."""
    found: list[Command] = []
    for command in commands:
        if not command.is_done or (found and not command.is_distillation):
            found.append(command)
    return found


def describe(config: RecreationConfig, commands: Sequence[Command], jobs: int, cores: int, speed: float) -> str:
    """Say how many commands are left, and how long they will take here.

    Args:
        config: The recreation.
        commands: All of its commands.
        jobs: The number of distillations at once.
        cores: The number of cores.
        speed: This machine's speed.
    """
    todo = left(commands)
    seconds = sum(one.core_seconds / (min(jobs, cores) if one.is_distillation else cores) for one in todo)
    minutes = sum(command.core_minutes for command in todo)
    return (
        f"{config.title}: {len(todo)} of {len(commands)} commands are left, of {minutes:.0f} minutes on one core whose "
        f"speed is {config.speed:g}. The speed here is {speed:.1f}, with {cores} core{'s' * (cores > 1)}, so that they "
        f"take about {clock_text(seconds * config.speed / speed)}"
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
    """Run the commands that are left.

    Args:
        config: The recreation.
        commands: Its commands.
        jobs: The number of distillations at once.

    Raises:
        DdilError: a command failed, or could not measure all that it names. Those that run beside it are finished
            first, and no other is begun.
        Interrupted: a signal came. Finished commands are kept, and the others saved what they could.
    """
    todo = left(commands)
    total, missing = (sum(command.core_seconds for command in some) for some in (commands, todo))
    with progress(f"{config.title} (core seconds)", total, total - missing) as advance:
        for _, group in groupby(todo, key=lambda command: command.is_distillation or command.text):
            batch = list(group)
            several = batch[0].is_distillation and jobs > 1
            for command, problem in _run(batch, jobs if several else 1, one_core=several):
                if problem is not None:
                    raise DdilError(
                        f"{command.text} {problem} (its log is {command.log}); mend the cause and run the same command "
                        "again to go on"
                    )
                write_text(command.done, f"{command.text}\n")
                advance(command.core_seconds, note=command.text)


def _run(commands: Sequence[Command], jobs: int, *, one_core: bool) -> Iterator[tuple[Command, str | None]]:
    """Run commands as processes, ``jobs`` at once. Yield each finished one with its problem, or None.

    After a problem no other command is begun; the last one that is yielded has the first problem.
    """
    waiting, running, failed = list(commands), dict[Command, _Child](), list[tuple[Command, str | None]]()
    try:
        while (waiting and not failed) or running:
            while waiting and not failed and len(running) < jobs:
                command = waiting.pop(0)
                running[command] = _Child(command, one_core=one_core)
            time.sleep(0.2)
            for command, child in list(running.items()):
                if child.process.poll() is None:
                    continue
                del running[command]
                if (problem := child.problem()) is None:
                    yield command, None
                    continue
                failed.append((command, problem))
                if running:
                    warn(f"{command.text} {problem}; the other {len(running)} are finished first")
        yield from failed[:1]
    finally:
        for child in running.values():
            child.process.terminate()
        for child in running.values():
            child.end()


class _Child:
    """A command as a process of a session of its own, so that Ctrl-C in the terminal reaches the recreation alone."""

    def __init__(self, command: Command, *, one_core: bool) -> None:
        self.log = command.log
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command.done.unlink(missing_ok=True)
        self._start = self.log.stat().st_size if self.log.is_file() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ddil_eval.cli.child", str(os.getpid()), *command.words],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | (ONE_CORE if one_core else {}),
                start_new_session=True,
            )  # fmt: skip

    def problem(self) -> str | None:
        """Return why the finished command is of no use, or None."""
        if self.process.returncode != 0:
            return f"failed with exit status {self.process.returncode}"
        with self.log.open("rb") as log:
            log.seek(self._start)
            absent = [line for line in log.read().decode(errors="replace").splitlines() if line.startswith("not here:")]
        return f"could not measure everything ({absent[0]})" if absent else None

    def end(self) -> None:
        """Wait for a command that was told to stop, and end it where it does not."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
