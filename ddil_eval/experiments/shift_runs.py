"""The runs of the covariate-shift analysis: a string for each prompt, the cost, and the effects of the factorial."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from ddil_core.diffusion.rollout import STUDENT, TEACHER, Actor, all_strings, strings_at
from ddil_core.diffusion.schedule import Time
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import content_hash
from ddil_eval.report.cells import MOST_TRANSITIONS


@dataclass(frozen=True)
class ShiftRun:
    """One cell of the analysis.

    Attributes:
        cell: What the record's cell holds.
        strings: The string of each prompt, such as "TTSS".
    """

    cell: dict[str, Any]
    strings: list[str]

    @property
    def key(self) -> str:
        """A name for the run."""
        return content_hash(self.cell)


def shift_runs(
    p_teacher: Sequence[float], switch: Sequence[Time], factorial: bool, grid: Sequence[Time], draws: Tensor
) -> list[ShiftRun]:
    """Return the runs of an analysis, each once.

    Args:
        p_teacher: Rates at which the teacher acts (Table 2).
        switch: Times at which one model hands over to the other (Tables 3 and 4).
        factorial: Add a run for each string.
        grid: The student's K times.
        draws: The decisions u [N, K] of the N prompts, in [0, 1).

    Raises:
        WrongCommand: a switch time is not an inner point of the student's grid, or the factorial has too many strings.
    """
    count, length = draws.shape
    if factorial and length > MOST_TRANSITIONS:
        raise WrongCommand(
            f"the factorial of a student of {length} steps has 2^{length} strings, and at most 2^{MOST_TRANSITIONS} "
            "can be run; leave --factorial out, or take a student of fewer steps"
        )
    runs = [
        ShiftRun({"kind": "pure", "model": "teacher"}, [TEACHER * length] * count),
        ShiftRun({"kind": "pure", "model": "student"}, [STUDENT * length] * count),
    ]
    runs += [ShiftRun({"kind": "p_teacher", "p_teacher": p}, strings_at(p, draws)) for p in p_teacher]
    for kind, first, second in (("teacher_then_student", TEACHER, STUDENT), ("student_then_teacher", STUDENT, TEACHER)):
        for time in switch:
            string = switched_string(first, second, time, grid)
            runs.append(ShiftRun({"kind": kind, "switch_t": time}, [string] * count))
    if factorial:
        runs += [ShiftRun({"kind": "string", "string": string}, [string] * count) for string in all_strings(length)]
    return list({run.key: run for run in runs}.values())  # a rate that is given twice is one cell


def switched_string(first: str, second: str, time: Time, grid: Sequence[Time]) -> str:
    """Return the string in which ``first`` acts until ``time`` and ``second`` from there on.

    Raises:
        WrongCommand: the time is not an inner point of the student's grid.
    """
    if time not in grid[1:]:
        raise WrongCommand(
            f"the switch time {time} is not on the student's grid, where one model can hand over to the other: "
            f"it may be {', '.join(map(str, grid[1:]))}"
        )
    before = list(grid).index(time)
    return first * before + second * (len(grid) - before)


def mean_nfe(run: ShiftRun, actors: Mapping[str, Actor]) -> float:
    """Return the network evaluations of a run by itself, as a mean over its prompts."""
    return float(np.mean([sum(actors[a].nfe[k] for k, a in enumerate(string)) for string in run.strings]))


def tree_cost(evaluations: Mapping[str, int], nfe: Mapping[str, float], count: int) -> dict[str, float]:
    """Return the network evaluations a prompt: of all runs in one tree, of each run by itself, and their ratio.

    Args:
        evaluations: The evaluations of the tree, by actor.
        nfe: The evaluations a prompt of each run by itself.
        count: The number of prompts.
    """
    shared, alone = sum(evaluations.values()) / count, sum(nfe.values())
    return {"shared": shared, "alone": alone, "share": shared / alone}


def effect_contrasts(runs: Sequence[ShiftRun], length: int) -> dict[str, np.ndarray]:
    """Return the weights over the runs for every main effect and pairwise interaction of a 2^K factorial.

    Let x be 1 where the student acts and −1 where the teacher does. The effect of a set of transitions is the mean of
    the strings in which the product of x is 1, less the mean of the others.

    Args:
        runs: All runs of the analysis; those without a string of the factorial get the weight 0.
        length: The number K of transitions.

    Returns:
        Weights [runs], by the transitions as JSON.
    """
    strings = [run.cell.get("string") for run in runs]
    contrasts = {}
    for order in (1, 2):
        for transitions in combinations(range(length), order):
            signs = [0 if s is None else np.prod([1 if s[k] == STUDENT else -1 for k in transitions]) for s in strings]
            contrasts[json.dumps(transitions)] = np.array(signs) / 2 ** (length - 1)
    return contrasts
