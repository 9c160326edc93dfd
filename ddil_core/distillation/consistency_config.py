"""The configuration of consistency distillation (LCM), also as a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ddil_core.distillation.config import Collection, MethodConfig
from ddil_core.distillation.lora_config import LoraConfig
from ddil_core.support.protocol import GuidanceScale

LCM_RANGE, LCM_GUIDANCE = (6.0, 16.0), 8.5
"""The guidance scales at which LCM trains on Stable Diffusion, and at which diffusers samples its students."""


def _guidance_inside(settings: dict[str, Any]) -> float:
    """Return LCM's guidance scale if the range of the settings holds it, else the middle of the range."""
    low, high = settings.get("guidance_range", LCM_RANGE)
    return LCM_GUIDANCE if low <= LCM_GUIDANCE <= high else float(low + high) / 2


class ConsistencyConfig(MethodConfig):
    """Consistency distillation (LCM).

    Attributes:
        updates: The number of updates.
        teacher_steps: The teacher's DDIM steps from noise to data; 50 in LCM. With fewer steps, what the student knows
            near the data reaches the noise in fewer updates. On a flow it is a multiple of ``student_steps``.
        student_steps: The steps in which the student is sampled.
        guidance_range: The range of the guidance scale g = w + 1, which is drawn for every state.
        guidance_scale: The guidance scale at which the student is sampled, inside ``guidance_range``. Defaults to LCM's
            8.5, or to the middle of a range without 8.5. A student without ``w_embedding`` has its guidance built in
            and does not use it.
        loss: Pseudo-Huber with the constant ``huber_c``, or squared.
        huber_c: The constant c of the pseudo-Huber loss √(d² + c²) − c.
        weighting: "v" divides the loss at t by σ_t, so that an error counts as it does in v. LCM has "none"; a network
            that learns fast then forgets what it should give near the data.
        ema_decay: The decay of the target network, without a warm-up. With a LoRA there is no average.
        w_embedding: The width of the embedding that gives the guidance to the student. None builds the guidance of
            ``guidance_range`` into the student. A LoRA has none, and a configuration with ``lora`` may leave it out.
            A transformer has no place for one.
        lora: Adapters to train in place of a whole student.
    """

    WITHOUT_LORA: ClassVar[tuple[str, ...]] = ("w_embedding",)

    method: Literal["lcm"] = "lcm"
    updates: int = Field(ge=1)
    teacher_steps: int = Field(default=50, ge=1)
    student_steps: int = Field(default=4, ge=1)
    guidance_range: tuple[GuidanceScale, GuidanceScale] = LCM_RANGE
    guidance_scale: GuidanceScale = Field(default_factory=_guidance_inside)
    loss: Literal["huber", "l2"] = "huber"
    huber_c: float = Field(default=0.001, gt=0)
    weighting: Literal["none", "v"] = "none"
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    w_embedding: int | None = Field(default=256, ge=4)
    lora: LoraConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _lora_has_no_embedding(cls, content: Any) -> Any:
        with_lora = isinstance(content, Mapping) and content.get("lora") is not None
        return {"w_embedding": None} | dict(content) if with_lora else content

    @model_validator(mode="after")
    def _fits(self) -> ConsistencyConfig:
        if self.student_steps > self.teacher_steps:
            raise ValueError(
                f"student_steps is at most teacher_steps, {self.teacher_steps}, and not {self.student_steps}"
            )
        low, high = self.guidance_range
        if not 1 <= low <= high:
            raise ValueError(f"guidance_range is a range of g, from 1 upwards, and {low:g} to {high:g} is none")
        if not low <= self.guidance_scale <= high:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale:g}, outside guidance_range, {low:g} to {high:g}, in which the "
                "student is trained; choose one inside, or another range"
            )
        if self.lora is not None and self.w_embedding is not None:
            raise ValueError("a LoRA has no embedding of its guidance; set w_embedding to null")
        return self

    def collections(self) -> tuple[Collection, ...]:
        return (Collection(self.method.upper(), self.updates, (self.teacher_steps, self.student_steps)),)

    @classmethod
    def of_run(cls, written: dict[str, Any], own: float) -> Self:
        low, high = written.get("guidance_range", LCM_RANGE)
        if not low <= written.get("guidance_scale", LCM_GUIDANCE) <= high:
            # Earlier versions wrote 8.5 whatever the range. No update depends on it.
            written = {key: value for key, value in written.items() if key != "guidance_scale"}
        return super().of_run(written, own)

    def teacher_use(self) -> dict[str, Any]:
        return {"steps": self.teacher_steps, "solver": "ddim", "guidance_scale": list(self.guidance_range)}
