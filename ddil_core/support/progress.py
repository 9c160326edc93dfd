"""Progress bars and warnings on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
from rich.text import Text

from ddil_core.support import ranks

console = Console(stderr=True)
_said: set[str] = set()


def warn(sentence: str) -> None:
    """Print a warning on stderr. Of several processes, only the main one prints."""
    if ranks.is_main():
        print(f"warning: {sentence}", file=sys.stderr)


def note(sentence: str) -> None:
    """Print a line on stderr. Of several processes, only the main one prints."""
    if ranks.is_main():
        print(sentence, file=sys.stderr)


def warn_once(sentence: str) -> None:
    """Print a warning as ``warn`` does, but only once in a process."""
    if sentence not in _said:
        _said.add(sentence)
        warn(sentence)


class RateColumn(ProgressColumn):
    """Steps per second, or seconds per step for slow steps."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("–")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class MemoryColumn(ProgressColumn):
    """Memory in use: the resident set of the process, and the peak of the GPU where one is used."""

    max_refresh = 2.0

    def render(self, task: Task) -> Text:
        import torch

        text = f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
        if torch.cuda.is_initialized():
            text += f" + {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
        return Text(text)


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a bar for ``total`` steps that starts at ``done``. Yields ``advance(n=1, note="")``.

    Of several processes, the main one shows its own share.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        MemoryColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not ranks.is_main()) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(n: int = 1, note: str | None = None) -> None:
            if note is not None:
                bar.update(task, note=note)
            bar.advance(task, n)

        yield advance


@contextmanager
def transfer(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar for a download of ``total`` bytes. Yields ``advance(n)``; a negative n takes bytes back."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)
