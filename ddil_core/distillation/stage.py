"""A stage of a distillation: the student's network, its average, its optimiser and its updates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser, NetworkDenoiser
from ddil_core.diffusion.parameterization import Prediction
from ddil_core.distillation.adapters import has_lora, own_copy, take_base, train_all_or_adapters, with_adapters
from ddil_core.distillation.checkpoints import Stateful
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.context import StageContext
from ddil_core.distillation.dropout import seeded
from ddil_core.distillation.loop import Ema
from ddil_core.distillation.optimizer import LARGEST, TrainedWeights, make_optimizer, step_unless
from ddil_core.distillation.sharding import ShardedMoments, ShardedWeights, shard, whole_copy
from ddil_core.distillation.sources import StateSource
from ddil_core.distillation.training_log import SKIPPED, Logs
from ddil_core.models.compiling import compile_module
from ddil_core.models.sampling import Sampling
from ddil_core.support.errors import DdilError
from ddil_core.support.finite import not_finite


class Stepped(NamedTuple):
    """What a step of an optimiser saw.

    Attributes:
        loss: The loss of this process's rows.
        norm: The norm of the gradient before clipping.
        skipped: 1 where the step changed no weights, else 0; the same in all processes.
    """

    loss: Tensor
    norm: Tensor
    skipped: Tensor


class Stage(ABC):
    """Trains a student, update by update.

    A method extends this class with ``_update`` and, mostly, with a state source.

    The averaged weights (``ema``) become the next teacher or the output. Without an average (``ema_decay`` 0) the
    trained weights do. Both are float32, whatever the student's dtype is (``TrainedWeights``). A student with a LoRA
    trains the LoRA alone, without an average, beside the frozen base of the network that it starts from. This base is
    in the teacher's memory where it has the teacher's numbers.

    Every random number comes from (seed, stage, step), so that a resumed run gives the same weights. Dropout draws from
    the same seed, with other masks in each process. A network is in training mode only while it is trained.

    Each process takes its own rows of every batch (``parts``). The mean of the processes' gradients is the gradient of
    the batch within rounding. Adam amplifies rounding, so that the weights of two such runs drift apart over many
    updates.

    Attributes:
        source: Gives the states of each batch; None for a method that draws its own batches.
        sampling: How the student is meant to be sampled; None for a student that is not watched.
        average_warms_up: Whether the decay of the average starts small.
        evaluates_average: Whether updates evaluate the average, so that it must stay on the device.
    """

    source: StateSource | None = None
    sampling: Sampling | None = None
    average_warms_up = True
    evaluates_average = False

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
        """Start the student, its average and its optimiser.

        Args:
            teacher: The frozen teacher. The student is called as the teacher's network is.
            pool: The encoded training data.
            updates: How many updates the stage has.
            config: The configuration of the method.
            accelerator: The device and the processes of the run.
            index: The number or name of the stage. It is part of every random seed.
            start: The network that the student starts as a copy of; None for the teacher's network.
            prediction: What the student predicts; None for what the teacher predicts.
        """
        self.context = StageContext(pool, config, accelerator, index)
        self.teacher, self.pool, self.config, self.accelerator = teacher, pool, config, accelerator
        self.updates, self.index = updates, index
        self.finite = self.context.finite
        self.schedule = teacher.schedule
        self.device = accelerator.device
        self.sharded = config.shard and accelerator.num_processes > 1
        net = self.beside(own_copy(teacher.network.net if start is None else start), teacher.network.net).train()
        self.adapted = start if start is not None and has_lora(start) and not self.sharded else None
        averaged = config.ema_decay > 0 and not has_lora(net)
        self.ema: Ema[nn.Module] | None = (
            Ema(net, config.ema_decay, warms_up=self.average_warms_up) if averaged else None
        )
        if self.ema is not None and self.sharded:
            shard(self.ema.module)
        elif self.ema is not None and config.offload and not self.evaluates_average:
            self.ema.module.to("cpu")
        self.weights: dict[nn.Module, TrainedWeights] = {}
        self.net, self.optimizer = self.prepare(net, config.learning_rate)
        self.context.rolled = [teacher.network.net, self.net]
        self.student = type(teacher.network)(self.net, self.schedule, prediction or teacher.network.prediction)

    def beside(self, net: nn.Module, other: nn.Module) -> nn.Module:
        """Bring a network to the device, with the weights that are to be trained in float32.

        A frozen base gets the dtype in which the network computes, and the memory of ``other`` where the numbers are
        equal. Processes that divide a network divide its base too, in float32, and share it with no other.
        """
        train_all_or_adapters(net)
        if not has_lora(net) or self.sharded:
            return net.to(self.device, torch.float32)
        dtype, mixed = getattr(torch, self.config.student_dtype), self.config.mixed_precision == "bf16"
        take_base(net, other, dtype, self.device, autocast=mixed)
        for weight in net.parameters():
            if weight.requires_grad:
                weight.data = weight.detach().to(self.device, torch.float32)
        return net

    def prepare(self, net: nn.Module, learning_rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return a network, on the device and in the student's dtype, and the optimiser of its ``weights``.

        The weights that are to be trained are float32 before.
        """
        dtype = getattr(torch, self.config.student_dtype)
        kind = ShardedWeights if self.sharded else TrainedWeights
        weights = kind(net.to(self.device), dtype, offload=self.config.offload)
        if self.config.gradient_checkpointing:
            checkpointed: Any = net
            checkpointed.enable_gradient_checkpointing()
        if self.config.compile:
            compile_module(net, self.device, static=False)
        optimizer = make_optimizer(weights.parameters(), learning_rate, self.config)
        prepared, optimizer = (net, optimizer) if self.sharded else self.accelerator.prepare(net, optimizer)
        if isinstance(prepared, DistributedDataParallel):
            prepared.broadcast_buffers = False  # they are constants, and rollouts call it unequally often
        self.weights[prepared] = weights
        return prepared, optimizer

    def update(self, step: int) -> Logs:
        """Do update ``step``. The returned tensors wait for the device only when they are read."""
        with seeded(self.device, self.config.seed, "dropout", self.index, step, self.accelerator.process_index):
            return self._update(step)

    @abstractmethod
    def _update(self, step: int) -> Logs:
        """Do what the method does in one update."""

    def stateful(self) -> dict[str, Stateful]:
        """Return what a checkpoint holds."""
        average = {} if self.ema is None else {"ema": self.ema}
        source = {} if self.source is None else self.source.stateful()
        return {"net": self.weights[self.net], **average, "optimizer": self.moments(self.net, self.optimizer), **source}

    def moments(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> Stateful:
        """Return what a checkpoint holds of the optimiser of a network from ``prepare``."""
        weights = self.weights[net]
        return ShardedMoments(optimizer, weights) if isinstance(weights, ShardedWeights) else optimizer

    def require_sound(self, teacher: str, title: str, step: int, kept: str) -> None:
        """Refuse to go on where an output of the teacher since the last call, or a trained weight now, is unusable.

        This waits for the device, a few times.

        Args:
            teacher: What the message calls the teacher.
            title: What the message calls the stage.
            step: How many updates are done.
            kept: Says which checkpoint is kept.

        Raises:
            DdilError: an output is not finite, or a weight is not finite or too large.
        """
        if (place := self.finite.first_broken()) is not None:
            raise not_finite("the targets", f"by update {step}, {place}", teacher, [self.teacher.network])
        for weights in self.weights.values():
            if (name := weights.ruined()) is not None:
                raise DdilError(
                    f"the weights of the stage {title!r} are ruined by update {step}, first {name}: they are not "
                    f"finite, or larger than {LARGEST:,.0f}: begin another run (another --out) with a lower "
                    f"learning_rate or weight_decay; {kept}"
                )

    def unwrapped(self, net: nn.Module) -> Any:
        """Return a prepared network without the wrapper that joins its gradients over processes."""
        return self.accelerator.unwrap_model(net)

    def generator(self, step: int, purpose: int) -> torch.Generator:
        """Return a CPU generator for one update and one purpose."""
        return self.context.generator(step, purpose)

    def condition(self, row: Tensor) -> Condition:
        """Return the condition of the pool's rows int64 [B], float32, on the device."""
        return self.context.condition(row)

    def parts(self, size: int) -> Iterator[tuple[slice, float]]:
        """Yield each part (``gradient_accumulation``) of this process's rows of a batch, and its share of the loss."""
        first, stride = self.accelerator.process_index, self.accelerator.num_processes
        parts = self.config.gradient_accumulation
        for part in range(parts):
            yield slice(first + part * size // parts, (part + 1) * size // parts, stride), 1 / parts

    def rate(self, learning_rate: float, step: int) -> float:
        """Return the learning rate at an update: a linear warm-up, then optionally a linear decay to zero."""
        rise = min(1.0, (step + 1) / max(1, self.config.warmup))
        fall = 1 - step / self.updates if self.config.learning_rate_decay else 1.0
        return learning_rate * rise * fall

    def descend(self, losses: Iterator[Tensor], step: int) -> Logs:
        """Do one optimiser step of the student on the sum of its losses, one for each part of the batch."""
        stepped = self.step(self.net, self.optimizer, losses, self.rate(self.config.learning_rate, step))
        if self.ema is not None:
            self.ema.update(self.weights[self.net])
        return {"loss": stepped.loss, "gradient_norm": stepped.norm, SKIPPED: stepped.skipped}

    def step(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterator[Tensor], learning_rate: float
    ) -> Stepped:
        """Do one optimiser step of a network, with clipped gradients.

        The step changes no weights, and no state of the optimiser, where the loss of any process or the norm of the
        gradient is NaN or infinite, or the norm is ``skip_above`` or more.

        Args:
            net: A network from ``prepare``.
            optimizer: The optimiser of the network.
            losses: One loss for each part of the batch. Each is computed when its turn comes.
            learning_rate: The learning rate of this step.
        """
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.device)
        weights, last = self.weights[net], self.config.gradient_accumulation - 1
        for part in range(last + 1):
            # Where the weights are apart, their gradients are added up outside of the network, so each part is joined.
            joined_later = part < last and not weights.apart
            with self.accelerator.no_sync(net) if joined_later else nullcontext():
                loss = next(losses)
                self.accelerator.backward(loss)
            weights.take_gradients()
            total += loss.detach()
        norm = weights.clip(self.config.gradient_clip).to(self.device)
        bound = math.inf if self.config.skip_above is None else self.config.skip_above
        skipped = 1 - (torch.isfinite(total) & (norm.detach() < bound)).float()  # NaN is not below the bound
        if self.accelerator.num_processes > 1:
            skipped = self.accelerator.reduce(skipped, "sum").clamp(max=1)
        step_unless(optimizer, skipped)
        optimizer.zero_grad()
        weights.give_weights()
        return Stepped(total, norm.detach(), skipped)

    def finish(self) -> nn.Module:
        """Return the final network, float32: the next stage's teacher, or the output.

        Adapters are returned beside the base that the stage started from, which nothing has rounded.
        """
        weights = self.weights[self.net]
        if self.adapted is not None:
            return with_adapters(self.adapted, weights.weights)
        if self.ema is None:
            return weights.network()
        return whole_copy(weights.plan, self.ema.module) if isinstance(weights, ShardedWeights) else self.ema.module

    def denoiser(self) -> NetworkDenoiser:
        """Return the student as it is now. Without an average it has the student's dtype, not float32."""
        net = self.unwrapped(self.net) if self.ema is None else self.ema.module
        return type(self.student)(net, self.schedule, self.student.prediction)
