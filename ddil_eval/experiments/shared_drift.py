"""Drift on the rollouts of the covariate-shift analysis, which visits most of the states that drift needs.

The tree of Tables 2 to 4 holds the rollouts of the pure teacher and of the pure student from the same noise. Where the
student acts until a time and the teacher takes over (Table 4), it also holds what the teacher does from the student's
states. The teacher's steps from forward-diffused data are left to compute, and one x̂ at each state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ddil_core.data.base import DataSet
from ddil_core.data.pool import image_side
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.rollout import STUDENT, TEACHER
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.models.autoencoder import require_encoder
from ddil_core.support.errors import WrongCommand
from ddil_eval.experiments.drift_config import DriftConfig
from ddil_eval.experiments.drift_records import Drift, save_drift
from ddil_eval.experiments.drift_states import Drifting, Visited, measure_states, network_evaluations
from ddil_eval.experiments.prompts import Prompts
from ddil_eval.experiments.rollout_tree import Pair, Watch
from ddil_eval.experiments.shift_runs import ShiftRun
from ddil_eval.experiments.targets import read_targets
from ddil_eval.features.storage import Arrays, concatenate
from ddil_eval.report.records import Record
from ddil_eval.statistics.moments import blocks


@dataclass(frozen=True)
class SharedDrift:
    """The drift of one student, measured on the states of a tree of rollouts.

    Attributes:
        config: The drift experiment that gives the same numbers by itself.
        pair: Teacher and student.
        data: The data set.
        prompts: The prompts.
        images: Their images, uint8 [N, H, W, 3].
    """

    config: DriftConfig
    pair: Drifting
    data: DataSet
    prompts: Prompts
    images: np.ndarray

    @classmethod
    def of(cls, config: DriftConfig, pair: Pair, data: DataSet, prompts: Prompts) -> SharedDrift:
        """Prepare the measurement.

        Raises:
            WrongCommand: the student's own rollouts are others than those of the tree.
            DdilError: an image or the autoencoder's encoder is missing.
        """
        sampling = pair.student.sampling
        if sampling.distilled and SOLVERS.find(sampling.solver).stochastic:
            raise WrongCommand(
                f"{pair.student.reference!r} adds noise between its steps, so that its drift is measured on rollouts "
                "of its own; leave out --drift, and use ddil eval drift"
            )
        require_encoder(pair.teacher.pipeline.vae, pair.teacher.reference)
        images = read_targets(data, len(prompts.prompts), image_side(pair.teacher)).images
        drifting = Drifting(pair.teacher, pair.student, pair.actors, pair.grid, config.consistency_step)
        return cls(config, drifting, data, prompts, images)

    def watch(self) -> Watch:
        """Return the measurement for a tree of rollouts."""
        length = len(self.pair.grid)
        pure = [actor * k for actor in (TEACHER, STUDENT) for k in range(1, length + 1)]
        return Watch({*pure, *_handovers(length).values()}, self._measure)

    def _measure(self, chunk: slice, kept: Mapping[str, Tensor]) -> Arrays:
        prompts, images = self.prompts.prompts[chunk], self.images[chunk]
        length, parts = len(self.pair.grid), []
        z = initial_noise([Sample(prompt.id) for prompt in prompts], self.pair.teacher.latent_shape, self.config.seed)
        z = z.to(self.pair.teacher.device)
        paths = [[z, *(kept[actor * k] for k in range(1, length + 1))] for actor in (TEACHER, STUDENT)]
        whole = {k: kept[p] for k, p in _handovers(length).items() if p in kept and len(kept[p]) == len(prompts)}
        for rows in blocks(len(prompts), self.config.batch_size):
            teacher, student = ([state[rows] for state in path] for path in paths)
            labels = [whole[k][rows] if k in whole else None for k in range(length)]
            visited = Visited(teacher, student, labels)
            parts.append(measure_states(self.pair, prompts[rows], images[rows], self.config.seed, visited))
        return concatenate(parts)

    def save(self, arrays: Arrays, out: Path, device: str, started: float) -> list[Record]:
        """Save the records and the figure, as ``ddil eval drift`` does."""
        return save_drift(self.config, [Drift(self.pair, arrays)], self.data, self.prompts, out, device, started)

    def cost(self, runs: Sequence[ShiftRun]) -> dict[str, float]:
        """Return the network evaluations a prompt: beside these runs, by itself, and their ratio."""
        handovers = _handovers(len(self.pair.grid))
        known = [k for k, p in handovers.items() if _everyone_has(runs, p)]
        shared, alone = network_evaluations(self.pair, True, known), network_evaluations(self.pair)
        return {"shared": shared, "alone": alone, "share": shared / alone}


def _handovers(length: int) -> dict[int, str]:
    """Return for each transition the prefix in which the student acts before it, and the teacher in it."""
    return {k: STUDENT * k + TEACHER for k in range(length)}


def _everyone_has(runs: Sequence[ShiftRun], prefix: str) -> bool:
    """Return whether some run takes each prompt along a prefix."""
    return all(
        any(string.startswith(prefix) for string in strings) for strings in zip(*(r.strings for r in runs), strict=True)
    )
