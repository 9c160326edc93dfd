"""An ε-teacher becomes a v-model before it is distilled: at t = 999 its x̂ is a division by α ≈ 0.07, which a few-step student
cannot learn through. The student's loss is ‖v̂ − v‖² against the teacher itself, over all timesteps and without guidance."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data import LatentPool
from ddil_core.denoiser import Condition, GuidedDenoiser
from ddil_core.distill.config import ConvertConfig, DistillConfig
from ddil_core.distill.stage import Stage
from ddil_core.parameterization import to_v
from ddil_core.train import Logs


class ConversionStage(Stage):
    """The student predicts v where its teacher predicts something else. A share of the rows is told ``nothing`` (a condition of
    one row), so that the v-model can be guided as its teacher was."""

    def __init__(
        self,
        teacher: GuidedDenoiser,
        nothing: Condition,
        pool: LatentPool,
        convert: ConvertConfig,
        config: DistillConfig,
        accelerator: Accelerator,
        start: nn.Module | None = None,
    ) -> None:
        super().__init__(teacher, pool, convert.updates, config, accelerator, "convert", "v_prediction", start)
        self.nothing, self.unconditional = nothing.to(self.device), convert.unconditional

    def update(self, step: int) -> Logs:
        """One optimiser step; returns tensors that need no synchronisation until they are read."""
        generator = self.generator(step, 0)
        x0, row = self.pool.draw(self.config.batch_size, generator)
        t = torch.randint(len(self.schedule), (len(x0),), generator=generator).to(self.device)
        eps = torch.randn(x0.shape, generator=generator)
        silent = torch.rand(len(x0), generator=generator) < self.unconditional
        z = self.schedule.add_noise(x0.to(self.device), eps.to(self.device), t)
        condition = self.condition(row).where(silent.to(self.device), self.nothing)
        target = self.target(z, t, condition)
        with self.accelerator.autocast():
            output = self.student.output(z, t, condition)
        return self.descend((output.float() - target).square().mean(), step)

    @torch.no_grad()
    def target(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The v that the teacher's x̂ implies, float32."""
        with self.accelerator.autocast():
            x0 = self.teacher.network(z, t, condition)
        return to_v(x0.float(), z, *self.schedule.at(t, z))
