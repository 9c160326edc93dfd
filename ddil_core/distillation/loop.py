"""The training loop: updates, checkpoints, exact resume, average. The caller says what an update does.

A run that is killed and started again ends with the same weights, if the random numbers of its updates depend on the
step and on the checkpoint alone. A signal that ends the command is handled between updates: the checkpoint is saved
first, at the same update in all processes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.distillation.checkpoints import Checkpoints, RandomStates, Stateful
from ddil_core.distillation.sharding import load_whole, local, whole_state
from ddil_core.distillation.training_log import (
    SKIPPED,
    Logs,
    Window,
    forget_after,
    require_finite,
    require_progress,
)
from ddil_core.support.ending import Interrupted, between_updates
from ddil_core.support.files import append_line
from ddil_core.support.progress import progress, warn
from ddil_core.support.ranks import PATIENCE, is_main

Callback = Callable[[int, "dict[str, float] | None"], None]
"""The loop calls it after every update with the number of updates done, and with the means of a log line or None."""


class Weights(Protocol):
    """Something with trained weights: a module, or ``TrainedWeights``."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """An exponential moving average of a module's weights, θ̄ ← μ θ̄ + (1 − μ) θ.

    With ``warms_up``, μ is min(decay, (1 + n)/(10 + n)) at update n, so that the average of a short run forgets its
    start. Otherwise μ is ``decay`` from the first update on, as for LCM's target network.
    """

    def __init__(self, module: M, decay: float, *, warms_up: bool = True) -> None:
        self.module: M = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.warms_up = decay, warms_up
        self.updates = 0

    @torch.no_grad()
    def update(self, module: Weights) -> None:
        mu = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warms_up else self.decay
        self.updates += 1
        averages: list[Tensor] = [local(parameter) for parameter in self.module.parameters()]
        weights = [weight.detach().to(a) for weight, a in zip(module.parameters(), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - mu)

    def state_dict(self) -> dict[str, Any]:
        return {"module": whole_state(self.module, keep=is_main()), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load_whole(self.module, state_dict["module"])
        self.updates = state_dict["updates"]


def fit(
    update: Callable[[int], Logs], stateful: Mapping[str, Stateful], *,
    steps: int, checkpoint: Path, log: Path, title: str,
    save_every: int, log_every: int = 50, keep: int = 2, skip_limit: int = 10,
    callbacks: Sequence[Callback] = (),
    accelerator: Accelerator | None = None,
    check: Callable[[int, str], None] = lambda step, kept: None, divided: bool = False,
) -> None:  # fmt: skip
    """Call ``update(step)`` for every step after the checkpoint's, and save and log on the way.

    Args:
        update: Does one update and returns its log.
        stateful: What a checkpoint holds, by name.
        steps: The number of updates.
        checkpoint: The file of the checkpoints, without a step (see ``Checkpoints``).
        log: The file of the log, one JSON line for every ``log_every`` updates. The main process writes it.
        title: What the log and messages call the stage.
        save_every: Updates between two checkpoints.
        log_every: Updates between two lines of the log, which hold means over these updates and over all processes.
        keep: The number of checkpoints that are kept.
        skip_limit: How many updates may be skipped in a row.
        callbacks: Called after every update, and for the update of the checkpoint where a run goes on.
        accelerator: The processes; None for one process.
        check: Called with the number of updates done, and with a sentence on the checkpoint that is kept, before
            anything is written. It raises where the work must stop.
        divided: Whether all processes give their shares of divided networks to a checkpoint.

    Raises:
        DdilError: a loss or a gradient's norm is not finite, or too many updates were skipped in a row. The checkpoint
            before it is kept.
        Interrupted: a signal came, and the checkpoint is saved.
    """
    checkpoints, window = Checkpoints(checkpoint, keep), Window()
    held = {**stateful, "window": window, "random": RandomStates()}
    main = accelerator is None or accelerator.is_main_process
    step = _resume(checkpoints, held, log if main else None, title)
    for callback in callbacks if step else ():  # a kill can come between a checkpoint and its callbacks
        callback(step, None)
    with progress(title, total=steps, done=step) as advance, between_updates() as signal:
        while step < steps:
            window.add(update(step))
            step += 1
            writes, saves = (step % every == 0 or step == steps for every in (log_every, save_every))
            stopped = agreed(signal(), accelerator)
            if writes or saves or stopped:
                window.read()
                check(step, checkpoints.kept())  # so weights that are not finite are never saved
                joined = _joined(window, accelerator, title, step, min(skip_limit, steps), checkpoints.kept())
            means = joined if writes else None
            if means is not None:
                _write(means, log if main else None, title, step)
                window.clear()
            if (main or divided) and (saves or stopped):
                checkpoints.save(step, held, stage=title, steps=steps)
            if stopped:
                saved = checkpoints.file_of(step)
                _stop(stopped, accelerator, f"update {step} of {steps} of the stage {title!r} is saved in {saved}")
            for callback in callbacks:
                callback(step, means)
            advance(1, f"loss {means['loss']:.4f}" if means and "loss" in means else None)


def _resume(checkpoints: Checkpoints, held: Mapping[str, Any], log: Path | None, title: str) -> int:
    """Load the newest checkpoint, and forget what the log says of later updates. Return the updates that are done.

    Only the main process has a log. It holds the sums of all processes.
    """
    step = checkpoints.load(held)
    if log is not None:
        forget_after(step, title, log)
    else:
        held["window"].clear()
    return step


def _joined(
    window: Window, accelerator: Accelerator | None, title: str, step: int, skip_limit: int, kept: str
) -> dict[str, float]:
    """Return the means over all processes. Refuse to go on where they are not finite or too many were skipped."""
    require_progress(window, title, step, skip_limit, kept)
    means = window.join(accelerator)
    require_finite(means, title, step, kept)
    return means


def _write(means: Mapping[str, float], log: Path | None, title: str, step: int) -> None:
    """Write a line of the log, and warn where updates were skipped. Only the main process has a log."""
    if log is None:
        return
    append_line(log, json.dumps({"stage": title, "step": step, **means}))
    if share := means.get(SKIPPED, 0.0):
        warn(
            f"{title}, update {step}: {share:.0%} of the updates since the last line of the log were skipped, because "
            "their loss or their gradient's norm was not finite, or the norm was above skip_above"
        )


def _stop(signal: int, accelerator: Accelerator | None, message: str) -> NoReturn:
    """Stop all processes together, because a process that ends early ends the others."""
    if accelerator is not None:
        accelerator.wait_for_everyone()
    raise Interrupted(signal, message)


def agreed(number: int, accelerator: Accelerator | None) -> int:
    """Return the largest of all processes' numbers. It is exchanged over the CPU, so that no GPU is waited for."""
    if accelerator is None or accelerator.num_processes == 1:
        return number
    largest = torch.tensor([number])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=_cpu_group())
    return int(largest)


@cache
def _cpu_group() -> Any:
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
