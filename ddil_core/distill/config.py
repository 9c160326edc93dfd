"""What a distillation run is told, as data (``protocols/*/pd.yaml``)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ddil_core.parameterization import ReflectionMode
from ddil_core.protocol import Strict


class StageConfig(Strict):
    """One stage: the student's steps (its teacher takes twice as many) and how many updates it is trained for."""

    steps: int = Field(ge=1)
    updates: int = Field(ge=1)


class ConvertConfig(Strict):
    """How a teacher that predicts ε is first made to predict v: how many updates, and the share of rows that are told nothing.
    Not used where the teacher predicts v already."""

    updates: int = Field(ge=1)
    unconditional: float = Field(default=0.1, ge=0, le=1)


class ReflectionConfig(Strict):
    """How the teacher's x̂ is kept inside the data's range; the bound is calibrated on the encoded data."""

    mode: ReflectionMode = "clamp"
    quantile: float = Field(default=0.9995, gt=0.5, le=1)


class PhaseConfig(Strict):
    """A part of a stage (Algorithm 2), up to the share ``until`` of its updates: which share of a batch is aggregated states,
    and with which probability the teacher acts in the rollouts that are collected."""

    until: float = Field(gt=0, le=1)
    aggregated: float = Field(ge=0, le=1)
    p_teacher: float = Field(ge=0, le=1)


class DdilConfig(Strict):
    """The aggregated dataset: how often a state is used, how many updates one collection serves, the most states kept."""

    uses: int = Field(default=1, ge=1)
    collect_every: int = Field(default=50, ge=1)
    capacity: int = Field(default=8192, ge=1)
    phases: tuple[PhaseConfig, ...]

    @field_validator("phases")
    @classmethod
    def _phases_end_at_one(cls, phases: tuple[PhaseConfig, ...]) -> tuple[PhaseConfig, ...]:
        ends = [phase.until for phase in phases]
        if not ends or ends[-1] != 1 or ends != sorted(set(ends)):
            raise ValueError("the phases' 'until' must rise and end at 1")
        return phases


class DistillConfig(Strict):
    """A run of progressive distillation. ``ddil`` None trains on forward-diffused data alone.

    ``teacher_batch_size`` is how many states the teacher takes at once, collecting or labelling data for some updates ahead: it
    needs no gradients, so that there is room for more than ``batch_size``. ``teacher_dtype`` and ``student_dtype`` are those of the
    denoising networks' weights; the average that becomes the output is float32, and so are the autoencoder and the text encoders.
    ``mixed_precision`` is that of the arithmetic.
    """

    method: Literal["pd"] = "pd"
    guidance_scale: float | None = Field(default=None, ge=0)
    reflection: ReflectionConfig = ReflectionConfig()
    convert: ConvertConfig | None = None
    stages: tuple[StageConfig, ...]
    batch_size: int = Field(default=32, ge=1)
    teacher_batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup: int = Field(default=50, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    pool: int = Field(default=16384, ge=1)
    mixed_precision: Literal["no", "bf16"] = "no"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    student_dtype: Literal["float32", "bfloat16"] = "float32"
    save_every: int = Field(default=250, ge=1)
    seed: int = 0
    ddil: DdilConfig | None = None

    @model_validator(mode="after")
    def _stages_halve(self) -> DistillConfig:
        steps = [stage.steps for stage in self.stages]
        if not steps or any(after * 2 != before for before, after in pairwise(steps)):
            raise ValueError(f"each stage has half the steps of the one before, which {steps} do not")
        return self
