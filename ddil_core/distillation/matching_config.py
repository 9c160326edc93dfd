"""The configuration of distribution matching (DMD2)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ddil_core.distillation.config import Beta, Collection, MethodConfig
from ddil_core.distillation.lora_config import LoraConfig
from ddil_core.support.protocol import GuidanceScale, Strict


class GanConfig(Strict):
    """The discriminator on the features of the critic's middle block.

    Attributes:
        generator_weight: The weight of its loss for the generator.
        critic_weight: The weight of its loss for the critic.
    """

    generator_weight: float = Field(default=5e-3, ge=0)
    critic_weight: float = Field(default=1e-2, ge=0)


class RegressionConfig(Strict):
    """Pre-training of the generator on pairs of noise and the teacher's latents.

    Attributes:
        pairs: The number of pairs.
        teacher_steps: The DDIM steps in which the guided teacher makes the latents.
        updates: The number of updates.
        learning_rate: The learning rate of the pre-training; None for ``learning_rate`` of the run.
        weight: The weight of the same loss beside the matching loss. DMD (Yin et al., 2311.18828) has such a loss, of
            LPIPS between images in place of squares of latents. With 0 the pairs serve the pre-training alone, as in
            DMD2.
    """

    pairs: int = Field(ge=1)
    teacher_steps: int = Field(ge=1)
    updates: int = Field(ge=1)
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    weight: float = Field(default=0.0, ge=0)


class MatchingConfig(MethodConfig):
    """Distribution matching (DMD2). An update of the run is one of the generator and ``critic_updates`` of the critic.

    An update draws 1 + ``critic_updates`` batches, and ``ddil.collect_every`` counts batches.

    Attributes:
        updates: The number of updates.
        timesteps: The timesteps of the generator, from noise to data. On a flow they count before the shift: of 1000
            timesteps n stands for the shifted time of (n + 1)/1000.
        guidance_scale: The guidance of the real score; None for the teacher's own.
        critic_updates: Updates of the critic for each one of the generator.
        critic_learning_rate: The learning rate of the critic; None for ``learning_rate``.
        matching_range: The timesteps at which the scores are compared. On a flow they are shifted as ``timesteps`` are.
        gan: The discriminator; None for none.
        regression: Pre-training of the generator; None for none.
        teacher_steps: The steps of the teacher's rollouts with ``ddil``, a multiple of the number of ``timesteps``.
        lora: Adapters to train in place of a whole generator. The critic then trains adapters of its own, on the same
            frozen base.
    """

    LATER: ClassVar[tuple[str, ...]] = (*MethodConfig.LATER, "lora")

    method: Literal["dmd2"] = "dmd2"
    updates: int = Field(ge=1)
    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    guidance_scale: GuidanceScale | None = None
    critic_updates: int = Field(default=5, ge=1)
    critic_learning_rate: float | None = Field(default=None, gt=0, le=1)
    matching_range: tuple[int, int] = (20, 980)
    gan: GanConfig | None = None
    regression: RegressionConfig | None = None
    teacher_steps: int = Field(default=16, ge=1)
    lora: LoraConfig | None = None
    learning_rate_decay: bool = False
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_clip: float = Field(default=10.0, gt=0)
    warmup: int = Field(default=500, ge=0)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _steps_fit(self) -> MatchingConfig:
        times = self.timesteps
        if not times or min(times) < 1 or any(a <= b for a, b in pairwise(times)):
            raise ValueError(f"timesteps fall and stay above 0, which {list(times)} do not")
        low, high = self.matching_range
        if not 0 <= low <= high:
            raise ValueError(f"matching_range is a range of timesteps, and {low} to {high} is none")
        if self.ddil is not None and len(times) == 1:
            raise ValueError(
                "a one-step generator starts at noise alone, so there is nothing to aggregate; say --no-ddil"
            )
        if self.ddil is not None and self.teacher_steps % len(times):
            raise ValueError(
                f"teacher_steps is a multiple of the {len(times)} timesteps, which {self.teacher_steps} is not"
            )
        return self

    @property
    def student_steps(self) -> int:
        return len(self.timesteps)

    def teacher_use(self) -> dict[str, Any]:
        rollouts = {} if self.ddil is None else {"steps": self.teacher_steps, "solver": "ddim"}
        return rollouts | {"guidance_scale": self.guidance_scale}

    def collections(self) -> tuple[Collection, ...]:
        return (Collection("DMD2", self.updates * (1 + self.critic_updates), (len(self.timesteps),) * 2),)
