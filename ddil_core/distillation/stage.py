"""What every trained stage shares: the student's network, its average, its optimiser, and what its rows are told."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser, NetworkDenoiser
from ddil_core.diffusion.noise import generator_for
from ddil_core.diffusion.parameterization import Prediction
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.loop import Ema, Logs, Stateful
from ddil_core.distillation.optimizer import TrainedWeights, make_optimizer
from ddil_core.distillation.dropout import seeded
from ddil_core.models.sampling import Sampling
from ddil_core.support.finite import Finite, not_finite


class Stage(ABC):
    """A student that starts as a copy of ``start`` (the teacher's network where None) and is called as its teacher is.

    The weights that count, as the next teacher and as the output, are the averaged ones (``ema``); without an average
    (``ema_decay`` 0) they are the trained ones. Both are float32, whatever the student's own dtype is (``TrainedWeights``).
    Where only some of ``start``'s weights are to be trained (a LoRA's), they alone are, and not averaged. The student
    predicts what its teacher does, or ``prediction``. Everything random comes from (seed, stage, step), so that a resumed
    run is the same run; so does dropout, which draws other masks in each process. A network is in training mode only
    where it is trained.

    In several processes each takes its own rows of every batch (``parts``), and the mean of their gradients is the
    gradient of the batch within rounding. Adam amplifies rounding, so that the weights drift apart over many updates.

    ``sampling`` is how the student is meant to be sampled.
    """

    sampling: Sampling | None = None
    average_warms_up = True

    def __init__(
        self,
        teacher: GuidedDenoiser,
        pool: LatentPool,
        updates: int,
        config: MethodConfig,
        accelerator: Accelerator,
        index: int | str,
        start: nn.Module | None = None,
        prediction: Prediction | None = None,
    ) -> None:
        self.teacher, self.pool, self.config, self.accelerator = teacher, pool, config, accelerator
        self.updates, self.index = updates, index
        self.finite = Finite[str]()  # what the teacher says
        self.schedule = teacher.schedule
        self.device = accelerator.device
        net: nn.Module = copy.deepcopy(teacher.network.net if start is None else start)
        net = net.to(self.device, torch.float32).train()
        adapted = hasattr(net, "peft_config")
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not adapted or "lora_" in name)
        averaged = config.ema_decay > 0 and not adapted
        self.ema: Any = Ema(net, config.ema_decay, warms_up=self.average_warms_up) if averaged else None
        self.weights: dict[nn.Module, TrainedWeights] = {}
        self.net, self.optimizer = self.prepare(net, config.learning_rate)
        self.student = type(teacher.network)(self.net, self.schedule, prediction or teacher.network.prediction)

    def prepare(self, net: nn.Module, learning_rate: float) -> tuple[nn.Module, Any]:
        """A float32 network to be trained, on the device and in the student's dtype, with the optimiser of its ``weights``."""
        weights = TrainedWeights(net.to(self.device), getattr(torch, self.config.student_dtype))
        if self.config.gradient_checkpointing:
            checkpointed: Any = net
            checkpointed.enable_gradient_checkpointing()
        optimizer: Any = make_optimizer(weights.parameters(), learning_rate, self.config)
        prepared, optimizer = self.accelerator.prepare(net, optimizer)
        self.weights[prepared] = weights
        return prepared, optimizer

    def update(self, step: int) -> Logs:
        """One optimiser step; returns tensors that need no synchronisation until they are read."""
        with seeded(self.device, self.config.seed, "dropout", self.index, step, self.accelerator.process_index):
            return self._update(step)

    @abstractmethod
    def _update(self, step: int) -> Logs:
        """What a method does in an update."""

    def stateful(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        averages = {} if self.ema is None else {"ema": self.ema}
        return {"net": self.weights[self.net], **averages, "optimizer": self.optimizer}

    def require_finite(self, teacher: str, step: int) -> None:
        """Refuse to go on where what the teacher said since the last call is not finite; this waits for the device, once.

        Raises:
            DdilError: it is not; ``teacher`` is what the message calls it, ``step`` the updates done.
        """
        if (place := self.finite.first_broken()) is not None:
            raise not_finite("the targets", f"by update {step}, {place}", teacher, [self.teacher.network])

    def own(self, net: nn.Module) -> Any:
        """A prepared network itself, without what joins its gradients over processes."""
        return self.accelerator.unwrap_model(net)

    def generator(self, step: int, purpose: int) -> torch.Generator:
        """A CPU generator for this update alone."""
        return generator_for(self.config.seed, "distill", self.index, step, purpose)

    def condition(self, row: Tensor) -> Condition:
        """What the pool's rows are told, float32, on the device."""
        return Condition({name: tensor[row].float().to(self.device) for name, tensor in self.pool.condition.items()})

    def parts(self, size: int) -> Iterator[tuple[slice, float]]:
        """The parts into which this process takes its rows of a batch of ``size`` (``gradient_accumulation``), each with its share
        of the loss."""
        first, stride, parts = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.config.gradient_accumulation,
        )
        for part in range(parts):
            yield slice(first + part * size // parts, (part + 1) * size // parts, stride), 1 / parts

    def rate(self, learning_rate: float, step: int) -> float:
        """The learning rate at an update: linear warm-up, then, where it is asked for, linear decay to zero at the stage's end."""
        rise = min(1.0, (step + 1) / max(1, self.config.warmup))
        fall = 1 - step / self.updates if self.config.learning_rate_decay else 1.0
        return learning_rate * rise * fall

    def descend(self, losses: Iterator[Tensor], step: int) -> Logs:
        """One optimiser step on the sum of the losses of a batch's parts, each computed when its turn comes."""
        loss, norm = self.step(self.net, self.optimizer, losses, self.rate(self.config.learning_rate, step))
        if self.ema is not None:
            self.ema.update(self.weights[self.net])
        return {"loss": loss, "gradient_norm": norm}

    def step(
        self, net: nn.Module, optimizer: Any, losses: Iterator[Tensor], learning_rate: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients, clipping and a step of one network; returns the loss, of this process's rows, and the gradient's norm before
        clipping."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.device)
        weights, last = self.weights[net], self.config.gradient_accumulation - 1
        for part in range(last + 1):
            # A rounded network's gradients are added up in float32, outside of it, and so each part's is joined by itself.
            joined_later = part < last and not weights.rounded
            with self.accelerator.no_sync(net) if joined_later else nullcontext():
                loss = next(losses)
                self.accelerator.backward(loss)
            weights.take_gradients()
            total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(weights.parameters(), self.config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        weights.give_weights()
        return total, torch.as_tensor(norm).detach()

    def finish(self) -> nn.Module:
        """The weights that count, float32: the next stage's teacher, or the output."""
        if self.ema is not None:
            return self.ema.module
        return self.weights[self.net].network()

    def denoiser(self) -> NetworkDenoiser:
        """The student as it would be saved now, to be looked at; without an average, rounded to the student's dtype."""
        net = self.own(self.net) if self.ema is None else self.ema.module
        return type(self.student)(net, self.schedule, self.student.prediction)
