"""Drift: covariate shift itself, transition by transition.

A student learns on one distribution of states and samples on another, its own. Its disagreement with the teacher under
its own states, over that under forward-diffused data, is the covariate-shift ratio: DAgger's quantity (Ross et al.,
1011.0686), loss under the learner's distribution over loss under the training distribution. Beside the ratio stand the
distance of the states themselves, the distance of the two trajectories, and how early each trajectory commits to its
end. All is paired by prompt and noise.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ddil_core.data.base import DataSet, Prompt
from ddil_core.data.datasets import open_data
from ddil_core.data.pool import image_side
from ddil_core.diffusion.rollout import STUDENT, TEACHER
from ddil_core.models.autoencoder import require_encoder
from ddil_core.models.generate import TRUNCATED
from ddil_core.models.model import load_model
from ddil_core.models.sampling import sampling_line
from ddil_core.support import ranks
from ddil_core.support.errors import WrongCommand
from ddil_core.support.lock import held_by_main
from ddil_core.support.progress import note, progress, warn
from ddil_core.support.protocol import GuidanceScale, Strict, content_hash
from ddil_eval.experiments.drift_states import KINDS, Drifting, measure_states, pair_models
from ddil_eval.experiments.image_sources import slug
from ddil_eval.experiments.prompts import Prompts, choose_prompts
from ddil_eval.experiments.reference_images import split_of
from ddil_eval.experiments.results import RecordWriter, code_sha256, hashed
from ddil_eval.experiments.targets import read_targets
from ddil_eval.features.storage import Arrays, cached_arrays, concatenate
from ddil_eval.report import drift_figure
from ddil_eval.report.records import Direction, Record, RecordedMetric, RecordedModel
from ddil_eval.statistics import Estimate, estimate_mean
from ddil_eval.statistics.moments import blocks
from ddil_eval.statistics.two_sample import FOLDS, compare_states, exponential, log_ratio

EXPERIMENT = "drift"
NOT_HASHED = frozenset({"teacher", "students", "batch_size", "sampling"})
ALL = "all"
"""The cell that takes all transitions together, as training does."""
_HIGHER = ("commitment",)


class DriftConfig(Strict):
    """The drift experiment as data.

    Attributes:
        experiment: The name of the experiment.
        teacher: The teacher's reference.
        students: The students' references; students on the same grid are compared with each other.
        data: The reference of the data set.
        teacher_steps: The number of the teacher's steps on its own grid.
        guidance_scale: The teacher's guidance scale. Defaults to the model's own.
        consistency_step: The length of the teacher's step in the consistency target of LCM's kind of students.
        num_prompts: The number of prompts, each with its image.
        batch_size: The number of prompts in a batch of the device, and between two points from which a stopped run
            goes on.
        seed: The seed of the noise.
    """

    experiment: Literal["drift"] = "drift"
    teacher: str = "shapes"
    students: tuple[str, ...] = ()
    data: str = "shapes"
    teacher_steps: int = Field(default=32, ge=1)
    guidance_scale: GuidanceScale | None = None
    consistency_step: int = Field(default=20, ge=1)
    num_prompts: int = Field(default=192, ge=FOLDS)
    batch_size: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)


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


def measure_drift(config: DriftConfig, out: Path, device: str = "cpu") -> list[Record]:
    """Measure every student, save its records below ``out``, and draw its figure.

    A stopped run goes on at the next batch of prompts. Of several processes each visits its share of the batches. The
    main process alone measures, saves and returns the records.

    Raises:
        WrongCommand: no student, or models that do not fit each other.
        DdilError: something is missing or damaged, or another command uses the folder.
    """
    started = time.monotonic()
    pairs = _load(config, device)
    teacher = pairs[0].teacher
    require_encoder(teacher.pipeline.vae, teacher.reference)
    data = open_data(config.data)
    prompts = choose_prompts(data, config.num_prompts, None)
    if cut := teacher.cut([prompt.text for prompt in prompts.prompts]):
        warn(TRUNCATED.format(cut, config.num_prompts))
    with held_by_main(out):
        found, folders = [], []
        for pair in pairs:
            folders.append(out / "partial" / _work_key(config, pair, prompts))
            _visit(config, pair, data, prompts.prompts, folders[-1])
            if ranks.is_main():
                starts = (part.start for part in blocks(config.num_prompts, config.batch_size))
                parts = (_batch(folders[-1], start) for start in starts)
                found.append(Drift(pair, concatenate([cached_arrays(path, dict) for path in parts])))
        if not ranks.is_main():
            return []
        described = {"reference": config.data, "split": split_of(data)} | prompts.described()
        records = _save(config, found, described, out, device, started)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    return records


def _load(config: DriftConfig, device: str) -> list[Drifting]:
    if not config.students:
        raise WrongCommand("drift needs a student; name one with --student, or with --set students=[REF]")
    if len(set(config.students)) < len(config.students):
        raise WrongCommand("a student stands twice; name each student once")
    teacher = load_model(config.teacher, device)
    settings = config.teacher_steps, config.guidance_scale, config.consistency_step
    pairs = [pair_models(teacher, load_model(student, device), *settings) for student in config.students]
    used = _used(pairs)
    for model, sampling in [(config.teacher, used["teacher"]), *used["students"].items()]:
        note(sampling_line(model, sampling))
    return pairs


def _used(pairs: Sequence[Drifting]) -> dict[str, dict[str, Any]]:
    """Return the steps, the solver and the guidance scale of the teacher and of each student, for records."""
    students = {pair.student.reference: pair.sampling["student"] for pair in pairs}
    return {"teacher": pairs[0].sampling["teacher"], "students": students}


def _work_key(config: DriftConfig, pair: Drifting, prompts: Prompts) -> str:
    """Hash all that finished batches depend on."""
    content = {
        "protocol": hashed(config.model_dump(mode="json"), ("teacher", "students")),
        "prompts": prompts.described(),
        "weights": [model.weights_sha256() for model in (pair.teacher, pair.student)],
        "code": code_sha256(),
    }
    return content_hash(content)[:16]


def _batch(work: Path, start: int) -> Path:
    return work / f"{start:06d}.npz"


def _visit(config: DriftConfig, pair: Drifting, data: DataSet, prompts: Sequence[Prompt], work: Path) -> None:
    """Visit the states of this process's share of the batches, and wait for the other processes."""
    images = read_targets(data, config.num_prompts, image_side(pair.teacher)).images
    parts = list(blocks(config.num_prompts, config.batch_size))
    share = [parts[index] for index in ranks.mine(len(parts))]
    total = sum(part.stop - part.start for part in share)
    with progress(f"states of {pair.student.reference}", total=total) as advance:
        for part in share:
            measure = partial(measure_states, pair, prompts[part], images[part], config.seed)
            cached_arrays(_batch(work, part.start), measure)
            advance(part.stop - part.start)
    ranks.barrier()


def disagreement_metrics(drift: Drift, place: int | str) -> dict[str, Estimate]:
    """Return the mean disagreements on the three kinds of states and their ratios, at a transition or at all."""
    found: dict[str, Estimate] = {}
    for name in drift.names:
        found |= {f"{name}_{kind}": _mean(drift.errors(kind, place, name)) for kind in KINDS}
    return found | {name: exponential(estimate) for name, estimate in _log_ratios([drift], place).items()}


def state_metrics(drift: Drift, place: int, seed: int) -> dict[str, Estimate]:
    """Return how far the student's states are from data and from the teacher's states, at a transition."""
    own = drift.arrays["states student"][:, place]
    found: dict[str, Estimate] = {}
    for kind in ("data", "teacher"):
        compared = compare_states(own, drift.arrays[f"states {kind}"][:, place], seed)
        found |= {f"{name}_{kind}": estimate for name, estimate in compared.items()}
    return found


def _log_ratios(students: Sequence[Drift], place: int | str) -> dict[str, Estimate]:
    """Return the logarithms of the ratios of one student, or how much they exceed those of a second student.

    ``shift_ratio`` is the disagreement on the student's own states over that on data, ``rollout_ratio`` over that on
    the teacher's states. Where a student equals its teacher there are no ratios.
    """
    found = {}
    for name in students[0].names:
        for ratio, below in (("shift_ratio", "data"), ("rollout_ratio", "teacher")):
            scores = [(drift.errors("student", place, name), drift.errors(below, place, name)) for drift in students]
            if min(part.mean() for one in scores for part in one) > _ROUNDING:
                second = scores[1] if len(scores) > 1 else None
                found[name.removesuffix("disagreement") + ratio] = log_ratio(*scores[0], other=second)
    return found


_ROUNDING = 1e-8
"""A mean squared error that float32 rounding alone makes: latents are of the order of 1."""


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
        found[f"commitment_{kind}"] = _mean(1 - errors / max(float(spread), np.finfo(np.float64).tiny))
    return found


def difference_metrics(first: Drift, second: Drift, place: int | str) -> dict[str, Estimate]:
    """Compare two students: their disagreements on states of each kind, and the logarithms of their ratios."""
    found = {}
    for name in first.names:
        for kind in KINDS:
            pair = np.stack([drift.errors(kind, place, name) for drift in (first, second)], axis=1)
            found[f"{name}_{kind}"] = estimate_mean(pair, np.array([1.0, -1.0]))
    return found | {f"log_{name}": estimate for name, estimate in _log_ratios([first, second], place).items()}


def _mean(scores: np.ndarray) -> Estimate:
    return estimate_mean(scores[:, None], np.ones(1))


def _recorded(estimates: Mapping[str, Estimate]) -> dict[str, RecordedMetric]:
    found = {}
    for name, estimate in estimates.items():
        direction: Direction = "higher" if name.startswith(_HIGHER) else "lower"
        found[name] = RecordedMetric.model_validate({"estimate": estimate, "direction": direction, "kind": "mean"})
    return found


def _save(
    config: DriftConfig, found: Sequence[Drift], data: Mapping[str, Any], out: Path, device: str, started: float
) -> list[Record]:
    """Save the records of each student with its figure, and those of each two students on the same grid."""
    writer = RecordWriter.of_run(
        out,
        experiment=EXPERIMENT,
        protocol=config.model_dump(mode="json") | {"sampling": _used([drift.pair for drift in found])},
        not_hashed=NOT_HASHED,
        data=data,
        recipe="latents",
        count=config.num_prompts,
        device=device,
        started=started,
    )
    records = []
    for drift in found:
        fields = _fields(config, {"teacher": drift, "student": drift})
        own = []
        for place in drift.places:
            for kind, estimates in _cells(drift, place, config.seed).items():
                own.append(writer.save(_cell(kind, drift, place), _recorded(estimates), **fields))
        drift_figure.draw(own, out / f"drift-{_figure_name(drift.pair.student.reference, config.students)}.png")
        records += own
    for first, second in itertools.combinations(found, 2):
        if first.pair.grid == second.pair.grid and first.pair.stochastic == second.pair.stochastic:
            fields = _fields(config, {"teacher": first, "first": first, "second": second})
            records += [
                writer.save(
                    _cell("drift-difference", first, place),
                    _recorded(difference_metrics(first, second, place)),
                    **fields,
                )
                for place in first.places
            ]
    return records


def _figure_name(student: str, students: Sequence[str]) -> str:
    """Return the last part of a student's reference, or all of it where another student has the same last part."""
    own = Path(student).name
    return own if [Path(other).name for other in students].count(own) == 1 else slug(student)


def _cells(drift: Drift, place: int | str, seed: int) -> dict[str, dict[str, Estimate]]:
    """Return the estimates of a transition, or of all together, by the kind of their record."""
    logarithms = {f"log_{name}": estimate for name, estimate in _log_ratios([drift], place).items()}
    cells = {"drift": disagreement_metrics(drift, place)}
    if logarithms:
        cells["drift-ratios"] = logarithms
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
        "seeds": [config.seed],
        "nfe": float(sum(pair.actors[TEACHER].nfe) + sum(pair.actors[STUDENT].nfe)),
    }
