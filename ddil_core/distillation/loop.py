"""The training loop: updates, checkpoints, exact resume, average. The caller says what an update does.

A run that is killed and started again ends with the same weights, if the random numbers of its updates depend on the
step and on the checkpoint alone. A signal that ends the command is handled between updates: the checkpoint is saved
first, at the same update in all processes.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.support.ending import Interrupted, between_updates
from ddil_core.support.errors import DdilError
from ddil_core.support.files import append_line, write_text, write_torch
from ddil_core.support.outside import parse_json
from ddil_core.support.progress import progress, warn
from ddil_core.support.ranks import PATIENCE

Logs = dict[str, Tensor | float]
"""The log of an update: numbers, or pairs [2] of a sum and its weight. The weight may be 0."""
Callback = Callable[[int, "dict[str, float] | None"], None]
"""The loop calls it after every update with the number of updates done, and with the means of a log line or None."""


class Stateful(Protocol):
    """Anything that a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class CheckpointError(DdilError):
    """A checkpoint cannot be read. The message says which one, and what to do."""


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
        averages: list[Tensor] = list(self.module.parameters())
        weights = [weight.detach().to(a.dtype) for weight, a in zip(module.parameters(), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - mu)

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.module.load_state_dict(state_dict["module"])
        self.updates = state_dict["updates"]


def save_checkpoint(path: Path, step: int, stateful: Mapping[str, Stateful]) -> None:
    """Write a checkpoint whole or not at all. A kill or a full disk leaves the checkpoint before it.

    Raises:
        DdilError: the disk does not take the file.
    """
    write_torch(path, {"step": step, **{name: item.state_dict() for name, item in stateful.items()}})


def load_checkpoint(path: Path, stateful: Mapping[str, Stateful]) -> int:
    """Load a checkpoint into ``stateful``. Return its step, or 0 where there is no checkpoint.

    Raises:
        CheckpointError: the file is damaged or belongs to other models.
    """
    if not path.exists():
        return 0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, item in stateful.items():
            item.load_state_dict(saved[name])
        return int(saved["step"])
    except DdilError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}); delete it to start this stage again"
        ) from error


def forget_after(step: int, title: str, log: Path) -> None:
    """Remove the lines of a stage after update ``step`` from the log, because these updates are done again.

    Damaged lines go too, with a warning. The run does not depend on its log.

    Raises:
        DdilError: the log cannot be read or written.
    """
    if not log.exists():
        return
    try:
        lines = log.read_bytes().split(b"\n")
    except OSError as error:
        raise DdilError(f"the log {log} cannot be read ({error.strerror}); move it away to go on without it") from error
    entries = [(line, _entry(line)) for line in lines[:-1]]
    damaged = sum(entry is None for _, entry in entries)
    if damaged:
        warn(f"{damaged} of {len(entries)} lines of the log {log} are damaged and were removed")
    kept = [line for line, entry in entries if entry is not None and (entry[0] != title or entry[1] <= step)]
    if kept != lines[:-1] or lines[-1]:  # a kill can leave half a line at the end
        write_text(log, "".join(line.decode() + "\n" for line in kept))


def _entry(line: bytes) -> tuple[str, int] | None:
    """Return the stage and the step of a line of the log; None for a damaged line."""
    try:
        entry = parse_json(line)
        return str(entry["stage"]), int(entry["step"])
    except (ValueError, TypeError, KeyError):
        return None


def fit(
    update: Callable[[int], Logs],
    stateful: Mapping[str, Stateful],
    *,
    steps: int,
    checkpoint: Path,
    log: Path,
    title: str,
    save_every: int,
    log_every: int = 50,
    callbacks: Sequence[Callback] = (),
    accelerator: Accelerator | None = None,
    check: Callable[[int], None] = lambda step: None,
) -> None:
    """Call ``update(step)`` for every step after the checkpoint's, and save and log on the way.

    Args:
        update: Does one update and returns its log.
        stateful: What a checkpoint holds, by name.
        steps: The number of updates.
        checkpoint: The file of the checkpoint.
        log: The file of the log, one JSON line for every ``log_every`` updates. The main process writes it.
        title: What the log and messages call the stage.
        save_every: Updates between two checkpoints.
        log_every: Updates between two lines of the log, which hold means over these updates and over all processes.
        callbacks: Called after every update.
        accelerator: The processes; None for one process.
        check: Called with the number of updates done before anything is written. It raises where the work must stop.

    Raises:
        DdilError: a loss or a gradient's norm is not finite. The checkpoint before it is kept.
        Interrupted: a signal came, and the checkpoint is saved.
    """
    step = load_checkpoint(checkpoint, stateful)
    main = accelerator is None or accelerator.is_main_process
    if main:
        forget_after(step, title, log)
    window: list[Logs] = []
    with progress(title, total=steps, done=step) as advance, between_updates() as signal:
        while step < steps:
            window.append(update(step))
            step += 1
            writes, saves = (step % every == 0 or step == steps for every in (log_every, save_every))
            stopped = agreed(signal(), accelerator)
            if writes or saves or stopped:
                window_log = window_means(window, accelerator)
                check(step)
                require_finite(window_log, title, step)  # so weights that are not finite are never saved
            means = window_log if writes else None
            if means is not None:
                window.clear()
                if main:
                    append_line(log, json.dumps({"stage": title, "step": step, **means}))
            if main and (saves or stopped):
                save_checkpoint(checkpoint, step, stateful)
            if stopped:
                _stop(stopped, accelerator, f"update {step} of {steps} of the stage {title!r} is saved in {checkpoint}")
            for callback in callbacks:
                callback(step, means)
            advance(1, f"loss {means['loss']:.4f}" if means and "loss" in means else None)


def _stop(signal: int, accelerator: Accelerator | None, message: str) -> NoReturn:
    """Stop all processes together, because a process that ends early ends the others."""
    if accelerator is not None:
        accelerator.wait_for_everyone()
    raise Interrupted(signal, message)


def window_means(window: Sequence[Logs], accelerator: Accelerator | None = None) -> dict[str, float]:
    """Return the means of the logs of some updates, over all processes. A key with the weight 0 is left out."""
    sums = []
    for key in window[0]:
        values = torch.stack([torch.as_tensor(logs[key], dtype=torch.float64).cpu() for logs in window])
        pairs = torch.stack([values, torch.ones_like(values)], 1) if values.dim() == 1 else values
        sums.append(pairs.sum(0))
    table = torch.stack(sums)
    if accelerator is not None and accelerator.num_processes > 1:
        table = accelerator.reduce(table.to(accelerator.device), "sum").cpu()
    return {key: float(total / weight) for key, (total, weight) in zip(window[0], table, strict=True) if float(weight)}


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


def require_finite(means: Mapping[str, float], title: str, step: int) -> None:
    """Refuse to go on where a loss or a gradient's norm is not finite. The keys end with "loss" or "gradient_norm".

    Raises:
        DdilError: one is NaN or infinite.
    """
    for key, mean in means.items():
        if key.endswith(("loss", "gradient_norm")) and not math.isfinite(mean):
            raise DdilError(
                f"the {key.replace('_', ' ')} of the stage {title!r} is not finite at update {step}: lower "
                "learning_rate or gradient_clip; the checkpoint before is kept"
            )
