"""Conversion of a teacher that predicts ε into one that predicts v, before progressive distillation.

At t = 999 the x̂ of an ε-model is a division by α ≈ 0.07. A few-step student cannot learn through it. The loss of
the conversion is ‖v̂ − v‖² against the teacher, over all timesteps and without guidance.
"""

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
from ddil_core.distillation.adapters import require_lora
from ddil_core.distillation.checks import require_steps
from ddil_core.distillation.config import ConvertConfig, ProgressiveConfig
from ddil_core.distillation.context import DATA
from ddil_core.distillation.processes import slices
from ddil_core.distillation.run import Run
from ddil_core.distillation.stage import Stage
from ddil_core.distillation.training import train_stage
from ddil_core.distillation.training_log import Logs
from ddil_core.distillation.transfer import Ahead, Draws
from ddil_core.models.model import Model
from ddil_core.support.devices import pinned, sent
from ddil_core.support.errors import DdilError


def require_convertible(model: Model, config: ProgressiveConfig) -> None:
    """Refuse a teacher that predicts neither v nor a flow's velocity, and cannot be converted.

    A LoRA keeps the ε of its teacher.

    Raises:
        DdilError: the teacher predicts ε and the protocol has no section ``convert``, or it predicts something else.
        WrongCommand: the teacher's network has no place for the LoRA, or the first stage has too many steps.
    """
    require_lora(model, config.lora)
    require_steps(model, 2 * config.stages[0].steps, "the first stage")
    prediction = model.denoiser.prediction
    keeps_eps = config.convert is not None or config.lora is not None
    if prediction in ("v_prediction", "flow") or (prediction == "epsilon" and keeps_eps):
        return
    needs = "progressive distillation needs a network that predicts v"
    why = f"the teacher {model.reference!r} predicts {prediction}, and {needs}"
    if prediction == "epsilon":
        raise DdilError(
            f"{why}: at t = 999 an ε divides by α ≈ 0.07; convert it first with a section 'convert' in the "
            "protocol, or --set convert.updates=N"
        )
    raise DdilError(f"{why}, ε or a flow's ε − x₀; distil another teacher")


def convert_to_v(run: Run[ProgressiveConfig]) -> None:
    """Replace the run's teacher by a model that predicts v, if it predicts ε.

    The weights of the new teacher stay in ``checkpoints/convert.safetensors``.
    """
    model, convert = run.model, run.config.convert
    if model.denoiser.prediction != "epsilon" or convert is None:
        return
    start = model.denoiser.net
    teacher = GuidedDenoiser(run.frozen(start))
    make = partial(ConversionStage, teacher, model.nothing(), run.pool, convert, run.config, run.accelerator, start)
    net = train_stage(run, make, start, "convert", "ε → v")
    start.to("cpu")  # it is not used again
    run.model = replace(model, denoiser=type(model.denoiser)(net, model.denoiser.schedule, "v_prediction"))


class ConversionStage(Stage):
    """Trains a student that predicts v. A share of the rows has no caption, so that the student can be guided too."""

    def __init__(
        self,
        teacher: GuidedDenoiser,
        nothing: Condition,
        pool: LatentPool,
        convert: ConvertConfig,
        config: ProgressiveConfig,
        accelerator: Accelerator,
        start: nn.Module | None = None,
        name: str = "convert",
    ) -> None:
        """Start the student that predicts v.

        Args:
            nothing: The condition of the empty caption, one row.
            convert: The section ``convert`` or ``student`` of ``config``.
            name: The name of the stage. It is part of every random seed.

        For the other arguments see ``Stage``.
        """
        super().__init__(teacher, pool, convert.updates, config, accelerator, name, start, "v_prediction")
        self.nothing, self.unconditional = nothing.to(self.device), convert.unconditional
        self.ahead = Ahead(self._drawn, self.device)

    def _drawn(self, step: int) -> tuple[Draws, Tensor]:
        """Draw a batch on the host, and which of its rows have no caption, bool [B]."""
        generator = self.generator(step, DATA)
        x0, row = self.pool.draw(self.config.batch_size, generator, step)
        t = torch.randint(len(self.schedule), (len(x0),), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        without_caption = torch.rand(len(x0), generator=generator) < self.unconditional
        return Draws(pinned(x0, self.device), row, t, pinned(eps, self.device)), without_caption

    def _update(self, step: int) -> Logs:
        drawn, without_caption = self.ahead.take(step, step + 1 if step + 1 < self.updates else None)
        t = sent(drawn.time, self.device)
        z = self.schedule.add_noise(sent(drawn.x0, self.device), sent(drawn.eps, self.device), t)
        condition = self.condition(drawn.row).where(sent(without_caption, self.device), self.nothing)

        def losses() -> Iterator[Tensor]:
            for rows, share in self.parts(len(z)):
                part = condition.part(rows)
                target = self.target(z[rows], t[rows], part)
                self.finite.see("at states of the data", target)
                with self.accelerator.autocast():
                    output = self.student.output(z[rows], t[rows], part)
                yield share * (output.float() - target).square().mean()

        return self.descend(losses(), step)

    @torch.no_grad()
    def target(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the v that the teacher's x̂ implies, float32.

        The teacher takes at most ``teacher_batch_size`` states at once.
        """
        parts = slices(len(z), self.config.teacher_batch_size)
        with self.accelerator.autocast():
            x0 = torch.cat([self.teacher.network(z[rows], t[rows], condition.part(rows)) for rows in parts])
        return to_v(x0.float(), z, *self.schedule.at(t, z))
