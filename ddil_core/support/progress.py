"""A progress bar for long work, on stderr: rate, time left, memory."""

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
    """One line on stderr, of something that a user should know and that stops nothing; of several processes one says it."""
    if ranks.is_main():
        print(f"warning: {sentence}", file=sys.stderr)


def warn_once(sentence: str) -> None:
    """Like ``warn``, once a process: for what is looked at several times in one command."""
    if sentence not in _said:
        _said.add(sentence)
        warn(sentence)


class RateColumn(ProgressColumn):
    """Steps a second, or seconds a step where that is the larger number."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("–")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class MemoryColumn(ProgressColumn):
    """Memory in use: the process's resident set, and the GPU's peak where one is used."""

    max_refresh = 2.0

    def render(self, task: Task) -> Text:
        import torch

        text = f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
        if torch.cuda.is_initialized():
            text += f" + {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
        return Text(text)


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a bar for ``total`` steps, of which ``done`` are done already; yields ``advance(n=1, note="")``.

    Of several processes the main one shows its own share.
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
    """Show a bar for ``total`` bytes to fetch; yields ``advance(n)``, which takes back what came in vain where n < 0."""
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
