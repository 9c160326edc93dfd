"""The systems that have a name: one row each of ``protocols/systems.yaml``, with how its authors sample it."""

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
"""What of a hub repository a pipeline is made of; weights as safetensors alone."""


class HubFiles(Strict):
    """One file of weights in a hub repository, in place of a pipeline's U-Net or to adapt it."""

    source: str
    file: str
    revision: str | None = None


class SystemSpec(Strict):
    """A row. What was not read at its source is None and prints "unverified"; nothing is guessed.

    ``source`` is the hub id of a whole pipeline (None: a user's own folder), or ``base`` names the system whose pipeline is taken,
    with ``unet`` in place of its U-Net or ``lora`` on it. ``guidance_scale`` is g of ε_∅ + g (ε_c − ε_∅), 1 for none, None for the
    default of diffusers' pipeline. ``timesteps`` are given outright, or come from ``steps`` and ``spacing``
    (``ddil_core.diffusion.schedule.SPACINGS``). ``distilled`` systems were made for exactly this sampling, or for any
    number of steps in ``step_range``.
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
            raise ValueError("a system with its own 'unet' or 'lora' names the 'base' whose pipeline they go into")
        if self.timesteps is not None and self.steps != len(self.timesteps):
            raise ValueError(f"'steps' is {self.steps}, and there are {len(self.timesteps)} 'timesteps'")
        return self


@dataclass(frozen=True)
class Files:
    """Where the files of a reference lie.

    ``folder`` is a whole pipeline in diffusers' layout; ``unet`` and ``lora`` are safetensors that replace its U-Net or adapt it;
    ``system`` is the row that says how it is sampled (None: the folder says it itself). Where ``checkpoint`` is given, that one
    file has the weights of the whole pipeline, in its first authors' names, and ``folder`` only the configuration; ``prediction``
    is what that file says that its network predicts (None: it does not say).
    """

    folder: Path
    unet: Path | None = None
    lora: Path | None = None
    system: SystemSpec | None = None
    checkpoint: Path | None = None
    prediction: Prediction | None = None


@cache
def load_systems() -> dict[str, SystemSpec]:
    """Every row of the shipped ``systems.yaml``, by name, in the file's order.

    Raises:
        WrongCommand: a row has an unknown key or a value that does not fit.
        DdilError: a row's ``base`` is no row.
    """
    path = protocols() / "systems.yaml"
    systems = {name: validate(SystemSpec, row, f"{path}, row {name!r},") for name, row in read_yaml(path).items()}
    for name, system in systems.items():
        if system.base is not None and system.base not in systems:
            raise DdilError(f"{path}, row {name!r}, has the base {system.base!r}, which is none of its rows")
    return systems
