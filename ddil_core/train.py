"""The training loop: updates, checkpoints, exact resume, EMA. What an update does is the caller's."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_core.errors import DdilError
from ddil_core.progress import progress

Logs = dict[str, Tensor | float]
"""What an update reports: numbers, or pairs [2] of a sum and its weight where an update may have nothing to tell."""
Callback = Callable[[int, "dict[str, float] | None"], None]
"""Called after every update with its number, from 1 on, and with the log's means where a line was written."""


class Stateful(Protocol):
    """Anything that a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class CheckpointError(DdilError):
    """A checkpoint that cannot be read; the message says which and what to do."""


class Weights(Protocol):
    """What has trained weights: a module, or the float32 weights of one that is rounded."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """An exponential moving average of a module's weights, θ̄ ← μ θ̄ + (1 − μ) θ.

    μ starts small and grows to ``decay`` as min(decay, (1 + n)/(10 + n)) at update n, so that short runs average too; without
    ``warms_up`` it is ``decay`` from the first, as LCM's target network has it.
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
    """Write a checkpoint under a temporary name, then rename it: a kill leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    torch.save({"step": step, **{name: item.state_dict() for name, item in stateful.items()}}, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, stateful: Mapping[str, Stateful]) -> int:
    """Load a checkpoint into ``stateful``; returns its step, 0 where there is none.

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
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}); delete it to start this stage again"
        ) from error


def forget_after(step: int, title: str, log: Path) -> None:
    """Take the lines of a stage that are past its checkpoint out of the log: those updates are done again."""
    if not log.is_file():
        return
    lines = log.read_text().splitlines(keepends=True)
    held = [line for line in lines if line.endswith("\n")]  # a kill can leave half a line
    kept = [line for line in held if (entry := json.loads(line)).get("stage") != title or entry["step"] <= step]
    if kept != lines:
        temporary = log.with_suffix(".partial")
        temporary.write_text("".join(kept))
        temporary.replace(log)


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
) -> None:
    """Call ``update(step)`` for every step that the checkpoint does not hold yet, saving and logging as it goes.

    The same run, killed anywhere and started again, ends with the same weights as long as ``update`` draws its randomness
    from the step and from ``stateful`` alone. Logged values are means since the last line, and over the processes of
    ``accelerator``, of which the main one alone writes.

    Raises:
        DdilError: a loss is not finite; the checkpoint before it is kept.
    """
    step = load_checkpoint(checkpoint, stateful)
    main = accelerator is None or accelerator.is_main_process
    if main:
        forget_after(step, title, log)
    window: list[Logs] = []
    with progress(title, total=steps, done=step) as advance:
        while step < steps:
            window.append(update(step))
            step += 1
            note, means = None, None
            writes, saves = (step % every == 0 or step == steps for every in (log_every, save_every))
            if saves or writes:
                found = window_means(window, accelerator)
                require_finite(found, title, step)  # what is not finite is never saved
            if writes:
                means = found
                window.clear()
                note = f"loss {means['loss']:.4f}" if "loss" in means else None
                if main:
                    _write(log, {"stage": title, "step": step, **means})
            if saves and main:
                save_checkpoint(checkpoint, step, stateful)
            for callback in callbacks:
                callback(step, means)
            advance(1, note)


def _write(log: Path, entry: Mapping[str, object]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")


def window_means(window: Sequence[Logs], accelerator: Accelerator | None = None) -> dict[str, float]:
    """The means of what some updates reported, in every process; a pair of a sum and a weight of 0 is left out."""
    sums = []
    for key in window[0]:
        values = torch.stack([torch.as_tensor(logs[key], dtype=torch.float64).cpu() for logs in window])
        pairs = torch.stack([values, torch.ones_like(values)], 1) if values.dim() == 1 else values
        sums.append(pairs.sum(0))
    table = torch.stack(sums)
    if accelerator is not None and accelerator.num_processes > 1:
        table = accelerator.reduce(table.to(accelerator.device), "sum").cpu()
    return {key: float(total / weight) for key, (total, weight) in zip(window[0], table, strict=True) if float(weight)}


def require_finite(means: Mapping[str, float], title: str, step: int) -> None:
    """Raises DdilError: a loss, whose key ends so, is NaN or infinite."""
    for key, mean in means.items():
        if key.endswith("loss") and not math.isfinite(mean):
            raise DdilError(
                f"the {key.replace('_', ' ')} of the stage {title!r} is not finite at update {step}: lower learning_rate or "
                "gradient_clip; the checkpoint before is kept"
            )
