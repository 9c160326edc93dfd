"""Watching of a run: trackers, grids of images, and warnings where a student collapses or saturates.

Watching changes nothing in the training, because its images have their own noise.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.noise import Sample
from ddil_core.diffusion.parameterization import Reflection
from ddil_core.distillation.config import WatchConfig
from ddil_core.distillation.dropout import evaluating
from ddil_core.distillation.loop import Callback
from ddil_core.distillation.run import Run
from ddil_core.distillation.sharding import whole
from ddil_core.distillation.stage import Stage
from ddil_core.models.generate import sample_latents
from ddil_core.models.memory import on_device
from ddil_core.models.sampling import Sampling
from ddil_core.support.files import append_line
from ddil_core.support.image_grids import overview
from ddil_core.support.progress import warn

GRADIENTS_BEFORE = 4
"""Log lines that give a median before a gradient's norm is compared with it."""


def watchers(run: Run[Any], stage: Stage, name: str, title: str) -> list[Callback]:
    """Return the callbacks of a stage. Only the main process has any, and the others where they divide the student."""
    config, callbacks = run.config, list[Callback]()
    main = run.accelerator.is_main_process
    if config.trackers and main:
        run.accelerator.init_trackers("ddil", config={"stage": name, "method": config.method, "seed": config.seed})

        def send(step: int, means: dict[str, float] | None) -> None:
            if means is not None:
                run.accelerator.log({f"{name}/{key}": value for key, value in means.items()}, step)

        callbacks.append(send)
    if config.watch is not None and stage.sampling is not None and (main or stage.sharded):
        callbacks.append(Watch(run, stage, stage.sampling, config.watch, name, title))
    return callbacks


class Watch:
    """Samples the student at fixed prompts during training, and warns where a measurement is past its bound.

    The measurements go to ``log.jsonl``, under ``watch``. The images go to ``grids/NAME-STEP.png``, with their prompts.
    """

    def __init__(
        self, run: Run[Any], stage: Stage, sampling: Sampling, config: WatchConfig, name: str, title: str
    ) -> None:
        """Choose the prompts and their noise.

        Args:
            run: The run that the stage belongs to.
            stage: The stage that trains the student.
            sampling: How the student is sampled.
            config: What is measured, and the bounds.
            name: The name of the stage in files.
            title: The name of the stage in the log and in warnings.
        """
        self.run, self.stage, self.sampling, self.config = run, stage, sampling, config
        self.name, self.title = name, title
        prompts = open_data(run.data).prompts(config.prompts)
        self.samples = [Sample(prompt.id, image) for prompt in prompts for image in range(config.images)]
        self.prompts = [prompt.text for prompt in prompts]
        self.texts = [text for text in self.prompts for _ in range(config.images)]
        self.norms: list[float] = []

    def __call__(self, step: int, means: dict[str, float] | None) -> None:
        warnings = [] if means is None else self._gradient_warnings(means)
        if (step % self.config.every == 0 or step == self.stage.updates) and not self._is_done(step):
            with whole([self.stage.denoiser().net]):  # all processes give their shares, and the main one samples
                z = self.draw() if self.run.accelerator.is_main_process else None
            if z is None:
                return
            measured = measure_latents(z.float().cpu(), self.run.pool, self.run.reflection, self.config.images)
            if self.run.model.layout.images.pictures:
                path = self.run.out / "grids" / f"{self.name}-{step}.png"
                with on_device([self.run.model.pipeline.vae], z.device):
                    images = self.run.model.decode(z)
                overview(images.reshape(-1, self.config.images, *images.shape[1:]), self.prompts, path)
            line = json.dumps({"stage": self.title, "step": step, "watch": measured})
            append_line(self.run.out / "log.jsonl", line)
            warnings += alarms(measured, self.config)
        for sentence in warnings:
            warn(f"{self.title}, update {step}: {sentence}")

    def _is_done(self, step: int) -> bool:
        """Whether the log has an update's line, which is written last: the loop calls again where a run goes on."""
        log = self.run.out / "log.jsonl"
        start = json.dumps({"stage": self.title, "step": step})[:-1] + ', "watch"'
        return log.is_file() and any(line.startswith(start) for line in log.read_text(encoding="utf-8").splitlines())

    def draw(self) -> Tensor:
        """Return latents [prompts · images, C, H, W] of the student as it is now."""
        denoiser = self.stage.denoiser()
        device = self.run.accelerator.device
        reference = f"the student of {self.run.model.reference}"
        student = replace(self.run.model, reference=reference, denoiser=denoiser, sampling=self.sampling)
        with on_device([denoiser.net], device), evaluating(denoiser.net):
            return sample_latents(student, self.samples, self.texts, self.sampling, seed=0)

    def _gradient_warnings(self, means: dict[str, float]) -> list[str]:
        """Return a warning where the gradient's norm is much larger than the median of the earlier norms."""
        norm = means.get("gradient_norm", 0.0)
        usual = statistics.median(self.norms) if len(self.norms) >= GRADIENTS_BEFORE else math.inf
        self.norms.append(norm)
        if math.isfinite(norm) and norm <= self.config.gradient * usual:
            return []
        return [f"the gradient's norm is {norm:.3g}, and {usual:.3g} is usual; lower learning_rate"]


def measure_latents(z: Tensor, pool: LatentPool, reflection: Reflection, images: int) -> dict[str, float]:
    """Compare latents [P · images, C, H, W], ``images`` for each prompt, with the data.

    For the measurements see ``WatchConfig``.

    ``mean_shift`` is that of the worst channel, less the two standard errors by which so few prompts differ by chance.
    ``deviation_low`` and ``deviation_high`` are the smallest and the largest ratio of a channel.
    """
    mean, deviation, mean_deviation, apart = pool.figures
    chance = 2 * mean_deviation / math.sqrt(len(z) / images)
    ratio = z.std((0, 2, 3)) / deviation
    groups = z.unflatten(0, (-1, images)).flatten(2)
    within = torch.stack([torch.pdist(group).mean() for group in groups]).mean()
    return {
        "mean_shift": float((((z.mean((0, 2, 3)) - mean).abs() - chance).clamp(min=0) / deviation).max()),
        "deviation_low": float(ratio.min()),
        "deviation_high": float(ratio.max()),
        "clipped": float(reflection.to("cpu").clipped_fraction(z)),
        "diversity": float(within / apart),
    }


def alarms(measured: dict[str, float], config: WatchConfig) -> list[str]:
    """Return one sentence for each measurement that is past its bound."""
    low, high = config.deviation
    tests = (
        (
            measured["mean_shift"] > config.mean_shift,
            "the latents' mean is {mean_shift:.2f} deviations from the data's mean",
        ),
        (
            measured["deviation_low"] < low,
            "the student collapses: a channel has {deviation_low:.2f} of the data's deviation",
        ),
        (
            measured["deviation_high"] > high,
            "the student saturates: a channel has {deviation_high:.2f} of the data's deviation",
        ),
        (
            measured["clipped"] > config.clipped,
            "the student saturates: {clipped:.1%} of its latents lie outside the data's range",
        ),
        (
            measured["diversity"] < config.diversity,
            "the student collapses: images of one prompt differ {diversity:.2f} times as much as images of the data",
        ),
        (not all(map(math.isfinite, measured.values())), "the student draws numbers that are not finite"),
    )
    return [sentence.format(**measured) for past, sentence in tests if past]
