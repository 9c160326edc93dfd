"""Run commands in child processes, disturb them, and look what becomes of their results.

A child is forked from a process that has imported the project and computed nothing. So it starts at once.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ddil_core.support import resources

SOON = 10.0
"""Seconds in which a command ends after SIGTERM or Ctrl-C."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (negative for a signal), what it said, and how long it took."""

    status: int
    said: str
    seconds: float

    @property
    def refused(self) -> bool:
        """Whether it ended with one sentence and no traceback."""
        last = self.said.rstrip().splitlines()[-1:] or [""]
        return self.status in (1, 2) and last[0].startswith("error: ") and "Traceback" not in self.said


@dataclass(frozen=True)
class Command:
    """A command that is run again and again.

    Attributes:
        name: What the table calls it.
        arguments: Returns its arguments for a folder of results.
        results: Returns what must not depend on faults, by name.
        environment: Returns environment variables for a folder of results.
        protocols: A folder in place of the shipped protocols.
        goes_on: Whether a finished command may be run again.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    results: Callable[[Path], Mapping[str, object]]
    environment: Callable[[Path], Mapping[str, str]] = field(default=lambda out: {})
    protocols: Path | None = None
    goes_on: bool = True

    def run(self, out: Path, until: Callable[[], bool] = lambda: False, number: int = signal.SIGKILL) -> Ended:
        """Run the command in a child, and send it a signal when ``until`` says so."""
        start, sent = time.monotonic(), False
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "said"
            child = os.fork()
            if not child:
                os._exit(self._child(out, log))
            while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if not sent and until():
                    os.kill(child, number)
                    start, sent = time.monotonic(), True
                time.sleep(0.002)
            _, status = os.waitpid(child, 0)
            said = log.read_text(errors="replace") if log.exists() else ""
        return Ended(os.waitstatus_to_exitcode(status), said, time.monotonic() - start)

    def _child(self, out: Path, log: Path) -> int:
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            os.environ.update(self.environment(out))
            if self.protocols is not None:
                resources.protocols = lambda: self.protocols  # type: ignore[assignment,return-value]
            from ddil_eval.cli import main

            sys.argv = ["ddil", *self.arguments(out)]
            main()
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 0
        except BaseException:
            traceback.print_exc()
            return 99
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return 0


@dataclass
class Outcomes:
    """How often a command ended as without a fault, how often in a sentence, and what was wrong."""

    same: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    def words(self, same: str) -> str:
        """Return the outcomes for the table; ``same`` says what a good end is."""
        counts = {same: self.same, "refused in a sentence": self.refused, "**wrong**": len(self.wrong)}
        known = {name: count for name, count in counts.items() if count}
        return ", ".join(f"{count} {name}" for name, count in known.items()) if len(known) > 1 else "".join(known)


@dataclass(frozen=True)
class Undisturbed:
    """A command that nobody disturbed: its results, how long it took, and the bytes that it needs on a disk."""

    results: Mapping[str, object]
    seconds: float
    size: int

    @classmethod
    def of(cls, command: Command, out: Path) -> Undisturbed:
        """Run the command, which must end well."""
        ended, page = command.run(out), os.sysconf("SC_PAGE_SIZE")
        results = command.results(out) if ended.status == 0 else {}
        assert results, f"{command.name} ends with {ended.status}: {ended.said[-2000:]}"
        sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
        return cls(results, ended.seconds, sum(-(-size // page) * page for size in sizes))


def stops(
    command: Command, whole: Undisturbed, folder: Path, moments: int, number: int = signal.SIGKILL, seed: int = 0
) -> Outcomes:
    """Send a command a signal at random moments, and run it again to its end each time.

    The end is that of a command that nobody stopped. SIGTERM and SIGINT end it within ``SOON`` seconds, with a sentence
    and the exit status of the signal.
    """
    draw, outcomes = random.Random(seed), Outcomes()
    for moment in range(moments):
        out, end = folder / f"stopped-{moment}", time.monotonic() + draw.uniform(0.05, whole.seconds)
        stopped = command.run(out, lambda end=end: time.monotonic() >= end, number)  # type: ignore[misc]
        problem = None if number == signal.SIGKILL else _ending(stopped, number)
        again = command.run(out)
        if again.status or command.results(out) != whole.results:
            problem = f"exit status {again.status}: {again.said[-500:]}"
        elif left := [path for path in out.rglob("*") if ".partial" in path.name]:
            problem = f"temporary files are left: {left}"
        if problem is None:
            outcomes.same += 1
            shutil.rmtree(out)
        else:
            outcomes.wrong.append(f"{command.name}, moment {moment}: {problem}")
    return outcomes


def _ending(stopped: Ended, number: int) -> str | None:
    """Return what is wrong with the end of a command that was told to stop, or None."""
    if stopped.status not in (0, 128 + number):
        return f"exit status {stopped.status} after signal {number}: {stopped.said[-500:]}"
    if stopped.status and (stopped.seconds > SOON or "stopped by" not in stopped.said or "Traceback" in stopped.said):
        return f"{stopped.seconds:.1f} s after signal {number}: {stopped.said[-500:]}"
    return None


def flipped(content: bytes, draw: random.Random) -> bytes:
    """Return the content with one bit flipped."""
    changed, bit = bytearray(content), draw.randrange(8 * len(content))
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    """Return the beginning of the content."""
    return content[: draw.randrange(len(content))]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {"a flipped bit": flipped, "a cut": cut}


def damage(command: Command, before: Path, files: Sequence[Path], times: int, how: str, seed: int = 0) -> Outcomes:
    """Damage one file of a folder at a time, and run the command again.

    It ends as without the damage, or it is refused in one sentence.

    Args:
        command: The command whose folder it is.
        before: The folder, as a kill or the end of the command left it.
        files: The files, inside of it.
        times: How often each file is damaged.
        how: A key of ``DAMAGE``.
        seed: The seed of the places.
    """
    undamaged = before.with_name(before.name + "-undamaged")
    shutil.copytree(before, undamaged)
    expected, draw, outcomes = Undisturbed.of(command, undamaged).results, random.Random(seed), Outcomes()
    for path in files:
        for _ in range(times):
            out = before.with_name(before.name + "-damaged")
            shutil.copytree(before, out)
            target = out / path.relative_to(before)
            target.write_bytes(DAMAGE[how](target.read_bytes(), draw))
            ended = command.run(out)
            if ended.status == 0 and command.results(out) == expected:
                outcomes.same += 1
            elif ended.refused:
                outcomes.refused += 1
            else:
                outcomes.wrong.append(
                    f"{command.name}, {how} in {path.relative_to(before)}: exit status {ended.status}: "
                    f"{ended.said[-500:]}"
                )
            shutil.rmtree(out)
    return outcomes


def may_mount() -> bool:
    """Whether this process may mount file systems, as root may on Linux."""
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a disk of ``size`` bytes in memory on a new folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def full_disks(command: Command, whole: Undisturbed, folder: Path, times: int, seed: int = 0) -> Outcomes:
    """Run a command on disks that are too small for it, then make room and run it again to its end."""
    draw, outcomes = random.Random(seed), Outcomes()
    for number in range(times):
        size = round(draw.uniform(0.02, 0.9) * whole.size)
        with small_disk(folder / f"disk-{number}", size) as disk:
            full = command.run(disk / "out")
            subprocess.run(["mount", "-o", f"remount,size={8 * whole.size + 2**26}", disk], check=True)
            again = command.run(disk / "out")
            results = command.results(disk / "out") if again.status == 0 else None
        if not (full.status == 0 or (full.refused and full.status == 1)):
            outcomes.wrong.append(f"{command.name}, {size:,} bytes: exit status {full.status}: {full.said[-1000:]}")
        elif results != whole.results:
            outcomes.wrong.append(f"{command.name}, {size:,} bytes, then room: {again.status}: {again.said[-500:]}")
        else:
            outcomes.same += 1
    return outcomes
