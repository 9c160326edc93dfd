"""The named systems: the rows of ``protocols/systems.yaml``, with the sampling that their authors use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ddil_core.support.errors import DdilError
from ddil_core.support.protocol import GuidanceScale, Strict, read_yaml, validate
from ddil_core.support.resources import protocols

if TYPE_CHECKING:
    from ddil_core.diffusion.parameterization import Prediction

PIPELINE_FILES = ("model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors")
"""Patterns for the files of a pipeline in a hub repository. The only weights are safetensors."""


class HubFiles(Strict):
    """One file of weights in a hub repository. It replaces a pipeline's U-Net or adapts it.

    Attributes:
        source: The hub id.
        file: The name of the file in the repository.
        revision: The hub's revision.
    """

    source: str
    file: str
    revision: str | None = None


class SystemSpec(Strict):
    """A row. A fact that nobody read at its source is None and prints "unverified".

    Attributes:
        title: The name in tables.
        source: The hub id of a whole pipeline. None: a user's own folder, or the pipeline of ``base``.
        revision: The hub's revision of ``source``.
        files: Patterns for the files of ``source`` that are needed.
        licence: The licence of the weights.
        base: The system that lends its pipeline.
        unet: Weights that replace the U-Net of ``base``.
        lora: A LoRA for the pipeline of ``base``.
        layout: The name of diffusers' pipeline class.
        prediction: What the network predicts. None: the scheduler says it.
        solver: The solver.
        spacing: How ``steps`` timesteps are spaced (``ddil_core.diffusion.schedule.SPACINGS``).
        offset: Added to each timestep of the spacing.
        timesteps: The timesteps themselves, in place of ``spacing``.
        steps: The number of steps.
        step_range: A distilled system's smallest and largest number of steps. None: exactly ``steps``.
        guidance_scale: g of ε_∅ + g (ε_c − ε_∅). 1 is no guidance. None: the default of diffusers' pipeline.
        guidance_convention: How the authors write their guidance scale.
        distilled: Whether the system was distilled for this sampling.
        w_embedding: Width of the embedding of the guidance scale. None: the network has none.
        resolution: Side of the images in pixels.
    """

    title: str
    source: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = PIPELINE_FILES
    licence: str | None = None
    base: str | None = None
    unet: HubFiles | None = None
    lora: HubFiles | None = None
    layout: str = "StableDiffusionPipeline"
    prediction: Literal["epsilon", "v_prediction", "sample", "flow", "rectified_flow"] | None = None
    solver: str = "ddim"
    spacing: str = "even"
    offset: int = Field(default=0, ge=0)
    timesteps: tuple[int, ...] | None = None
    steps: int | None = Field(default=None, ge=1)
    step_range: tuple[int, int] | None = None
    guidance_scale: GuidanceScale | None = None
    guidance_convention: str | None = None
    distilled: bool = False
    w_embedding: int | None = Field(default=None, ge=1)
    resolution: int | None = Field(default=None, ge=8)

    @model_validator(mode="after")
    def _parts_fit(self) -> SystemSpec:
        if (self.unet or self.lora) and self.base is None:
            raise ValueError("a system with its own 'unet' or 'lora' must name the 'base' with the pipeline for them")
        if self.timesteps is not None and self.steps != len(self.timesteps):
            raise ValueError(f"'steps' is {self.steps}, and there are {len(self.timesteps)} 'timesteps'")
        return self


@dataclass(frozen=True)
class Files:
    """The local files of a reference.

    Attributes:
        folder: A pipeline in diffusers' layout. With ``checkpoint``, only its configuration is read.
        unet: Weights (safetensors) that replace the pipeline's U-Net.
        lora: A LoRA (safetensors) for the pipeline.
        system: The row that says how the model is sampled. None: the folder says it.
        checkpoint: A single file with the weights of the whole pipeline, in the names of Stable Diffusion's first
            authors.
        prediction: What the network predicts, as ``checkpoint`` says. None: the file does not say it.
    """

    folder: Path
    unet: Path | None = None
    lora: Path | None = None
    system: SystemSpec | None = None
    checkpoint: Path | None = None
    prediction: Prediction | None = None


@cache
def load_systems() -> dict[str, SystemSpec]:
    """Return all rows of the shipped ``systems.yaml`` by name, in the order of the file.

    Raises:
        WrongCommand: a row has an unknown key or a bad value.
        DdilError: a row names a ``base`` that is no row.
    """
    path = protocols() / "systems.yaml"
    systems = {name: validate(SystemSpec, row, f"{path}, row {name!r},") for name, row in read_yaml(path).items()}
    for name, system in systems.items():
        if system.base is not None and system.base not in systems:
            raise DdilError(f"{path}, row {name!r}, has the base {system.base!r}, which is no row of the file")
    return systems
