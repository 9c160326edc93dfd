"""What a study measures of a student: numbers by name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import image_side
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.models.model import Model, load_model
from ddil_eval.experiments.drift_states import KINDS, measure_states, pair_models
from ddil_eval.experiments.point_measures import CONSISTENCY_STEP, measure_points
from ddil_eval.experiments.prompts import choose_prompts
from ddil_eval.experiments.system_configs import SeededSystemConfig
from ddil_eval.experiments.systems import SystemsConfig, compare_systems
from ddil_eval.experiments.targets import read_targets
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Direction
from ddil_eval.statistics.moments import blocks
from ddil_eval.study.config import MeasureConfig

BATCH = 64
"""The prompts that are rolled out together. Numbers depend on it by rounding alone."""


@dataclass(frozen=True)
class Measurement:
    """A student and all that its measures depend on.

    Attributes:
        teacher: The loaded teacher.
        student: The folder of the student.
        data: The reference of the data set.
        config: The configuration that the student was distilled with.
        measure: What is measured.
        seed: The seed of the noise. Students with the same seed are measured on the same noise.
    """

    teacher: Model
    student: Path
    data: str
    config: MethodConfig
    measure: MeasureConfig
    seed: int


def measure_student(measurement: Measurement) -> dict[str, float]:
    """Return all measures of a student that the study asks for."""
    found: dict[str, float] = {}
    for kind in measurement.measure.kinds:
        found |= KINDS_OF_MEASURES[kind](measurement)
    return found


def drift_measures(m: Measurement) -> dict[str, float]:
    """Return how far the student is from its teacher, on states of each kind and at the end.

    ``disagreement_KIND`` are the mean losses on the states of data, of the teacher's rollouts and of the student's own,
    over all transitions. ``shift_ratio`` is that on own states over that on data. ``end_distance`` is
    ‖z^π − z^τ‖/‖z^τ‖ at the end of the two trajectories from one noise.
    """
    student = load_model(str(m.student), m.teacher.device)
    guidance = getattr(m.config, "guidance_scale", None)
    pair = pair_models(m.teacher, student, m.measure.teacher_steps, guidance, consistency_step(m))
    data = open_data(m.data)
    prompts = choose_prompts(data, m.measure.count, None).prompts
    images = read_targets(data, m.measure.count, image_side(m.teacher)).images
    parts = [measure_states(pair, prompts[part], images[part], m.seed) for part in blocks(m.measure.count, BATCH)]
    losses = {kind: _mean(np.concatenate([part[f"disagreement {kind}"] for part in parts])) for kind in KINDS}
    return {
        "end_distance": _mean(np.concatenate([part["distance"][:, -1] for part in parts])),
        "shift_ratio": losses["student"] / max(losses["data"], np.finfo(np.float64).tiny),
        **{f"disagreement_{kind}": loss for kind, loss in losses.items()},
    }


def consistency_step(m: Measurement) -> int:
    """Return the length of the teacher's step in the student's consistency loss, in timesteps."""
    if isinstance(m.config, ConsistencyConfig):
        return len(m.teacher.denoiser.schedule) // m.config.teacher_steps
    return CONSISTENCY_STEP


def image_measures(m: Measurement) -> dict[str, float]:
    """Return the metrics of the student's images, as ``ddil eval systems`` measures them."""
    config = SystemsConfig(
        data=m.data,
        systems=(SeededSystemConfig(name="student", model=str(m.student)),),
        num_prompts=m.measure.count,
        metrics=m.measure.metrics,
        seed=m.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        records = compare_systems(config, Path(folder), str(m.teacher.device))
    return {name: metric.estimate.value for name, metric in records[0].metrics.items()}


def point_measures(m: Measurement) -> dict[str, float]:
    """Return ``measure_points`` without the teacher's own values, which are the same for all students."""
    student = load_model(str(m.student), m.teacher.device)
    guidance, steps = getattr(m.config, "guidance_scale", None), m.measure.teacher_steps
    found = measure_points(
        m.teacher, student, m.measure.count, m.seed,
        teacher_steps=steps, guidance_scale=guidance, consistency_step=consistency_step(m),
    )  # fmt: skip
    return {name: value for name, value in found.items() if not name.startswith("teacher_")}


KINDS_OF_MEASURES: dict[str, Callable[[Measurement], dict[str, float]]] = {
    "drift": drift_measures,
    "points": point_measures,
    "images": image_measures,
}


def direction_of(name: str) -> Direction:
    """Return which values of a measure are better."""
    return METRICS[name].direction if name in METRICS else "lower"


def _mean(values: np.ndarray) -> float:
    return float(values.astype(np.float64).mean())
