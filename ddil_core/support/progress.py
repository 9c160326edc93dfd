"""Progress and warnings on stderr: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from ddil_core.support import ranks
from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import shown
from ddil_core.support.text import one_line

console = Console(stderr=True)
_said: set[str] = set()

INTERVAL = "DDIL_PROGRESS_EVERY"
"""The environment variable with the seconds between two lines where stderr is no terminal; 0 prints no lines."""
EVERY, FIRST = 60.0, 10.0
"""The default interval in seconds, and the time of a stage's first line where the interval is not shorter."""


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, show neither progress nor notes. Warnings stay."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def warn(sentence: str) -> None:
    """Print a warning on stderr. Of several processes, only the main one prints."""
    if ranks.is_main():
        print(f"warning: {one_line(sentence)}", file=sys.stderr)


def note(sentence: str) -> None:
    """Print a line on stderr. Of several processes, only the main one prints."""
    if ranks.is_main() and not console.quiet:
        print(one_line(sentence), file=sys.stderr)


def warn_once(sentence: str) -> None:
    """Print a warning as ``warn`` does, but only once in a process."""
    if sentence not in _said:
        _said.add(sentence)
        warn(sentence)


def memory() -> str:
    """Return the memory in use: the resident set of the process, and the peak of the GPU where one is used."""
    text = f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        text += f" + {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
    return text


def rate(speed: float | None) -> str:
    """Return steps per second, or seconds per step for slow steps; a dash where the speed is not known."""
    if not speed:
        return "–"
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


class RateColumn(ProgressColumn):
    """Steps per second, or seconds per step for slow steps."""

    def render(self, task: Task) -> Text:
        return Text(rate(task.finished_speed or task.speed))


class LeftColumn(ProgressColumn):
    """The time that is left, as the stage itself knows it."""

    def __init__(self, left: Callable[[], float]) -> None:
        super().__init__(Column(no_wrap=True))
        self._left = left

    def render(self, task: Task) -> Text:
        return Text("" if task.finished else f"{clock_text(self._left())} left")


class MemoryColumn(ProgressColumn):
    """Memory in use: the resident set of the process, and the peak of the GPU where one is used."""

    max_refresh = 2.0

    def render(self, task: Task) -> Text:
        return Text(memory())


def interval() -> float:
    """Return the seconds between two lines of progress, from ``DDIL_PROGRESS_EVERY``.

    Raises:
        WrongCommand: the variable holds no number from 0 to 10,000,000.
    """
    text = os.environ.get(INTERVAL, "")
    try:
        seconds = float(text or EVERY)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e7:  # NaN fails this too
        raise WrongCommand(
            f"the environment variable {INTERVAL} holds {shown(text)}, and it takes the seconds between two lines of "
            "progress, such as 60; 0 prints none"
        )
    return seconds


def clock_text(seconds: float) -> str:
    """Write a time as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def mebibytes(number: float) -> str:
    """Write a number of bytes in MiB."""
    return f"{number / 2**20:,.1f} MiB"


def shows_bars() -> bool:
    """Whether stderr shows bars: it is a terminal that can move its cursor, or a notebook."""
    return console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)


@dataclass
class ProgressLines:
    """Writes a line now and then about the progress of a stage, for logs and other places that are no terminal.

    Attributes:
        title: The name of the stage.
        total: The number of steps.
        done: The number of finished steps.
        every: The seconds between two lines.
        write: Takes each line.
        clock: Returns the time in seconds.
        count_text: Writes a number of steps.
        rate_text: Writes a number of steps per second; None where it is not known.
        note: What the stage says of itself.
        left: Returns the seconds that are left. None takes the rate of the steps so far.
    """

    title: str
    total: int
    done: int
    every: float
    write: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    count_text: Callable[[int], str] = "{:,}".format
    rate_text: Callable[[float | None], str] = rate
    note: str = ""
    left: Callable[[], float] | None = None
    _done_before: int = field(init=False)
    _started: float = field(init=False)
    _due: float = field(init=False)
    _written: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._done_before, self._started = self.done, self.clock()
        self._due = self._started + min(FIRST, self.every)

    def wait(self) -> float:
        """Return the seconds until the next line is due."""
        return max(0.0, self._due - self.clock())

    def tick(self) -> None:
        """Write a line if one is due."""
        now = self.clock()
        if now >= self._due:
            self._due = now + self.every
            self._written = True
            self.write(self.line(now))

    def finish(self) -> None:
        """Write the last line of a stage that has written lines, so that a log says when it ended."""
        if self._written:
            self.write(self.line(self.clock()))

    def line(self, now: float) -> str:
        """Return the line: count, share, rate, time so far, time left, memory.

        A stage that knows itself how much time is left has unlike steps, made elsewhere: no rate, and no memory.
        """
        passed, steps = now - self._started, self.done - self._done_before
        speed = steps / passed if passed > 0 else None
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        count = f"{self.count_text(self.done)} of {self.count_text(self.total)}{share}"
        parts = [count, *([] if self.left else [self.rate_text(speed)]), f"{clock_text(passed)} so far"]
        if self.done < self.total:
            left = self.left() if self.left else (self.total - self.done) / speed if speed else None
            parts.append("time left not known yet" if left is None else f"{clock_text(left)} left")
        parts += [] if self.left else [memory()]
        return f"{self.title}: {', '.join(parts)}" + (f", {self.note}" if self.note else "")


def _write_line(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


@contextmanager
def _ticking(lines: ProgressLines) -> Iterator[None]:
    """Write the lines in a thread of their own, so that a long step does not hold them up."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(lines.wait()):
            lines.tick()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    if lines.every:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if lines.every:
            thread.join()
            lines.finish()


@contextmanager
def progress(
    title: str, total: int, done: int = 0, left: Callable[[], float] | None = None
) -> Iterator[Callable[..., None]]:
    """Show the progress of ``total`` steps that starts at ``done``. Yields ``advance(n=1, note="")``.

    ``left`` returns the seconds that are left, for a stage whose steps are so unlike that their rate says nothing. A
    terminal shows a bar. Elsewhere a line is written after 10 seconds and then every minute (``ProgressLines``).
    ``DDIL_PROGRESS_EVERY`` sets another interval. Of several processes, the main one shows its own share.

    Raises:
        WrongCommand: ``DDIL_PROGRESS_EVERY`` is no number of seconds.
    """
    if not shows_bars():
        every = interval() if ranks.is_main() and not console.quiet else 0.0
        lines = ProgressLines(title, total, done, every, _write_line, left=left)

        def count(n: int = 1, note: str | None = None) -> None:
            lines.done += n
            lines.note = lines.note if note is None else note

        with _ticking(lines):
            yield count
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),  # of the columns the bar shrinks first
        *([RateColumn(), TimeRemainingColumn(), MemoryColumn()] if left is None else [LeftColumn(left)]),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=console.quiet or not ranks.is_main()) as bar:
        task = bar.add_task(one_line(title), total=total, completed=done, note="")

        def advance(n: int = 1, note: str | None = None) -> None:
            if note is not None:
                bar.update(task, note=one_line(note))
            bar.advance(task, n)

        yield advance


@contextmanager
def transfer(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a download of ``total`` bytes as ``progress`` does. Yields ``advance(n)``; a negative n takes bytes back."""
    if not shows_bars():
        lines = ProgressLines(title, total, 0, 0.0 if console.quiet else interval(), _write_line)
        lines.count_text, lines.rate_text = mebibytes, lambda speed: f"{mebibytes(speed or 0)}/s"

        def count(n: int) -> None:
            lines.done += n

        with _ticking(lines):
            yield count
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console.quiet) as bar:
        task = bar.add_task(one_line(title), total=total)
        yield lambda n: bar.advance(task, n)
