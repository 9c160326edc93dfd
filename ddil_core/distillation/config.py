"""Configurations of distillation runs: what all methods have in common, and progressive distillation."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from ddil_core.diffusion.parameterization import ReflectionMode
from ddil_core.distillation.lora_config import LoraConfig
from ddil_core.distillation.phases import DdilConfig
from ddil_core.support.compute import NetworkDtypeKeys
from ddil_core.support.protocol import GuidanceScale, Strict
from ddil_core.support.size import SizeKeys

Beta = Annotated[float, Field(ge=0, lt=1)]
"""A decay of AdamW's averages."""


class StageConfig(Strict):
    """One stage.

    Attributes:
        steps: The student's steps, half of its teacher's.
        updates: The number of updates.
    """

    steps: int = Field(ge=1)
    updates: int = Field(ge=1)


class ConvertConfig(Strict):
    """Conversion of a teacher that predicts ε into one that predicts v. Any other teacher needs none.

    Attributes:
        updates: The number of updates.
        unconditional: The share of rows without a caption.
    """

    updates: int = Field(ge=1)
    unconditional: float = Field(default=0.1, ge=0, le=1)


class StudentConfig(ConvertConfig):
    """The network of a student whose teacher is a formula, and its fit to the formula before distillation.

    Attributes:
        width: The number of its features.
        depth: The number of its residual blocks.
        updates: The number of updates of the fit.
        unconditional: The share of rows without a caption in the fit.
    """

    width: int = Field(default=128, ge=4, multiple_of=4)
    depth: int = Field(default=3, ge=1)
    updates: int = Field(default=400, ge=1)


class ReflectionConfig(Strict):
    """Reflection of the teacher's x̂ into the data's range.

    Attributes:
        mode: How x̂ is reflected.
        quantile: The quantile of the encoded data that is the bound.
    """

    mode: ReflectionMode = "clamp"
    quantile: float = Field(default=0.9995, gt=0.5, le=1)


class WatchConfig(Strict):
    """Measurements of the student during training, on fixed prompts with fixed noise.

    A value past its bound is an alarm.

    Attributes:
        every: Updates between two measurements.
        prompts: The number of prompts.
        images: The number of images for each prompt.
        mean_shift: The largest distance between the means of latents and data, in standard deviations of the data.
        deviation: The smallest and the largest ratio of the standard deviations of latents and data.
        clipped: The largest share of the latents' numbers outside the reflection's bound.
        diversity: The smallest distance between images of one prompt, in distances between images of the data.
        gradient: The largest norm of a gradient, in medians of the earlier norms.
    """

    every: int = Field(default=500, ge=1)
    prompts: int = Field(default=4, ge=1)
    images: int = Field(default=4, ge=2)
    mean_shift: float = Field(default=0.5, gt=0)
    deviation: tuple[float, float] = (0.6, 1.5)
    clipped: float = Field(default=0.02, gt=0, le=1)
    diversity: float = Field(default=0.1, ge=0)
    gradient: float = Field(default=20.0, gt=1)


PoolSize = Annotated[int, Field(ge=1)] | Literal["all"]
"""The number of training images."""


class MethodConfig(NetworkDtypeKeys, SizeKeys):
    """The settings that all methods share. A method's class sets a default for ``method``.

    The weights that the optimiser changes, their average, the autoencoder and the text encoders are float32 in every
    run.

    Attributes:
        CHANGEABLE: The keys that change a student by rounding alone. They are no part of a run's identity, and a
            resumed run may have other values.
        LATER: The keys that earlier versions did not have. Their defaults are not written, so that hashes of earlier
            configurations stay.
        WITHOUT_LORA: The keys that have no use beside a LoRA. ``--lora`` sets them to None.
        reflection: How the teacher's x̂ is kept inside the data's range.
        dtype: The default of ``teacher_dtype`` and ``student_dtype``. Training in fp16 is refused.
        batch_size: Rows of a batch, of all processes together.
        teacher_batch_size: The most states that a process evaluates at once without gradients. A guided teacher
            evaluates two rows for each state.
        gradient_accumulation: The number of parts of a process's rows, which follow one another to save memory.
        gradient_checkpointing: Save memory by computing activations twice.
        offload: Save memory of the device by keeping on the host what an update does not evaluate: the float32 weights
            with their optimiser, which works there, their average, and the autoencoder. LCM evaluates its average.
        optimizer: AdamW: fused, plain ("adamw"), or with moments of 8 bits. Fused and plain differ in rounding. A run
            that another default began keeps the optimiser of its ``run.yaml``, unless a protocol names one.
        learning_rate: The learning rate of the student. It is at most 1, since a larger one overflows.
        learning_rate_decay: Bring the learning rate to zero at the end of a stage.
        warmup: Updates in which the learning rate rises.
        betas: The decays of AdamW's averages of the gradient and of its square.
        weight_decay: AdamW's weight decay.
        gradient_clip: The largest norm of a gradient.
        skip_above: The norm of a gradient, before clipping, from which on an update changes no weights; None for no
            bound. An update whose loss or norm is NaN or infinite never changes them. The log has the share of such
            updates as ``skipped``.
        skip_limit: How many updates may be skipped in a row. The run then stops, and its last checkpoint is kept.
        ema_decay: The decay of the average of the student's weights; 0 for none.
        pool: The number of training images, or ``all``: all images of a folder or of COCO. A run keeps the number.
        stream: Read on while training: each row of a batch brings so many new images, and ``pool`` is the number that
            is held at once. None trains on the pool alone.
        mixed_precision: The precision of the arithmetic.
        teacher_dtype: The dtype of the teacher's network. It defaults to ``dtype``.
        student_dtype: The dtype of the student's network. It defaults to ``dtype``. The optimiser keeps float32 weights
            beside it.
        shard: Divide student, teacher, critic and averages over the processes (FSDP2), with gradients and moments. With
            ``offload`` the moments and float32 weights lie on the host. One process divides nothing.
        save_every: Updates between two checkpoints.
        keep_checkpoints: The number of checkpoints of a stage that are kept. Where the last is damaged, the one before
            it is read.
        trackers: Where the log goes too.
        watch: Measurements during training; None for none.
        seed: The seed of all random numbers of the run.
        ddil: The aggregated dataset; None trains on data alone.
        student: The student's network, where the teacher is a formula (``gaussians``). Any other teacher's student
            starts from its teacher's network.
        method: The name of the method.
    """

    CHANGEABLE: ClassVar[tuple[str, ...]] = (
        "teacher_batch_size",
        "gradient_accumulation",
        "gradient_checkpointing",
        "offload",
        "shard",
        "save_every",
        "keep_checkpoints",
        "skip_limit",
        "trackers",
        "watch",
        "ddil.capacity",
        "compile",
    )

    LATER: ClassVar[tuple[str, ...]] = ("height", "width", "offload", "stream", "shard")
    WITHOUT_LORA: ClassVar[tuple[str, ...]] = ()

    reflection: ReflectionConfig = ReflectionConfig()
    batch_size: int = Field(default=32, ge=1)
    teacher_batch_size: int = Field(default=64, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    offload: bool = False
    optimizer: Literal["fused", "adamw", "8bit"] = "fused"
    learning_rate: float = Field(default=3e-4, gt=0, le=1)
    learning_rate_decay: bool = True
    warmup: int = Field(default=50, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    skip_above: float | None = Field(default=None, gt=0)
    skip_limit: int = Field(default=10, ge=1)
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    pool: PoolSize = 16384
    stream: float | None = Field(default=None, gt=0, le=1)
    mixed_precision: Literal["no", "bf16"] = "no"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    student_dtype: Literal["float32", "bfloat16"] = "float32"
    shard: bool = False
    save_every: int = Field(default=250, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    watch: WatchConfig | None = None
    seed: int = Field(default=0, ge=0)
    ddil: DdilConfig | None = None
    student: StudentConfig | None = None
    method: str

    @field_validator("dtype")
    @classmethod
    def _trains_in(cls, dtype: str) -> str:
        if dtype == "fp16":
            raise ValueError("training in fp16 needs its losses scaled, which is not done here; take bf16")
        return dtype

    @model_validator(mode="after")
    def _batch_divides(self) -> MethodConfig:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"gradient_accumulation takes a batch in equal parts, and {self.batch_size} is not divisible by "
                f"{self.gradient_accumulation}"
            )
        return self

    @model_validator(mode="after")
    def _optimiser_stays(self) -> MethodConfig:
        if self.offload and self.optimizer == "8bit":
            raise ValueError("offload puts the optimiser on the host, and 8bit is for a GPU; take one of the two")
        return self

    @model_validator(mode="after")
    def _stream_holds_a_number(self) -> MethodConfig:
        if self.stream is not None and self.pool == "all":
            raise ValueError("a stream holds a number of images at once, and not all; set pool, as in pool=4096")
        return self

    @model_validator(mode="after")
    def _shards_fit(self) -> MethodConfig:
        if self.shard and (self.optimizer == "8bit" or self.compile):
            other = "optimizer=8bit" if self.optimizer == "8bit" else "compile"
            raise ValueError(f"shard divides each network over the processes, and {other} needs it whole; take one")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {k: value for k, value in handler(self).items() if k not in self.LATER or value != fields[k].default}

    def with_guidance(self, own: float) -> Self:
        """Return the configuration with the teacher's own guidance scale in place of none."""
        unset = getattr(self, "guidance_scale", own) is None
        return self.model_copy(update={"guidance_scale": own}) if unset else self

    @classmethod
    def of_run(cls, written: dict[str, Any], own: float) -> Self:
        """Return the configuration that a ``run.yaml`` holds, with defaults for the keys that an older run lacks.

        Args:
            written: The configuration as it was written.
            own: The teacher's own guidance scale. Earlier versions wrote null for it.
        """
        return cls.model_validate(written).with_guidance(own)

    def teacher_use(self) -> dict[str, Any]:
        """Return how the teacher is used: its steps, its solver and its guidance scale, as far as there are any."""
        return {"guidance_scale": getattr(self, "guidance_scale", None)}

    def collections(self) -> tuple[Collection, ...]:
        """Return the stages that fill the aggregated dataset, so that its capacity can be checked before the run."""
        return ()


class Collection(NamedTuple):
    """A stage that fills the aggregated dataset.

    Attributes:
        title: What messages call the stage.
        draws: How many batches the stage draws.
        lengths: The number of states of a trajectory. Two numbers stand for a teacher's trajectory and a student's.
    """

    title: str
    draws: int
    lengths: tuple[int, ...]


class ProgressiveConfig(MethodConfig):
    """Progressive distillation.

    Attributes:
        guidance_scale: The guidance of the first teacher; None for the teacher's own.
        convert: The conversion of a teacher that predicts ε.
        stages: The stages, each with half the steps of the one before.
        keep_stages: Keep the student of every stage, as ``stages/8-steps``, ``stages/4-steps`` … in the run folder. A
            reference names such a folder as any model.
        lora: Adapters to train in place of a whole student, through all stages. The student predicts what its teacher
            predicts, so that the adapters fit the teacher, and ``convert`` has no use.
    """

    CHANGEABLE: ClassVar[tuple[str, ...]] = (*MethodConfig.CHANGEABLE, "keep_stages")
    LATER: ClassVar[tuple[str, ...]] = (*MethodConfig.LATER, "lora")
    WITHOUT_LORA: ClassVar[tuple[str, ...]] = ("convert",)

    method: Literal["pd"] = "pd"
    guidance_scale: GuidanceScale | None = None
    convert: ConvertConfig | None = None
    stages: tuple[StageConfig, ...]
    keep_stages: bool = False
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _lora_keeps_the_prediction(self) -> ProgressiveConfig:
        if self.lora is not None and self.convert is not None:
            raise ValueError("a LoRA predicts what its base predicts, so nothing is converted; set convert to null")
        return self

    @model_validator(mode="after")
    def _stages_halve(self) -> ProgressiveConfig:
        steps = [stage.steps for stage in self.stages]
        if not steps or any(after * 2 != before for before, after in pairwise(steps)):
            raise ValueError(f"each stage has half the steps of the one before, which {steps} do not")
        return self

    @property
    def student_steps(self) -> int:
        return self.stages[-1].steps

    def teacher_use(self) -> dict[str, Any]:
        return {"steps": 2 * self.stages[0].steps, "solver": "ddim", "guidance_scale": self.guidance_scale}

    def collections(self) -> tuple[Collection, ...]:
        return tuple(Collection(f"{2 * s.steps} → {s.steps} steps", s.updates, (s.steps,)) for s in self.stages)
