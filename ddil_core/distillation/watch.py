"""A run under watch: trackers, grids of pictures, and an alarm where a student collapses or saturates.

Training is not changed by it: what is drawn for it has noise of its own.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.noise import Sample
from ddil_core.diffusion.parameterization import Reflection
from ddil_core.distillation.config import MethodConfig, WatchConfig
from ddil_core.distillation.dropout import evaluating
from ddil_core.distillation.loop import Callback
from ddil_core.distillation.run import Run
from ddil_core.distillation.stage import Stage
from ddil_core.models.generate import sample_latents
from ddil_core.models.model import Model
from ddil_core.models.sampling import Sampling
from ddil_core.support.errors import WrongCommand
from ddil_core.support.files import append_line, replacing
from ddil_core.support.progress import warn

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
PATIENCE = timedelta(hours=6)
"""How long processes wait for the first one while it encodes the data."""
GRADIENTS_BEFORE = 4
"""Log lines before a gradient's norm is judged by their median."""


def track(config: MethodConfig, out: Path, device: str | None) -> Accelerator:
    """The accelerator, with the trackers that the run asks for; they write under ``out/tracked``.

    Raises:
        WrongCommand: a tracker's package is not installed.
    """
    for name in config.trackers:
        if find_spec(PACKAGES[name]) is None:
            raise WrongCommand(
                f"the tracker {name!r} needs a package that is not installed: pip install {PACKAGES[name]}, or set trackers to []"
            )
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_dir=out / "tracked" if config.trackers else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


def watchers(run: Run[Any], stage: Stage, name: str, title: str) -> list[Callback]:
    """The callbacks of a stage, in the main process; none in others."""
    config, found = run.config, list[Callback]()
    if not run.accelerator.is_main_process:
        return found
    if config.trackers:
        run.accelerator.init_trackers("ddil", config={"stage": name, "method": config.method, "seed": config.seed})

        def send(step: int, means: dict[str, float] | None) -> None:
            if means is not None:
                run.accelerator.log({f"{name}/{key}": value for key, value in means.items()}, step)

        found.append(send)
    if config.watch is not None and stage.sampling is not None:
        found.append(Watch(run.model, run.pool, stage, run.reflection, config.watch, run.data, run.out, name, title))
    return found


class Watch:
    """Draws a fixed set of prompts every so often, as the student would be sampled; writes a grid and a line of figures, and warns.

    Figures go to ``log.jsonl`` beside the training's own, under ``watch``; grids to ``grids/STAGE-STEP.png``, a prompt a row.
    """

    def __init__(
        self,
        model: Model,
        pool: LatentPool,
        stage: Stage,
        reflection: Reflection,
        config: WatchConfig,
        data: str,
        out: Path,
        name: str,
        title: str,
    ) -> None:
        assert stage.sampling is not None
        self.model, self.pool, self.stage, self.reflection, self.config = model, pool, stage, reflection, config
        self.sampling: Sampling = stage.sampling
        self.out, self.name, self.title = out, name, title
        prompts = open_data(data).prompts(config.prompts)
        self.samples = [Sample(prompt.id, image) for prompt in prompts for image in range(config.images)]
        self.texts = [prompt.text for prompt in prompts for _ in range(config.images)]
        self.norms: list[float] = []

    def __call__(self, step: int, means: dict[str, float] | None) -> None:
        found = [] if means is None else self._gradients(means)
        if step % self.config.every == 0 or step == self.stage.updates:
            z = self.draw()
            figures = look(z.float().cpu(), self.pool, self.reflection, self.config.images)
            self._write(step, figures)
            save_image_grid(self.model.decode(z), self.config.images, self.out / "grids" / f"{self.name}-{step}.png")
            found += alarms(figures, self.config)
        for sentence in found:
            warn(f"{self.title}, update {step}: {sentence}")

    def draw(self) -> Tensor:
        """Latents [prompts · images, C, H, W] of the student as it is now."""
        denoiser = self.stage.denoiser()
        called = f"the student of {self.model.reference}"
        student = replace(self.model, reference=called, denoiser=denoiser, sampling=self.sampling)
        with evaluating(denoiser.net):
            return sample_latents(student, self.samples, self.texts, self.sampling, seed=0)

    def _gradients(self, means: dict[str, float]) -> list[str]:
        norm = means.get("gradient_norm", 0.0)
        usual = statistics.median(self.norms) if len(self.norms) >= GRADIENTS_BEFORE else math.inf
        self.norms.append(norm)
        if math.isfinite(norm) and norm <= self.config.gradient * usual:
            return []
        return [f"the gradient's norm is {norm:.3g}, and {usual:.3g} is usual; lower learning_rate"]

    def _write(self, step: int, figures: dict[str, float]) -> None:
        append_line(self.out / "log.jsonl", json.dumps({"stage": self.title, "step": step, "watch": figures}))


def look(z: Tensor, pool: LatentPool, reflection: Reflection, images: int) -> dict[str, float]:
    """Figures of latents [P · images, C, H, W], ``images`` a prompt, against the data's: see ``WatchConfig``.

    ``mean_shift`` is the worst channel's, beyond the two standard errors by which so few prompts are off without any fault;
    ``deviation_low`` and ``deviation_high`` are the smallest and largest ratio of a channel.
    """
    data = pool.mean.float()
    mean, deviation = data.mean((0, 2, 3)), data.std((0, 2, 3))
    chance = 2 * data.mean((2, 3)).std(0) / math.sqrt(len(z) / images)
    ratio = z.std((0, 2, 3)) / deviation
    groups = z.unflatten(0, (-1, images)).flatten(2)
    within = torch.stack([torch.pdist(group).mean() for group in groups]).mean()
    apart = (data[::2][: len(data) // 2] - data[1::2]).flatten(1).norm(dim=1).mean()
    return {
        "mean_shift": float((((z.mean((0, 2, 3)) - mean).abs() - chance).clamp(min=0) / deviation).max()),
        "deviation_low": float(ratio.min()),
        "deviation_high": float(ratio.max()),
        "clipped": float(reflection.to("cpu").clipped_fraction(z)),
        "diversity": float(within / apart),
    }


def alarms(figures: dict[str, float], config: WatchConfig) -> list[str]:
    """One sentence for everything that is past its bound."""
    low, high = config.deviation
    tests = (
        (figures["mean_shift"] > config.mean_shift, "the latents' mean is {mean_shift:.2f} deviations off the data's"),
        (
            figures["deviation_low"] < low,
            "the student collapses: a channel has {deviation_low:.2f} of the data's deviation",
        ),
        (
            figures["deviation_high"] > high,
            "the student saturates: a channel has {deviation_high:.2f} of the data's deviation",
        ),
        (
            figures["clipped"] > config.clipped,
            "the student saturates: {clipped:.1%} of its latents lie outside the data's range",
        ),
        (
            figures["diversity"] < config.diversity,
            "the student collapses: pictures of one prompt differ {diversity:.2f} times as much as two pictures of the data",
        ),
        (not all(map(math.isfinite, figures.values())), "the student draws what is no number"),
    )
    return [sentence.format(**figures) for past, sentence in tests if past]


def save_image_grid(pictures: np.ndarray, columns: int, path: Path) -> None:
    """Pictures uint8 [R · columns, H, W, 3] as one PNG, in rows of ``columns``."""
    from PIL import Image

    rows: Sequence[np.ndarray] = [
        np.concatenate(list(pictures[start : start + columns]), axis=1) for start in range(0, len(pictures), columns)
    ]
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate(rows, axis=0)).save(temporary, format="PNG")
