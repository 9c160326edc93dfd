"""An ε-teacher becomes a v-model before it is distilled: at t = 999 its x̂ is a division by α ≈ 0.07, which a few-step student
cannot learn through. The student's loss is ‖v̂ − v‖² against the teacher itself, over all timesteps and without guidance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser
from ddil_core.diffusion.parameterization import to_v
from ddil_core.distillation.config import ConvertConfig, ProgressiveConfig
from ddil_core.distillation.loop import Logs
from ddil_core.distillation.run import Run
from ddil_core.distillation.stage import Stage
from ddil_core.distillation.training import train_stage
from ddil_core.models.model import Model
from ddil_core.support.errors import DdilError


def require_convertible(model: Model, config: ProgressiveConfig) -> None:
    """A few-step student predicts v, and so its teacher must, or be made to.

    Raises:
        DdilError: the teacher predicts ε and the protocol has no conversion for it, or it predicts something else.
    """
    prediction = model.denoiser.prediction
    if prediction == "v_prediction" or (prediction == "epsilon" and config.convert is not None):
        return
    why = f"the teacher {model.reference!r} predicts {prediction}, and progressive distillation needs a network that predicts v"
    if prediction == "epsilon":
        raise DdilError(
            f"{why}: at t = 999 an ε divides by α ≈ 0.07; convert it first with a section 'convert' in the protocol, or "
            "--set convert.updates=N"
        )
    raise DdilError(f"{why} or ε; distil another teacher")


def convert_to_v(run: Run[ProgressiveConfig]) -> None:
    """Make the run's teacher a model that predicts v, where it is none; its weights stay in ``checkpoints/convert.safetensors``."""
    model, told = run.model, run.config.convert
    if model.denoiser.prediction == "v_prediction" or told is None:
        return
    start = model.denoiser.net
    teacher = GuidedDenoiser(run.frozen(start))
    make = partial(ConversionStage, teacher, model.nothing(), run.pool, told, run.config, run.accelerator, start=start)
    net = train_stage(run, make, start, "convert", "ε → v")
    start.to("cpu")  # nothing asks it again
    run.model = replace(model, denoiser=type(model.denoiser)(net, model.denoiser.schedule, "v_prediction"))


class ConversionStage(Stage):
    """The student predicts v where its teacher predicts something else. A share of the rows is told ``nothing`` (a condition of
    one row), so that the v-model can be guided as its teacher was."""

    def __init__(
        self,
        teacher: GuidedDenoiser,
        nothing: Condition,
        pool: LatentPool,
        convert: ConvertConfig,
        config: ProgressiveConfig,
        accelerator: Accelerator,
        start: nn.Module | None = None,
    ) -> None:
        super().__init__(teacher, pool, convert.updates, config, accelerator, "convert", start, "v_prediction")
        self.nothing, self.unconditional = nothing.to(self.device), convert.unconditional

    def _update(self, step: int) -> Logs:
        """One optimiser step; returns tensors that need no synchronisation until they are read."""
        generator = self.generator(step, 0)
        x0, row = self.pool.draw(self.config.batch_size, generator)
        t = torch.randint(len(self.schedule), (len(x0),), generator=generator).to(self.device)
        eps = torch.randn(x0.shape, generator=generator)
        silent = torch.rand(len(x0), generator=generator) < self.unconditional
        z = self.schedule.add_noise(x0.to(self.device), eps.to(self.device), t)
        condition = self.condition(row).where(silent.to(self.device), self.nothing)

        def losses() -> Iterator[Tensor]:
            for rows, share in self.parts(len(z)):
                told = condition.rows(torch.arange(len(z), device=self.device)[rows])
                target = self.target(z[rows], t[rows], told)
                self.finite.see("at states of the data", target)
                with self.accelerator.autocast():
                    output = self.student.output(z[rows], t[rows], told)
                yield share * (output.float() - target).square().mean()

        return self.descend(losses(), step)

    @torch.no_grad()
    def target(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The v that the teacher's x̂ implies, float32; it is asked for at most ``teacher_batch_size`` states at once."""
        parts = torch.arange(len(z), device=z.device).split(self.config.teacher_batch_size)
        with self.accelerator.autocast():
            x0 = torch.cat([self.teacher.network(z[rows], t[rows], condition.rows(rows)) for rows in parts])
        return to_v(x0.float(), z, *self.schedule.at(t, z))
