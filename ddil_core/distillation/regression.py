"""Regression pre-training of a generator, which DMD2's one-step SDXL generator needs.

The generator learns pairs of noise and the image latents that the guided teacher samples from this noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser
from ddil_core.diffusion.few_step import time_of
from ddil_core.diffusion.integrate import integrate
from ddil_core.diffusion.noise import generator_for
from ddil_core.diffusion.schedule import rows_at, transitions
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.distillation.context import DATA
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.processes import gather_rows, own_rows, owners
from ddil_core.distillation.sharding import whole
from ddil_core.distillation.stage import Stage
from ddil_core.distillation.steady import steady
from ddil_core.distillation.training_log import Logs
from ddil_core.support.checksums import require_checksum, with_checksum
from ddil_core.support.devices import sent
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_tensors
from ddil_core.support.finite import Finite, all_finite, not_finite
from ddil_core.support.progress import progress

Pairs = dict[str, Tensor]
"""``noise`` and ``x0`` [N, C, H, W], and ``row`` int64 [N]: the row of the pool with the caption."""


@torch.no_grad()
def encode_pairs(
    teacher: GuidedDenoiser, pool: LatentPool, config: MatchingConfig, path: Path, accelerator: Accelerator
) -> Pairs:
    """Make the teacher's pairs and save them at ``path``, or read them where the file exists.

    Args:
        teacher: The guided teacher.
        pool: Gives the captions.
        config: Gives the number of pairs and the teacher's steps.
        path: A safetensors file.
        accelerator: Its processes share the work.

    Raises:
        DdilError: the file is damaged, or the latents are not finite.
    """
    assert config.regression is not None
    exists = path.is_file()
    accelerator.wait_for_everyone()  # a later process must not find the file that an earlier one has just written
    if exists:
        return _read(path)
    count, generator = config.regression.pairs, generator_for(config.seed, "pairs")
    row = torch.randint(len(pool), (count,), generator=generator)
    noise = torch.randn((count, *pool.mean.shape[1:]), generator=generator)
    steps = transitions(teacher.schedule.grid(config.regression.teacher_steps))
    ends, finite = list[Tensor](), Finite[str]()
    sampler = steady(teacher, accelerator.device, config.teacher_batch_size)

    def observe(step: int, z: Tensor) -> None:
        finite.see(f"after the step at t = {steps[step][0]:g}", z)

    with whole([teacher.network.net]), progress("pairs of the teacher", total=count) as advance:
        for rows in torch.arange(count).split(config.teacher_batch_size * accelerator.num_processes):
            own = own_rows(accelerator, len(rows))
            captions = row[rows[own]]
            device = accelerator.device
            tensors = {name: sent(told, device).float() for name, told in pool.conditions(captions).items()}
            condition, z = Condition(tensors), sent(noise[rows[own]], device)
            z = integrate(sampler, SOLVERS["ddim"], z, condition, steps, observe=observe)
            if (place := finite.first_broken()) is not None:
                raise not_finite("the latents", place, "the teacher's pairs for the regression", [teacher.network])
            ends.append(gather_rows(accelerator, z, owners(accelerator, len(rows))).cpu())
            advance(len(rows))
    pairs = {"noise": noise, "x0": torch.cat(ends), "row": row}
    if accelerator.is_main_process:
        write_tensors(path, pairs, writing=with_checksum)
    accelerator.wait_for_everyone()
    return pairs


def _read(path: Path) -> Pairs:
    require_checksum(path, "the file of the teacher's pairs", "delete it to make them again")
    try:
        tensors = load_file(path)
        pairs: Pairs = {name: tensors[name] for name in ("noise", "x0", "row")}
    except (SafetensorError, OSError, KeyError) as error:
        raise DdilError(f"the teacher's pairs {path} are damaged; delete the file to make them again") from error
    if not all_finite(pairs.values()):
        raise DdilError(
            f"the teacher's pairs {path} hold values that are not finite; delete the file to make them again"
        )
    return pairs


class RegressionStage(Stage):
    """Trains the generator with the loss ‖x̂(noise, t) − x₀‖² at its first timestep.

    Args:
        teacher: The guided teacher.
        pool: Gives the captions.
        config: Gives the number of updates and the batch size.
        accelerator: Its processes share each batch.
        pairs: The teacher's pairs.
        start: The network from which the generator starts. None: the teacher's network.
    """

    def __init__(
        self,
        teacher: GuidedDenoiser,
        pool: LatentPool,
        config: MatchingConfig,
        accelerator: Accelerator,
        pairs: Pairs,
        start: nn.Module | None = None,
    ) -> None:
        told = config.regression
        assert told is not None
        config = config.model_copy(update={"learning_rate": told.learning_rate or config.learning_rate})
        super().__init__(teacher, pool, told.updates, config, accelerator, "regression", start)
        self.pairs, self.time = pairs, time_of(self.schedule, config.timesteps[0])

    def _update(self, step: int) -> Logs:
        chosen = torch.randint(len(self.pairs["row"]), (self.config.batch_size,), generator=self.generator(step, DATA))

        def losses() -> Iterator[Tensor]:
            for rows, share in self.parts(len(chosen)):
                yield share * pair_loss(self, self.pairs, chosen[rows], self.time)

        return self.descend(losses(), step)


def pair_loss(stage: Stage, pairs: Pairs, chosen: Tensor, t: float) -> Tensor:
    """Return the mean of (x̂(noise, t) − x₀)² over all entries of the chosen pairs' latents, with its gradient.

    Args:
        stage: The stage whose student gives x̂.
        pairs: The teacher's pairs.
        chosen: Which of the pairs, int64 [B].
        t: The generator's first time, which is that of pure noise.
    """
    noise, x0 = (sent(pairs[name][chosen], stage.device) for name in ("noise", "x0"))
    with stage.accelerator.autocast():
        predicted = stage.student(noise, rows_at(t, noise), stage.condition(pairs["row"][chosen]))
    return (predicted.float() - x0).square().mean()
