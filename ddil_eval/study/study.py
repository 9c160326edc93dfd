"""Run a study: all units in parallel, then the analysis of those that are there."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ddil_core.models.model import load_model
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.lock import held
from ddil_core.support.progress import clock_text, note, progress, warn
from ddil_eval.report.comparisons import LEVEL
from ddil_eval.study.config import StudyConfig
from ddil_eval.study.matrix import Unit, conditions_of, units_of
from ddil_eval.study.page import heading
from ddil_eval.study.records import UnitRecord, read_unit, record_path
from ddil_eval.study.unit import run_unit
from ddil_eval.study.workers import run_tasks


def run_study(config: StudyConfig, out: Path, jobs: int, device: str = "cpu") -> list[str]:
    """Do the units that are missing, and write the tables, the figure and the page of those that are there.

    Args:
        config: The study.
        out: Its folder. Finished units in it are not done again.
        jobs: The number of worker processes.
        device: Where networks are evaluated.

    Returns:
        The failed units, each with its cause, in sentences.

    Raises:
        WrongCommand: a condition does not fit its method or its teacher, or the folder has the page of another study.
        DdilError: a record is damaged or of another teacher, or another command works in the folder.
        Interrupted: a signal came. Finished units and checkpoints are kept.
    """
    units = units_of(config)
    with held(out):
        if (reason := too_few_seeds(config, units)) is not None:
            warn(reason)
        _require_own_page(config, out)
        teacher = load_model(config.teacher, "cpu").weights_sha256()
        done = _done(units, out, teacher)  # damaged records are refused before hours of work
        missing = [unit for unit in units if unit not in done]
        note(f"{describe(config, units)}; {len(units) - len(missing)} of them are done")
        failed = _run_missing(config, units, missing, out, jobs, device)
        _analyse(config, units, out, _done(units, out, teacher))
    return failed


def _require_own_page(config: StudyConfig, out: Path) -> None:
    """Refuse a folder with the page of a study of another title, which this study would replace.

    Raises:
        WrongCommand: the folder has such a page.
    """
    page = out / "study" / "README.md"
    if not page.is_file():
        return
    first = page.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    if first != heading(config.title):
        raise WrongCommand(
            f"{out} holds the results of the study {first.removeprefix('# ')!r}, which this one would replace; choose "
            "another --out"
        )


def describe(config: StudyConfig, units: Sequence[Unit]) -> str:
    """Say in words how many units a study has."""
    conditions, seeds = len(list(conditions_of(config))), len(config.seed_list())
    cells = len(units) // (conditions * seeds)
    return (
        f"{len(units):,} units: {conditions} condition{'s' * (conditions > 1)} x {cells} sources and shares x {seeds} "
        "seeds"
    )


def too_few_seeds(config: StudyConfig, units: Sequence[Unit]) -> str | None:
    """Return why no test of a study can be significant, or None where one can.

    The sign-flip test of n seeds has no p-value below 2^(1−n), and Holm's method multiplies the smallest p-value by the
    number of tests.
    """
    first = [unit for unit in units if unit.seed == units[0].seed and unit.cell.source != config.baseline]
    tests = sum(len(config.measure.tested) * _students(unit) for unit in first)
    needed = 1 + math.floor(math.log2(tests / LEVEL)) + 1
    seeds = len(config.seed_list())
    if seeds >= needed:
        return None
    return (
        f"none of the {tests} tests can be significant with {seeds} seeds, since their smallest corrected p-value is "
        f"{min(tests * 2.0 ** (1 - seeds), 1):.2g}; take at least {needed} seeds, or fewer tests"
    )


def _students(unit: Unit) -> int:
    """Return how many students of a unit are measured."""
    return len(getattr(unit.config, "stages", [1])) if getattr(unit.config, "keep_stages", False) else 1


def matrix_lines(config: StudyConfig, units: Sequence[Unit]) -> list[str]:
    """Return a line for each cell of the matrix: its updates are fixed by its budget, and its teacher evaluations."""
    model = load_model(config.teacher, "cpu")
    lines = []
    for unit in units:
        if unit.seed == config.seed_list()[0]:
            nfe = unit.within_budget(model)[1]
            cost = "not counted" if nfe is None else f"{nfe:,}"
            lines.append(f"{unit.cell.words()}: {cost} teacher evaluations a seed")
    return lines


def _run_missing(
    config: StudyConfig, units: Sequence[Unit], missing: Sequence[Unit], out: Path, jobs: int, device: str
) -> list[str]:
    """Do units in worker processes. Return the failed ones, each with its cause."""
    if not missing:
        return []
    failed: list[str] = []
    started, finished, jobs = time.monotonic(), 0, min(jobs, len(missing))
    work = partial(run_unit, out=out, device=device, keep_run=config.keep_runs)
    with progress("units", total=len(units), done=len(units) - len(missing)) as advance:
        for unit, error in run_tasks(missing, work, jobs, out / "logs"):
            finished += 1
            if error is not None:
                failed.append(f"{unit.words()}: {error}")
                warn(f"the unit {failed[-1]}")
            if finished == jobs and len(missing) > jobs:
                left = (time.monotonic() - started) * (len(missing) - finished) / finished
                note(f"the first {finished} units say that the rest takes about {clock_text(left)}")
            advance(1, f"{len(failed)} failed" if failed else None)
    return failed


def _done(units: Sequence[Unit], out: Path, teacher: str) -> dict[Unit, UnitRecord]:
    """Return the records of the units that are done. ``teacher`` is the hash of the teacher's weights.

    Raises:
        DdilError: a record is damaged, or of other weights of the teacher.
    """
    done = {unit: record for unit in units if (record := read_unit(out, unit)) is not None}
    others = [record_path(out, unit) for unit, record in done.items() if record.teacher_sha256 not in (None, teacher)]
    if others:
        raise DdilError(
            f"{len(others):,} of {len(done):,} records are of other weights of the teacher "
            f"{units[0].study['teacher']}, first {others[0]}; delete them, and the same command "
            "measures their units again, or choose another --out"
        )
    return done


def _analyse(config: StudyConfig, units: Sequence[Unit], out: Path, done: Mapping[Unit, UnitRecord]) -> None:
    """Write the tables, the figures and the page of the units that are done."""
    from ddil_eval.study.outputs import write_outputs

    if len({unit.seed for unit in done}) < 2:
        warn("fewer than two seeds are done, so that there is nothing to compare yet")
        return
    write_outputs(config, len(units), done, out / "study")
