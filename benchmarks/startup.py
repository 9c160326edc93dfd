"""Seconds that the light commands of ``ddil`` take from the shell: start, imports, work, end.

    python -m benchmarks.startup [--rounds 3] [--csv FILE]

Each command runs in a new process, in alternation with the others. The clock's seconds are what a user waits for. The
CPU seconds are less disturbed by other work on the machine. The limit of all is Python's own start, the first row. The
limit of ``doctor`` is the import of torch, the last row, as only torch knows the devices.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd

from benchmarks import ROOT
from benchmarks.alternation import compare
from benchmarks.claims import Claim
from benchmarks.printing import show

DDIL = ("-m", "ddil_eval.cli")
COMMANDS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "python": (("-c", ""), None),
    "ddil --help": ((*DDIL, "--help"), 0.3),
    "ddil report": ((*DDIL, "report", "--results", str(ROOT / "results" / "shapes")), 1.0),
    "ddil models": ((*DDIL, "models"), 1.0),
    "ddil data": ((*DDIL, "data"), 1.0),
    "ddil metrics": ((*DDIL, "metrics"), 1.0),
    "ddil doctor": ((*DDIL, "doctor"), 3.0),
    "import torch": (("-c", "import torch"), None),
}
"""Arguments of Python, and the bar in seconds of the clock, by the name of the command."""


def children() -> float:
    """Return the CPU seconds of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def runner(arguments: tuple[str, ...], cpu: list[float]) -> Callable[[], None]:
    """Return a function that runs Python with these arguments, and notes the CPU seconds."""

    def work() -> None:
        before = children()
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
        cpu.append(children() - before)

    return work


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True, help="Runs of each command that are counted.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(rounds: int, csv_path: Path | None) -> None:
    cpu: dict[str, list[float]] = {name: [] for name in COMMANDS}
    times = compare(
        {name: runner(arguments, cpu[name]) for name, (arguments, _) in COMMANDS.items()}, rounds=rounds, clock="wall"
    )
    rows = [
        {
            "command": name,
            "seconds": statistics.median(times[name]),
            "least_s": min(times[name]),
            "most_s": max(times[name]),
            "cpu_s": statistics.median(cpu[name][1:]),
            "bar_s": bar,
        }
        for name, (_, bar) in COMMANDS.items()
    ]
    show(pd.DataFrame(rows), csv_path, ".3f")


def summary(frame: pd.DataFrame) -> list[Claim]:
    """Return a claim for each command: its seconds of the clock against the bar."""
    barred = frame.dropna(subset="bar_s")
    return [Claim(f"{row.command}, seconds", row.seconds, bar=row.bar_s) for row in barred.itertuples()]


if __name__ == "__main__":
    main()
