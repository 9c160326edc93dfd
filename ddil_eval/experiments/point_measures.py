"""All measures of a student in the gaussians world, as one mapping of numbers: against the truth and its teacher."""

from __future__ import annotations

import numpy as np

from ddil_core.data.gaussians import GaussiansData
from ddil_core.gaussians.networks import GaussianMixture
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand
from ddil_eval.experiments.drift_states import KINDS, measure_states, pair_models
from ddil_eval.metrics.gaussians_world import log_likelihood, modes_found
from ddil_eval.statistics.points import energy_distance, sliced_wasserstein

CONSISTENCY_STEP = 20
"""The default length of the teacher's step in the consistency target of a stochastic student, in timesteps."""


def measure_points(
    teacher: Model,
    student: Model,
    points: int = 2048,
    seed: int = 0,
    *,
    teacher_steps: int = 16,
    guidance_scale: float | None = None,
    consistency_step: int = CONSISTENCY_STEP,
) -> dict[str, float]:
    """Measure a student of the exact teacher on points from noise that depends on the seed alone.

    Args:
        teacher: The model ``gaussians``.
        student: A student of it.
        points: The number N of points. As many points of the true distribution are compared with them.
        seed: The seed of the noise. Two students with the same seed start from the same z_T.
        teacher_steps: DDIM steps of the teacher, a multiple of the student's.
        guidance_scale: The teacher's guidance. None takes the model's own, which is 1.
        consistency_step: The length of the teacher's step in the loss of a stochastic student, in timesteps.

    Returns:
        - against the true distribution: ``energy_distance``, ``sliced_wasserstein``, ``modes_found``,
          ``log_likelihood`` (the mean, in nats), and the same of the teacher's own ends, as ``teacher_…``;
        - against the teacher: ``end_distance``, the mean of ‖z_0^student − z_0^teacher‖ from the same z_T;
        - the student's loss at states of each kind (``ddil_eval.experiments.drift_states``), over all transitions:
          ``disagreement_data``, ``disagreement_teacher``, ``disagreement_student``, and ``shift_ratio`` (student over
          data) and ``rollout_ratio`` (student over teacher). A stochastic student also has ``end_disagreement_…``.

    Raises:
        WrongCommand: the teacher is not exact, or the two models do not fit each other.
    """
    if not isinstance(teacher.denoiser.net, GaussianMixture):
        raise WrongCommand(f"the truth is known for the teacher 'gaussians' alone, not for {teacher.reference!r}")
    pair = pair_models(teacher, student, teacher_steps, guidance_scale, consistency_step)
    data = GaussiansData()
    prompts, images = data.prompts(points), np.concatenate(list(data.images(points)))
    arrays = measure_states(pair, prompts, images, seed)
    truth, classes = images.reshape(points, -1), data.classes(points)
    ends = {kind: arrays[f"end {kind}"].reshape(points, -1) for kind in ("student", "teacher")}
    found: dict[str, float] = {}
    for kind, prefix in (("student", ""), ("teacher", "teacher_")):
        found |= {
            f"{prefix}energy_distance": energy_distance(ends[kind], truth),
            f"{prefix}sliced_wasserstein": sliced_wasserstein(ends[kind], truth),
            f"{prefix}modes_found": modes_found(ends[kind], classes),
            f"{prefix}log_likelihood": float(log_likelihood(ends[kind], classes).mean()),
        }
    found["end_distance"] = float(np.linalg.norm(ends["student"] - ends["teacher"], axis=1).mean())
    for name in ("disagreement", "end_disagreement") if pair.stochastic else ("disagreement",):
        found |= {f"{name}_{kind}": float(arrays[f"{name} {kind}"].mean(dtype=np.float64)) for kind in KINDS}
    for ratio, below in (("shift_ratio", "data"), ("rollout_ratio", "teacher")):
        found[ratio] = found["disagreement_student"] / max(found[f"disagreement_{below}"], np.finfo(np.float64).tiny)
    return found
