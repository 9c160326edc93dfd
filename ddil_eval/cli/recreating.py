"""Run the commands of a recreation, and say how far it is and how long it will take."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from ddil_core.support.ending import PATIENCE
from ddil_core.support.errors import DdilError
from ddil_core.support.progress import clock_text, note, progress, warn
from ddil_eval.cli.forecast import Forecast
from ddil_eval.cli.recreation import Command, RecreationConfig, left
from ddil_eval.study.workers import ONE_CORE

LOOK = 0.2
"""Seconds between two looks at the running commands."""


def describe(config: RecreationConfig, commands: Sequence[Command], forecast: Forecast) -> str:
    """Say how many commands are left, and how long they will take here.

    Args:
        config: The recreation.
        commands: All of its commands, of which some are left.
        forecast: What is known of this machine.
    """
    todo, cores = left(commands), forecast.cores
    return (
        f"{config.title}: {len(todo)} of {len(commands)} commands are left. On one core of the speed {config.speed:g} "
        f"they take {clock_text(sum(command.core_seconds for command in todo))}; here, on {cores} "
        f"core{'s' * (cores > 1)} of the speed {config.speed / forecast.slowness:.1f}, they take about "
        f"{clock_text(forecast.left(todo, {}))}"
    )


def recreate(commands: Sequence[Command], forecast: Forecast) -> None:
    """Run the commands that are left.

    Args:
        commands: All commands of the recreation.
        forecast: What is known of this machine, and the number of distillations at once.

    Raises:
        DdilError: a command failed, or could not measure all that it names. Those that run beside it are finished
            first, and no other is begun.
        Interrupted: a signal came. Finished commands are kept, and the others saved what they could.
    """
    todo = left(commands)
    for command in todo:  # also those that follow from one: a stopped recreation must not call them done again
        command.done.unlink(missing_ok=True)
    processes = _Processes(todo, forecast.jobs)
    with progress("commands", len(commands), len(commands) - len(todo), lambda: processes.left(forecast)) as advance:
        try:
            while processes.begin():
                advance(0, note=processes.names())
                time.sleep(LOOK)
                for command, child in processes.ended():
                    command.finish(child.records_before)
                    if not child.goes_on:
                        forecast.learn(command, child.seconds)
                    note(f"{command.name} took {clock_text(child.seconds)}")
                    advance(1, note=processes.names())
        finally:
            processes.stop()
    if processes.failed:
        command, problem = processes.failed[0]
        raise DdilError(
            f"{command.name} {problem}; its log is {command.log}. Mend the cause and run the same command again to go "
            "on"
        )


class _Processes:
    """The commands of a recreation that run and those that wait.

    Attributes:
        failed: The commands that failed, each with its problem. After the first one no other is begun.
    """

    def __init__(self, todo: Sequence[Command], jobs: int) -> None:
        self._waiting, self._running, self._jobs = list(todo), dict[Command, _Child](), jobs
        self.failed: list[tuple[Command, str]] = []

    def begin(self) -> bool:
        """Begin all commands that may run now. Return whether any runs."""
        while self._waiting and not self.failed and self._is_free_for(self._waiting[0]):
            command = self._waiting.pop(0)
            self._running[command] = _Child(command, one_core=command.is_distillation and self._jobs > 1)
        return bool(self._running)

    def _is_free_for(self, command: Command) -> bool:
        beside = all(one.is_distillation for one in (command, *self._running)) and len(self._running) < self._jobs
        return beside or not self._running

    def ended(self) -> Iterator[tuple[Command, _Child]]:
        """Yield the commands that have ended well. Those that failed join ``failed``, with a warning if others run."""
        for command, child in list(self._running.items()):
            if child.process.poll() is None:
                continue
            del self._running[command]
            if (problem := child.problem()) is None:
                yield command, child
                continue
            self.failed.append((command, problem))
            if self._running:
                warn(f"{command.name} {problem}; what runs beside it is finished first: {self.names()}")

    def names(self) -> str:
        """Name the first command that runs, and count the others: a bar has little room."""
        names = [command.name for command in list(self._running)]
        return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else ""

    def left(self, forecast: Forecast) -> float:
        """Return the seconds until all commands are done. A thread that shows progress may ask."""
        running = {command: child.seconds for command, child in list(self._running.items())}
        return forecast.left([] if self.failed else list(self._waiting), running)

    def stop(self) -> None:
        """Stop the commands that run, and wait until they have saved what they can."""
        if self._running:
            note(f"stopping what runs, which saves its work first: {self.names()}")
        for child in self._running.values():
            child.process.terminate()
        for child in self._running.values():
            child.end()


class _Child:
    """A command as a process of a session of its own, so that Ctrl-C in the terminal reaches the recreation alone.

    Attributes:
        log: The file of what it prints.
        records_before: The records that were there when it began.
        goes_on: Whether it was begun before, and may take less time than a whole one.
    """

    def __init__(self, command: Command, *, one_core: bool) -> None:
        self.log, self.records_before = command.log, command.records()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.goes_on = self.log.is_file()  # it ran before, and then takes less time
        with self.log.open("ab") as log:
            log.write(f"$ {command.text}\n".encode())
            log.flush()
            self._start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ddil_eval.cli.child", str(os.getpid()), *command.words],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | (ONE_CORE if one_core else {}),
                start_new_session=True,
            )  # fmt: skip
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the command has run."""
        return time.monotonic() - self._began

    def problem(self) -> str | None:
        """Return why the finished command is of no use, or None."""
        with self.log.open("rb") as log:
            log.seek(self._start)
            lines = log.read().decode(errors="replace").splitlines()
        status = self.process.returncode
        if status == -signal.SIGKILL:
            return "was ended by another program with SIGKILL, as a machine does that lacks memory"
        if status != 0:
            said = [line for line in lines if line.startswith(("error: ", "Error: ", "stopped by "))]
            reason = f" ({re.sub('^[Ee]rror: ', '', said[-1])})" if said else ""
            return f"failed with exit status {status}{reason}"
        absent = [line for line in lines if line.startswith("not here:")]
        return f"could not measure everything ({absent[0]})" if absent else None

    def end(self) -> None:
        """Wait for a command that was told to stop, and end it where it does not."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
