"""What every trained stage shares: the student's network, its average, its optimiser, and what its rows are told."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data import LatentPool
from ddil_core.denoiser import Condition, GuidedDenoiser
from ddil_core.distill.config import DistillConfig
from ddil_core.noise import generator_for
from ddil_core.parameterization import Prediction
from ddil_core.train import Ema, Logs, Stateful


class Stage:
    """A student that starts as a copy of ``start`` (the teacher's network where None) and is called as its teacher is.

    The weights that count, as the next teacher and as the output, are the averaged ones (``ema``), float32 whatever the student's
    own dtype. Everything random comes from (seed, stage, step), so that a resumed run is the same run.
    """

    def __init__(
        self,
        teacher: GuidedDenoiser,
        pool: LatentPool,
        updates: int,
        config: DistillConfig,
        accelerator: Accelerator,
        index: int | str,
        prediction: Prediction,
        start: nn.Module | None = None,
    ) -> None:
        self.teacher, self.pool, self.config, self.accelerator = teacher, pool, config, accelerator
        self.updates, self.index = updates, index
        self.schedule = teacher.schedule
        self.device = accelerator.device
        net: nn.Module = copy.deepcopy(teacher.network.net if start is None else start)
        net = net.to(self.device, torch.float32).train().requires_grad_(True)
        self.ema = Ema(net, config.ema_decay)
        net = net.to(getattr(torch, config.student_dtype))
        optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        prepared: Any = accelerator.prepare(net, optimizer)
        self.net, self.optimizer = prepared
        self.student = type(teacher.network)(self.net, self.schedule, prediction)

    def stateful(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        return {"net": self.net, "ema": self.ema, "optimizer": self.optimizer}

    def generator(self, step: int, purpose: int) -> torch.Generator:
        """A CPU generator for this update alone."""
        return generator_for(self.config.seed, "distill", self.index, step, purpose)

    def condition(self, row: Tensor) -> Condition:
        """What the pool's rows are told, float32, on the device."""
        return Condition({name: tensor[row].float().to(self.device) for name, tensor in self.pool.condition.items()})

    def descend(self, loss: Tensor, step: int) -> Logs:
        """One optimiser step on a loss: linear warm-up, then linear decay to zero at the stage's end."""
        rise = min(1.0, (step + 1) / max(1, self.config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rise * (1 - step / self.updates)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.net.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.net)
        return {"loss": loss.detach(), "gradient_norm": torch.as_tensor(norm).detach()}

    def finish(self) -> nn.Module:
        """The averaged weights: the next stage's teacher, or the output."""
        return self.ema.module
