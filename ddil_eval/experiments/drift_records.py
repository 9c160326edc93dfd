"""The numbers of the drift experiment and its records: of each student, of two students, and of groups of students."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.data.base import DataSet
from ddil_core.diffusion.rollout import STUDENT, TEACHER
from ddil_eval.experiments.drift_config import ALL, EXPERIMENT, NOT_HASHED, DriftConfig
from ddil_eval.experiments.drift_states import KINDS, Drifting
from ddil_eval.experiments.image_sources import slug
from ddil_eval.experiments.prompts import Prompts
from ddil_eval.experiments.reference_images import split_of
from ddil_eval.experiments.results import RecordWriter, figures_folder, keep_protocol
from ddil_eval.features.storage import Arrays
from ddil_eval.report import drift_figure
from ddil_eval.report.records import Direction, Record, RecordedMetric, RecordedModel
from ddil_eval.statistics import Estimate, estimate_mean
from ddil_eval.statistics.estimate import against_zero
from ddil_eval.statistics.two_sample import compare_states, exponential, log_ratio_scores
from ddil_eval.statistics.two_way import two_way

_HIGHER = ("commitment",)


@dataclass(frozen=True)
class Drift:
    """What was measured of one student.

    Attributes:
        pair: Teacher and student.
        arrays: What ``measure_states`` returns, for all prompts.
    """

    pair: Drifting
    arrays: Arrays

    def errors(self, kind: str, place: int | str, name: str = "disagreement") -> np.ndarray:
        """Return the errors [N] on states of a kind: of transition ``place``, or the mean over all transitions."""
        errors: np.ndarray = self.arrays[f"{name} {kind}"].astype(np.float64)
        return errors.mean(axis=1) if place == ALL else errors[:, int(place)]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the student's errors."""
        return ("disagreement", "end_disagreement") if self.pair.stochastic else ("disagreement",)

    @property
    def places(self) -> list[int | str]:
        return [*range(len(self.pair.grid)), ALL]


def scores(drift: Drift, place: int | str) -> dict[str, np.ndarray]:
    """Return a score [N] for each prompt, at a transition or at all: the disagreements, and the logarithms of ratios.

    ``shift_ratio`` is the disagreement on the student's own states over that on data, ``rollout_ratio`` over that on
    the teacher's states. Where a student equals its teacher there are no ratios.
    """
    found = {f"{name}_{kind}": drift.errors(kind, place, name) for name in drift.names for kind in KINDS}
    for name in drift.names:
        for ratio, below in (("shift_ratio", "data"), ("rollout_ratio", "teacher")):
            pair = [found[f"{name}_{kind}"] for kind in ("student", below)]
            if min(errors.mean() for errors in pair) > _ROUNDING:
                found[f"log_{name.removesuffix('disagreement')}{ratio}"] = log_ratio_scores(*pair)
    return found


_ROUNDING = 1e-8
"""A mean squared error that float32 rounding alone makes: latents are of the order of 1."""


def disagreement_metrics(drift: Drift, place: int | str) -> dict[str, dict[str, Estimate]]:
    """Return the mean disagreements on the three kinds of states with their ratios, and the logarithms of the ratios.

    Both are estimates by name, by the kind of their record.
    """
    found = scores(drift, place)
    means = {name: _mean(one) for name, one in found.items() if not name.startswith("log_")}
    logarithms = {name: against_zero(one) for name, one in found.items() if name.startswith("log_")}
    ratios = {name.removeprefix("log_"): exponential(one) for name, one in logarithms.items()}
    return {"drift": means | ratios} | ({"drift-ratios": logarithms} if logarithms else {})


def state_metrics(drift: Drift, place: int, seed: int) -> dict[str, Estimate]:
    """Return how far the student's states are from data and from the teacher's states, at a transition."""
    own = drift.arrays["states student"][:, place]
    found: dict[str, Estimate] = {}
    for kind in ("data", "teacher"):
        compared = compare_states(own, drift.arrays[f"states {kind}"][:, place], seed)
        found |= {f"{name}_{kind}": estimate for name, estimate in compared.items()}
    return found


def path_metrics(drift: Drift, place: int) -> dict[str, Estimate]:
    """Return the distance of the two trajectories after a transition, and how far each is committed to its end.

    Commitment (cf. 2503.10637) is the share of the end's variance over the prompts that x̂ explains: 1 − E‖x̂ − z_0‖² /
    E‖z_0 − E z_0‖². That of the student is 1 at the last transition, where x̂ is the end.
    """
    found = {"distance": _mean(drift.arrays["distance"][:, place].astype(np.float64))}
    for kind in ("teacher", "student"):
        ends = drift.arrays[f"end {kind}"].astype(np.float64).reshape(len(drift.arrays["distance"]), -1)
        spread = np.square(ends - ends.mean(axis=0)).mean()
        errors = drift.arrays[f"open {kind}"][:, place].astype(np.float64)
        explained = 1 - errors / max(float(spread), np.finfo(np.float64).tiny)
        found[f"commitment_{kind}"] = _mean(explained, lowest=-np.inf, highest=1.0)
    return found


def differences(first: Drift, second: Drift, place: int | str) -> dict[str, np.ndarray]:
    """Return how much the scores [N] of a first student exceed those of a second one, by their names."""
    one, other = scores(first, place), scores(second, place)
    return {name: one[name] - other[name] for name in one if name in other}


def _mean(scores: np.ndarray, *, lowest: float = 0.0, highest: float = np.inf) -> Estimate:
    """Estimate the mean of scores [N], whose interval keeps their bounds."""
    return estimate_mean(scores[:, None], np.ones(1), lowest=lowest, highest=highest)


def group_metrics(found: Sequence[Mapping[str, np.ndarray]], *, difference: bool) -> dict[str, dict[str, Estimate]]:
    """Estimate the means of scores over training seeds and prompts (``statistics.two_way``).

    Args:
        found: For each seed, scores [N] by name.
        difference: Whether the scores are differences of two students of a seed.

    Returns:
        Estimates by name: the means, and the standard deviations of the means of seeds and of prompts.
    """
    names = [name for name in found[0] if all(name in one for one in found)]
    both = {name: two_way(np.stack([one[name] for one in found]), difference=difference) for name in names}
    means = {name: one.mean for name, one in both.items()}
    if not difference:
        means = {
            name.removeprefix("log_"): exponential(one) if name.startswith("log_") else one
            for name, one in means.items()
        }
    seeds = {f"{name}_sd_seeds": one.seeds for name, one in both.items()}
    return {"means": means, "spreads": seeds | {f"{name}_sd_prompts": one.prompts for name, one in both.items()}}


def _recorded(estimates: Mapping[str, Estimate]) -> dict[str, RecordedMetric]:
    found = {}
    for name, estimate in estimates.items():
        direction: Direction = "higher" if name.startswith(_HIGHER) else "lower"
        found[name] = RecordedMetric.model_validate({"estimate": estimate, "direction": direction, "kind": "mean"})
    return found


def used_sampling(pairs: Sequence[Drifting]) -> dict[str, dict[str, Any]]:
    """Return the steps, the solver and the guidance scale of the teacher and of each student, for records."""
    students = {pair.student.reference: pair.sampling["student"] for pair in pairs}
    return {"teacher": pairs[0].sampling["teacher"], "students": students}


def save_drift(
    config: DriftConfig, found: Sequence[Drift], data: DataSet, prompts: Prompts, out: Path, device: str, started: float
) -> list[Record]:
    """Save the records of each student with its figure, those of each two students on the same grid, and of groups.

    Args:
        config: The configuration.
        found: What was measured of each student, in the order of ``config.all_students``.
        data: The data set.
        prompts: The prompts.
        out: The results folder.
        device: The device of this process.
        started: ``time.monotonic()`` at the start of the run.
    """
    writer = RecordWriter.of_run(
        out,
        experiment=EXPERIMENT,
        protocol=config.model_dump(mode="json") | {"sampling": used_sampling([drift.pair for drift in found])},
        not_hashed=NOT_HASHED,
        data={"reference": config.data, "split": split_of(data)} | prompts.described(),
        recipe="latents",
        count=config.num_prompts,
        device=device,
        started=started,
    )
    records = []
    figures = figures_folder(config, out)
    keep_protocol(config, figures)
    for drift in found:
        fields = _fields(config, {"teacher": drift, "student": drift})
        own = []
        for place in drift.places:
            for kind, estimates in _cells(drift, place, config.seed).items():
                own.append(writer.save(_cell(kind, drift, place), _recorded(estimates), **fields))
        drift_figure.draw(own, figures / f"{_figure_name(drift.pair.student.reference, config.all_students)}.png")
        records += own
    by_reference = {drift.pair.student.reference: drift for drift in found}
    for first, second in itertools.combinations([by_reference[one] for one in config.students], 2):
        if one_grid([first.pair, second.pair]):
            fields = _fields(config, {"teacher": first, "first": first, "second": second})
            for place in first.places:
                compared = {name: against_zero(one) for name, one in differences(first, second, place).items()}
                records.append(writer.save(_cell("drift-difference", first, place), _recorded(compared), **fields))
    return records + _save_groups(config, by_reference, writer, figures)


def _save_groups(config: DriftConfig, found: Mapping[str, Drift], writer: RecordWriter, figures: Path) -> list[Record]:
    """Save the records of each group, those of each two groups that are compared, and a figure of each grid."""
    groups = {name: [found[one] for one in students] for name, students in config.groups.items()}
    roles = {f"{name} {number}": one for name, group in groups.items() for number, one in enumerate(group, start=1)}
    records: list[Record] = []

    def save(kind: str, name: str, like: Drift, place: int | str, by_seed: list[dict[str, np.ndarray]]) -> None:
        estimated = group_metrics(by_seed, difference=kind == "difference")
        cell = {"t": ALL if place == ALL else like.pair.grid[int(place)], "name": name, "training_seeds": len(by_seed)}
        fields = _fields(config, {"teacher": like, **roles})
        for suffix, estimates in (("", estimated["means"]), ("-spread", estimated["spreads"])):
            kinds = {"kind": f"drift-group-{kind}{suffix}" if kind else f"drift-group{suffix}"}
            records.append(writer.save(kinds | cell, _recorded(estimates), **fields))

    for name, group in groups.items():
        for place in group[0].places:
            save("", name, group[0], place, [scores(one, place) for one in group])
    for pair in config.compared_groups:
        first, second = (groups[name] for name in pair)
        for place in first[0].places:
            compared = [differences(*two, place) for two in zip(first, second, strict=True)]
            save("difference", " − ".join(pair), first[0], place, compared)
    for grid in sorted({tuple(record.grid) for record in records}):
        own = [record for record in records if tuple(record.grid) == grid]
        names = [name for name, group in groups.items() if tuple(group[0].pair.grid) == grid]
        drift_figure.draw(own, figures / f"{slug('-'.join(names))}-{len(grid)}-steps.png")
    return records


def one_grid(pairs: Sequence[Drifting]) -> bool:
    """Return whether students take their steps at the same times and in the same way, so that they can be compared."""
    return all(pair.grid == pairs[0].grid and pair.stochastic == pairs[0].stochastic for pair in pairs)


def _figure_name(student: str, students: Sequence[str]) -> str:
    """Return the last part of a student's reference, or its place and all of it where others have the same part."""
    names = [slug(Path(other).name) for other in students]
    own = names[students.index(student)]
    return own if names.count(own) == 1 else f"{students.index(student) + 1}-{slug(student)}"


def _cells(drift: Drift, place: int | str, seed: int) -> dict[str, dict[str, Estimate]]:
    """Return the estimates of a transition, or of all together, by the kind of their record."""
    cells = disagreement_metrics(drift, place)
    if place == ALL:
        return cells
    states = state_metrics(drift, int(place), seed)
    errors = {name: estimate for name, estimate in states.items() if estimate.p_value is None}
    tested = {name: estimate for name, estimate in states.items() if name not in errors}
    return cells | {"drift-states": tested, "drift-paths": path_metrics(drift, int(place)) | errors}


def _cell(kind: str, drift: Drift, place: int | str) -> dict[str, Any]:
    return {"kind": kind, "t": ALL if place == ALL else drift.pair.grid[int(place)]}


def _fields(config: DriftConfig, roles: Mapping[str, Drift]) -> dict[str, Any]:
    """Return the fields of a record that say which models were measured, and how."""
    pair = next(iter(roles.values())).pair
    models = {role: drift.pair.teacher if role == "teacher" else drift.pair.student for role, drift in roles.items()}
    scale = pair.teacher.sampling.guidance_scale if config.guidance_scale is None else config.guidance_scale
    return {
        "systems": {
            role: RecordedModel(reference=model.reference, weights_sha256=model.weights_sha256())
            for role, model in models.items()
        },
        "solver": pair.student.sampling.solver if pair.stochastic else pair.actors[STUDENT].solver.name,
        "grid": pair.grid,
        "guidance_scale": scale,
        "reflection": "none",
        "compute": config.compute,
        "size": pair.teacher.image_size if pair.teacher.asked_size else None,
        "seeds": [config.seed],
        "nfe": float(sum(pair.actors[TEACHER].nfe) + sum(pair.actors[STUDENT].nfe)),
    }
