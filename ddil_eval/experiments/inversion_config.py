"""Prompt inversion as data: the teacher, the images, the inverters, and the systems that draw from the prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ddil_core.inversion.inverters import get_inverter
from ddil_core.inversion.towers import SHAPES
from ddil_core.inversion.words import Vocabulary
from ddil_core.support.compute import ComputeKeys
from ddil_core.support.protocol import GuidanceScale, renamed
from ddil_core.support.size import SizeKeys
from ddil_eval.experiments.results import figures_folder
from ddil_eval.experiments.system_configs import SystemConfig, refuse_names
from ddil_eval.metrics import METRICS

LPIPS = ("lpips_diversity", "lpips_efflite0")
"""The metric of Table 5, and the one for machines without AlexNet's weights."""


class InversionConfig(ComputeKeys, SizeKeys):
    """Prompt inversion as data.

    The keys of ``ComputeKeys`` say how the models that draw compute. Images are inverted in float32.

    Attributes:
        experiment: The name of the experiment.
        teacher: The reference of the model on which images are inverted.
        guidance_scale: The teacher's guidance scale, also in rows of the same model. Defaults to its own.
        data: The reference of the data set.
        towers: The folder of the CLIP that chooses prompts and compares images. Defaults to the one of the shapes
            world. Elsewhere it may be left out where no inverter needs it; images are then not compared by CLIP.
        vocabulary: The words that prompts may hold. Defaults to whole words; in the shapes world, to those of its
            captions.
        inverter: The systems draw from the prompts of this inverter.
        inverters: The inverters to run, with their settings.
        systems: The rows.
        differences: Pairs of names; the second is subtracted from the first.
        num_images: The number of images to invert.
        images_per_prompt: The number of images that each system draws from a prompt.
        choosing_steps: The number of the teacher's steps for the images by which a prompt is chosen. Defaults to its
            own.
        choosing_images: The number of those images for each candidate.
        lpips: The metric between images. Defaults to LPIPS' own network where its weights are here.
        batch_size: The number of images that are inverted at a time.
        draw_batch_size: The number of images that are drawn at a time.
        figures: The number of inverted images to draw a figure of.
        seed: The seed of all noise.
    """

    experiment: Literal["prompt-inversion"] = "prompt-inversion"
    teacher: str = "shapes"
    guidance_scale: GuidanceScale | None = None
    data: str = "shapes"
    towers: str | None = None
    vocabulary: Vocabulary | None = None
    inverter: str = "ph2p"
    inverters: dict[str, dict[str, Any]] = Field(default={"ph2p": {}}, min_length=1)
    systems: tuple[SystemConfig, ...] = Field(min_length=1)
    differences: tuple[tuple[str, str], ...] = ()
    num_images: int = Field(default=32, ge=2)
    images_per_prompt: int = renamed("images_per_prompt", default=10, ge=2)
    choosing_steps: int | None = Field(default=None, ge=1)
    choosing_images: int = renamed("choosing_images", default=1, ge=1)
    lpips: Literal["lpips_diversity", "lpips_efflite0"] | None = None
    batch_size: int = Field(default=16, ge=1)
    draw_batch_size: int = Field(default=64, ge=1)
    figures: int = Field(default=32, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _names_fit(self) -> InversionConfig:
        refuse_names(self.systems, self.differences, "table5")
        if self.inverter not in self.inverters:
            raise ValueError(f"the inverter {self.inverter!r} is none of those to be run, {', '.join(self.inverters)}")
        return self

    def figures_folder(self, out: Path) -> Path:
        """Return the folder of the figures and strips of the inverted images, below the results folder ``out``."""
        shown = {self.inverter: self.inverters[self.inverter]}  # of the others there are no figures
        return figures_folder(self.model_copy(update={"inverters": shown}), out)

    def guided(self, system: SystemConfig) -> SystemConfig:
        """Return a row. Where the row is of the teacher, the teacher's guidance scale is its default."""
        if system.model != self.teacher or system.guidance_scale is not None:
            return system
        return system.model_copy(update={"guidance_scale": self.guidance_scale})

    @property
    def clip(self) -> str | None:
        """The reference of the towers."""
        return SHAPES if self.towers is None and self.data == SHAPES else self.towers

    @property
    def inverters_with_towers(self) -> tuple[str, ...]:
        """The names of the inverters that need the towers."""
        rows = {name: get_inverter(name, settings) for name, settings in self.inverters.items()}
        return tuple(name for name, (inverter, settings) in rows.items() if inverter.needs_towers(settings))

    @property
    def distance(self) -> str:
        """The name of the metric between images."""
        return self.lpips or next((name for name in LPIPS if METRICS[name].missing() is None), LPIPS[-1])
