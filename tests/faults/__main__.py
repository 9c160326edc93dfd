"""Run the long form: ``make faults``, or ``python -m tests.faults --moments 5 --only pd``.

Each row of the table is printed when it is done. ``--write FILE`` also puts the rows into the table of a page.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import ddil_eval.cli.demo
import ddil_eval.cli.distill
import ddil_eval.cli.report
import ddil_eval.experiments.covariate_shift
import ddil_eval.experiments.drift
import ddil_eval.experiments.prompt_inversion
import ddil_eval.experiments.score
import ddil_eval.experiments.systems
import ddil_eval.study.study  # noqa: F401
from ddil_core.distillation.distill import distill  # noqa: F401
from tests.faults.commands import commands
from tests.faults.harness import DAMAGE, Command, Outcomes, Undisturbed, damage, full_disks, may_mount, stops
from tests.faults.scenes import Scene, scenes
from tests.pipelines import STUDENT, TEACHER, save_pipeline

STOPS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
HEAD = "| fault | times | outcome |\n|---|---:|---|"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20, help="kills of each command")
    parser.add_argument("--signals", type=int, default=5, help="SIGTERM and Ctrl-C, each, of each command")
    parser.add_argument("--disks", type=int, default=5, help="full disks for each command; needs root")
    parser.add_argument("--times", type=int, default=3, help="damages of each kind to each file")
    parser.add_argument("--files", type=int, default=99, help="at most so many files of a folder")
    parser.add_argument("--only", action="append", default=[], help="only rows whose fault contains this, or another")
    parser.add_argument("--write", type=Path, help="a page whose table gets the rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    wrong = list[str]()
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="ddil-faults-") as name:
        for fault, times, outcomes, same in _rows(Path(name), given):
            row = f"| {fault} | {times} | {outcomes.words(same)} |"
            print(row, flush=True)
            wrong += outcomes.wrong
            print("\n".join(outcomes.wrong), file=sys.stderr, flush=True)
            if given.write is not None:
                write_row(given.write, fault, row)
    return bool(wrong)


def _rows(folder: Path, given: argparse.Namespace) -> Iterator[tuple[str, int, Outcomes, str]]:
    """Yield the fault, how often it was tried, its outcomes, and what a good end is called."""
    os.environ["DDIL_CACHE"] = str(folder / "cache")
    os.environ["PWD"] = str(folder)
    pipelines = {
        key: save_pipeline(folder / key, sampling, seed=seed)
        for seed, (key, sampling) in enumerate({"teacher": TEACHER, "student": STUDENT}.items(), 1)
    }
    (folder / "a").mkdir()
    for command in commands(folder / "a", **pipelines):
        yield from _disturbed(command, folder, given)
    (folder / "b").mkdir()
    for scene in scenes(folder / "b", **pipelines):
        yield from _damaged(scene, folder, given)


def _is_asked(fault: str, given: argparse.Namespace) -> bool:
    return not given.only or any(part in fault for part in given.only)


def _disturbed(command: Command, folder: Path, given: argparse.Namespace) -> Iterator[tuple[str, int, Outcomes, str]]:
    place = folder / command.name.replace(" ", "-")
    asked = {"kill -9": given.moments, "SIGTERM": given.signals, "Ctrl-C": given.signals}
    signals = {f"{what} of `{command.name}`": (STOPS[what], times) for what, times in asked.items() if times}
    signals = {fault: row for fault, row in signals.items() if command.goes_on and _is_asked(fault, given)}
    full = f"a full disk in `{command.name}`"
    disks = given.disks if _is_asked(full, given) and may_mount() else 0
    if not (signals or disks):
        return
    place.mkdir()
    whole = Undisturbed.of(command, place / "whole")
    for fault, (number, times) in signals.items():
        yield fault, times, stops(command, whole, place, times, number), "the same result"
    if disks:
        yield full, disks, full_disks(command, whole, place, disks), "a sentence, then the same result"


def _damaged(scene: Scene, folder: Path, given: argparse.Namespace) -> Iterator[tuple[str, int, Outcomes, str]]:
    for how in DAMAGE:
        fault = f"{how} in each file: {scene.what}"
        if not (given.times and _is_asked(fault, given)):
            continue
        out = folder / f"{how} {scene.what}".replace(" ", "-").replace("`", "")
        scene.make(out)
        files = scene.files(out)
        assert files
        files = random.Random(0).sample(files, min(given.files, len(files)))
        yield fault, len(files) * given.times, damage(scene.command, out, files, given.times, how), "the same result"


def write_row(page: Path, fault: str, row: str) -> None:
    """Put a row into the table of a page: in place of the row of the same fault, or at its end."""
    before, head, after = page.read_text(encoding="utf-8").partition(HEAD + "\n")
    assert head
    lines = after.split("\n")
    count = next(number for number, line in enumerate([*lines, ""]) if not line.startswith("|"))
    rows, rest = lines[:count], lines[count:]
    same = [number for number, line in enumerate(rows) if line.startswith(f"| {fault} | ")]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    page.write_text(before + head + "\n".join([*rows, *rest]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
