"""A stage of the training of the shapes world's networks: one network and one loss. It can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_core.distillation.checkpoints import Stateful
from ddil_core.distillation.loop import Ema, fit
from ddil_core.distillation.training_log import Logs


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Return a learning rate that rises over ``warmup`` steps to ``peak`` and falls to 0 along a half cosine."""
    rise = min(1.0, (step + 1) / warmup)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def run_stage(
    title: str,
    model: nn.Module,
    losses: Callable[[int], dict[str, Tensor]],
    *,
    out: Path,
    steps: int,
    lr: float,
    beta2: float = 0.99,
    weight_decay: float = 1e-3,
    ema: Ema[Any] | None = None,
) -> None:
    """Train a network with AdamW, a cosine learning rate and gradients clipped to 1. An interrupted stage is resumed.

    Args:
        title: The stage's name, in the log and in its checkpoint's name.
        model: The network.
        losses: Returns the losses of an update by its number; the network learns to reduce "loss".
        out: The folder of the training.
        steps: The number of updates.
        lr: The peak of the learning rate.
        beta2: AdamW's β₂.
        weight_decay: AdamW's weight decay.
        ema: The average of the network's weights that each update moves on; None for no average.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)

    def update(step: int) -> Logs:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        values = losses(step)
        optimizer.zero_grad()
        values["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if ema is not None:
            ema.update(model)
        return {name: value.detach() for name, value in values.items()}

    stateful: dict[str, Stateful] = {"model": model, "optimizer": optimizer}
    fit(
        update,
        stateful if ema is None else stateful | {"ema": ema},
        steps=steps,
        checkpoint=out / "checkpoints" / f"{title.replace(' ', '_')}.pt",
        log=out / "log.jsonl",
        title=title,
        save_every=250,
    )
