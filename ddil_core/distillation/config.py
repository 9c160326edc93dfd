"""What a distillation run is told, as data (``protocols/*/{pd,lcm,dmd2}.yaml``): one model for each method, on a shared base."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from ddil_core.diffusion.parameterization import ReflectionMode
from ddil_core.support.protocol import GuidanceScale, Strict


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
    on the mean over updates, and with which probability the teacher acts in the rollouts that are collected.

    Where a rollout has one actor (LCM, DMD2), a state comes from data with probability 1 − ``aggregated``, from a teacher's rollout
    with ``aggregated`` · ``p_teacher``, and from a student's with the rest.
    """

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


class WatchConfig(Strict):
    """What is looked at every ``every`` updates, on a fixed set of prompts with fixed noise, and from where on it is an alarm.

    All of it is relative to the encoded data: ``mean_shift`` in their deviations, ``deviation`` as a ratio, ``diversity`` as the
    distance between pictures of one prompt over that between two pictures of the data, ``clipped`` as the share of a latent outside
    the reflection's bound. ``gradient`` is the most that a gradient's norm may be, in medians of the norms before it.
    """

    every: int = Field(default=500, ge=1)
    prompts: int = Field(default=4, ge=1)
    images: int = Field(default=4, ge=2)
    mean_shift: float = Field(default=0.5, gt=0)
    deviation: tuple[float, float] = (0.6, 1.5)
    clipped: float = Field(default=0.02, gt=0, le=1)
    diversity: float = Field(default=0.1, ge=0)
    gradient: float = Field(default=20.0, gt=1)


class MethodConfig(Strict):
    """What every method is told. ``ddil`` None trains without the aggregated dataset.

    ``batch_size`` is the whole batch, of all processes together. ``teacher_batch_size`` is the most states that a process
    takes at once where no gradients are needed: in rollouts, labels of data for some updates ahead, targets and backward
    simulation. A guided teacher evaluates two rows of each state. ``gradient_accumulation`` is into how many parts a process
    takes its rows of a batch, one after another, and ``gradient_checkpointing`` computes activations twice: both for memory.
    Parts change a gradient by rounding alone, which Adam amplifies over many updates. ``learning_rate_decay`` brings the
    learning rate to zero at a stage's end. ``teacher_dtype`` and ``student_dtype`` are those of the denoising networks. The
    weights that the optimiser moves and their average are float32, and so are the autoencoder and the text encoders.
    ``mixed_precision`` is that of the arithmetic.

    ``CHANGEABLE`` names the keys on which what is learnt does not depend, up to the rounding of sums that are taken in another
    order: they are no part of a run's identity, and may be changed when it is resumed.
    """

    CHANGEABLE: ClassVar[tuple[str, ...]] = (
        "teacher_batch_size",
        "gradient_accumulation",
        "gradient_checkpointing",
        "save_every",
        "trackers",
        "watch",
        "ddil.capacity",
    )

    reflection: ReflectionConfig = ReflectionConfig()
    batch_size: int = Field(default=32, ge=1)
    teacher_batch_size: int = Field(default=64, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "fused", "8bit"] = "adamw"
    learning_rate: float = Field(default=3e-4, gt=0)
    learning_rate_decay: bool = True
    warmup: int = Field(default=50, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    pool: int = Field(default=16384, ge=1)
    mixed_precision: Literal["no", "bf16"] = "no"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    student_dtype: Literal["float32", "bfloat16"] = "float32"
    save_every: int = Field(default=250, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    watch: WatchConfig | None = None
    seed: int = Field(default=0, ge=0)
    ddil: DdilConfig | None = None
    method: str

    @model_validator(mode="after")
    def _batch_divides(self) -> MethodConfig:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"gradient_accumulation takes a batch in equal parts, and {self.batch_size} is not divisible by "
                f"{self.gradient_accumulation}"
            )
        return self

    def collections(self) -> tuple[Collection, ...]:
        """Where the aggregated dataset is filled, stage by stage."""
        return ()


class Collection(NamedTuple):
    """A stage that fills the aggregated dataset: its title, how many batches it draws, and how many states a trajectory has, in
    which both act, or one that is the teacher's and one that is the student's."""

    title: str
    draws: int
    lengths: tuple[int, ...]


class ProgressiveConfig(MethodConfig):
    """A run of progressive distillation: ``stages`` that halve the steps, the first from the guided teacher."""

    method: Literal["pd"] = "pd"
    guidance_scale: GuidanceScale | None = None
    convert: ConvertConfig | None = None
    stages: tuple[StageConfig, ...]

    @model_validator(mode="after")
    def _stages_halve(self) -> ProgressiveConfig:
        steps = [stage.steps for stage in self.stages]
        if not steps or any(after * 2 != before for before, after in pairwise(steps)):
            raise ValueError(f"each stage has half the steps of the one before, which {steps} do not")
        return self

    @property
    def student_steps(self) -> int:
        return self.stages[-1].steps

    def collections(self) -> tuple[Collection, ...]:
        return tuple(Collection(f"{2 * s.steps} → {s.steps} steps", s.updates, (s.steps,)) for s in self.stages)


class LoraConfig(Strict):
    """Low-rank adapters in place of a student of its own: α/rank scales what they add."""

    rank: int = Field(default=64, ge=1)
    alpha: int = Field(default=64, ge=1)


class ConsistencyConfig(MethodConfig):
    """A run of consistency distillation (LCM). Guidance is drawn from ``guidance_range``, as g = w + 1; the student is told it
    through an embedding of ``w_embedding`` numbers, or, in the form with ``lora``, not at all. It is sampled at ``guidance_scale``.

    ``teacher_steps`` is the number of the teacher's DDIM steps from noise to data, 50 in LCM, each of 20 timesteps: with fewer,
    what is known near the data reaches the noise in fewer updates. ``weighting`` v divides the loss at t by σ_t, so that an error
    counts for what it is in v; LCM has none, and then a network that learns fast is hardly held to what it gives near the data.
    ``ema_decay`` is that of the target network, without a warm-up; the form with ``lora`` has none.
    """

    method: Literal["lcm"] = "lcm"
    updates: int = Field(ge=1)
    teacher_steps: int = Field(default=50, ge=1)
    student_steps: int = Field(default=4, ge=1)
    guidance_range: tuple[GuidanceScale, GuidanceScale] = (6.0, 16.0)
    guidance_scale: GuidanceScale = Field(default=8.5, ge=1)
    loss: Literal["huber", "l2"] = "huber"
    huber_c: float = Field(default=0.001, gt=0)
    weighting: Literal["none", "v"] = "none"
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    w_embedding: int | None = Field(default=256, ge=4)
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> ConsistencyConfig:
        if self.student_steps > self.teacher_steps:
            raise ValueError(
                f"student_steps is at most teacher_steps, {self.teacher_steps}, and not {self.student_steps}"
            )
        low, high = self.guidance_range
        if not 1 <= low <= high:
            raise ValueError(f"guidance_range is a range of g, from 1 upwards, and {low:g} to {high:g} is none")
        if self.lora is not None and self.w_embedding is not None:
            raise ValueError("a LoRA has no embedding of its guidance; set w_embedding to null")
        if self.lora is None and self.w_embedding is None:
            raise ValueError("a student without a LoRA is told its guidance by w_embedding (256 in LCM)")
        return self

    def collections(self) -> tuple[Collection, ...]:
        return (Collection("LCM", self.updates, (self.teacher_steps, self.student_steps)),)


class GanConfig(Strict):
    """The discriminator on the critic's mid-block, and the weights of its loss for the generator and for the critic."""

    generator_weight: float = Field(default=5e-3, ge=0)
    critic_weight: float = Field(default=1e-2, ge=0)


class RegressionConfig(Strict):
    """A generator's pre-training: ``pairs`` of noise and what the guided teacher makes of it in ``teacher_steps`` of DDIM."""

    pairs: int = Field(ge=1)
    teacher_steps: int = Field(ge=1)
    updates: int = Field(ge=1)


class MatchingConfig(MethodConfig):
    """A run of distribution matching (DMD2). An update is one of the generator and ``critic_updates`` of its critic.

    ``guidance_scale`` is that of the real score. ``teacher_steps``, for the teacher's rollouts of ``ddil``, is a multiple of the
    number of ``timesteps``. With ``ddil``, ``collect_every`` counts batches, of which an update has 1 + ``critic_updates``. The
    generator's EMA is the output; with ``ema_decay`` 0 it is the generator itself.
    """

    method: Literal["dmd2"] = "dmd2"
    updates: int = Field(ge=1)
    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    guidance_scale: GuidanceScale | None = None
    critic_updates: int = Field(default=5, ge=1)
    critic_learning_rate: float | None = Field(default=None, gt=0)
    matching_range: tuple[int, int] = (20, 980)
    gan: GanConfig | None = None
    regression: RegressionConfig | None = None
    teacher_steps: int = Field(default=16, ge=1)
    learning_rate_decay: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
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
                "a one-step generator only ever sees noise, so that there is nothing to aggregate: say --no-ddil"
            )
        if self.ddil is not None and self.teacher_steps % len(times):
            raise ValueError(
                f"teacher_steps is a multiple of the {len(times)} timesteps, which {self.teacher_steps} is not"
            )
        return self

    @property
    def student_steps(self) -> int:
        return len(self.timesteps)

    def collections(self) -> tuple[Collection, ...]:
        return (Collection("DMD2", self.updates * (1 + self.critic_updates), (len(self.timesteps),) * 2),)
