"""How a model is meant to be sampled, and warnings for other settings.

The settings come from the model's row in ``systems.yaml``, from ``ddil.json`` beside a pipeline, or from the
configuration of the model's diffusers scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ddil_core.diffusion.parameterization import Reflection, ReflectionMode
from ddil_core.diffusion.schedule import CLEAN, Schedule, Time, timesteps, transitions
from ddil_core.diffusion.scheduler_config import is_flow
from ddil_core.diffusion.solvers import GAMMA, SOLVERS, Solver, require_start
from ddil_core.models.system_specs import SystemSpec
from ddil_core.support.errors import WrongCommand
from ddil_core.support.outside import newer
from ddil_core.support.protocol import GuidanceScale, require_guidance, validate

SYSTEM_FILE = "ddil.json"
"""The file beside ``model_index.json`` that says how a pipeline is meant to be sampled. diffusers ignores it."""
SCHEMA_VERSION = 1
"""The version of the layout of ``ddil.json``."""
FOR_READERS = {"height", "width", "prediction", "shift", "grid", "teacher", "schema_version"}
"""The keys of ``ddil.json`` that are no settings of ``Sampling``. Others read size, prediction and shift."""
DEFAULT_STEPS = 32


@dataclass(frozen=True)
class Bounds:
    """The range of the data that a student was distilled on.

    Attributes:
        centre: The middle of the range, a number for each latent channel.
        bound: Half of the width of the range, a number for each latent channel.
        quantile: The range leaves out a share of 1 − ``quantile`` of the data at each end.
    """

    centre: tuple[float, ...]
    bound: tuple[float, ...]
    quantile: float

    @classmethod
    def of(cls, reflection: Reflection, quantile: float) -> Bounds:
        """Take the bounds of a calibrated reflection."""
        return cls(tuple(reflection.centre.tolist()), tuple(reflection.bound.tolist()), quantile)


class _Bounds(BaseModel):
    """The range of the data.

    Attributes:
        centre: The middle of the range, a number for each latent channel.
        bound: Half of the width of the range, a number for each latent channel.
        quantile: The range leaves out a share of 1 − ``quantile`` of the data at each end.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    centre: tuple[float, ...] = Field(min_length=1)
    bound: tuple[Annotated[float, Field(gt=0)], ...]
    quantile: float = Field(gt=0.5, le=1)

    @model_validator(mode="after")
    def _lengths_agree(self) -> _Bounds:
        if len(self.centre) != len(self.bound):
            raise ValueError(f"{len(self.centre)} numbers of centre and {len(self.bound)} of bound are not as many")
        return self


class SystemFile(BaseModel):
    """The content of ``ddil.json``: the fields of ``Sampling``, all optional, and what the model predicts.

    A misspelt key would be a setting without effect, so unknown keys are refused.

    Attributes:
        solver: The name of a solver.
        steps: The number of steps. None: the model takes any number.
        step_range: The least and the greatest number of steps that a distilled model was made for.
        guidance_scale: The scale of classifier-free guidance. 1 is no guidance.
        spacing: How the timesteps are spaced.
        offset: Added to the timesteps of some spacings, as diffusers' ``steps_offset``.
        timesteps: The timesteps themselves, in place of ``spacing`` and ``offset``.
        ends_clean: Whether sampling ends at σ = 0. Otherwise it ends at timestep 0, where σ is above 0.
        distilled: Whether the model was made for these settings only. A file with ``steps`` describes such a model.
        replaces: A diffusers scheduler that is not known here. These settings take its place.
        reflection: How x̂ is kept inside ``bounds``.
        bounds: The range of the data that the student was distilled on.
        height: The height in pixels of the images that the student was distilled on, where its network does not say it.
        width: Their width, likewise.
        gamma: The γ of the solver ``tcd``; diffusers calls it ``eta``. None: 0.3.
        prediction: What the network predicts, where the scheduler's configuration does not say it.
        shift: The shift of a flow's times. A student's scheduler has another, with which it takes the student's grid.
        grid: For readers; nothing reads it.
        teacher: For readers: how the teacher was used.
        schema_version: The version of the layout of the file.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    solver: str = "ddim"
    steps: int | None = Field(default=None, ge=1)
    step_range: tuple[int, int] | None = None
    guidance_scale: GuidanceScale = 1.0
    spacing: str = "even"
    offset: int = 0
    timesteps: tuple[Time, ...] | None = Field(default=None, min_length=1)
    ends_clean: bool = True
    distilled: bool = False
    replaces: str | None = None
    reflection: ReflectionMode = "none"
    bounds: _Bounds | None = None
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    gamma: float | None = Field(default=None, ge=0, le=1)
    prediction: Any = None
    shift: float | None = Field(default=None, gt=0)
    grid: Any = None
    teacher: Any = None
    schema_version: int = Field(default=SCHEMA_VERSION, ge=1)


@dataclass(frozen=True)
class Sampling:
    """How a model is meant to be sampled.

    Attributes:
        solver: The name of a solver.
        steps: The number of steps. None: the model takes any number, and ``DEFAULT_STEPS`` is the default.
        step_range: The least and the greatest number of steps that a distilled model was made for. None: ``steps``
            alone.
        guidance_scale: The scale of classifier-free guidance. 1 is no guidance.
        spacing: The name of the grid's spacing (``SPACINGS``).
        offset: Added to the times of some spacings, as diffusers' ``steps_offset``.
        timesteps: The grid itself, in place of ``spacing`` and ``offset``.
        ends_clean: Whether a trajectory ends at σ = 0. Otherwise it ends at timestep 0, where σ is above 0.
        distilled: Whether the model was made for these settings only.
        replaces: A diffusers scheduler that is not known here. These settings take its place.
        reflection: How x̂ is kept inside ``bounds``.
        bounds: The range of the data. Students of this project bring it.
        gamma: The γ of a solver that has one (``tcd``), in [0, 1]. None: the solver's default.
    """

    solver: str = "ddim"
    steps: int | None = None
    step_range: tuple[int, int] | None = None
    guidance_scale: float = 1.0
    spacing: str = "even"
    offset: int = 0
    timesteps: tuple[Time, ...] | None = None
    ends_clean: bool = True
    distilled: bool = False
    replaces: str | None = None
    reflection: ReflectionMode = "none"
    bounds: Bounds | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        require_guidance(self.guidance_scale)

    @classmethod
    def from_system(cls, system: SystemSpec, guidance_scale: float) -> Sampling:
        """Take the settings of a row of ``systems.yaml``. ``guidance_scale`` is the default for a row without one."""
        shared = {
            field.name: getattr(system, field.name) for field in fields(cls) if field.name in SystemSpec.model_fields
        }
        return cls(**(shared | ({"guidance_scale": guidance_scale} if system.guidance_scale is None else {})))

    @classmethod
    def from_file(cls, content: Mapping[str, Any], source: str = SYSTEM_FILE) -> Sampling:
        """Take the settings of ``ddil.json``.

        A file with ``steps`` describes a distilled model, unless the file says otherwise.

        Raises:
            WrongCommand: a value in the file does not fit, or a newer ddil made the file.
        """
        if (message := newer(source, content, SCHEMA_VERSION)) is not None:
            raise WrongCommand(message)
        file = validate(SystemFile, dict(content), source)
        settings = {name: getattr(file, name) for name in file.model_fields_set - FOR_READERS}
        if file.bounds is not None:
            settings["bounds"] = Bounds(file.bounds.centre, file.bounds.bound, file.bounds.quantile)
        return cls(**({"distilled": file.steps is not None} | settings))

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], guidance_scale: float) -> Sampling:
        """Take the settings of a diffusers scheduler.

        DPM-Solver++ 2M replaces an unknown one, or flow Euler on a flow.
        """
        kind = str(config.get("_class_name"))
        solver, spacings = SCHEDULERS.get(kind, ("", {}))
        named = "flow" if config.get("use_flow_sigmas") else str(config.get("timestep_spacing", ""))
        spacing = spacings.get(named, spacings.get("", ""))
        unusual = [key for key, value in USUAL.items() if config.get(key) not in (None, value)]
        if not spacing or unusual:
            in_place = "flow_euler" if is_flow(config) else "dpmpp_2m"
            return cls(in_place, guidance_scale=guidance_scale, replaces=" with ".join([kind, *unusual[:1]]))
        steps = 4 if solver in ("lcm", "tcd") else None
        ends_clean = solver != "tcd" and (solver != "ddim" or bool(config.get("set_alpha_to_one", True)))
        offset = config.get("steps_offset", 0)
        return cls(solver, steps, None, guidance_scale, spacing, offset, None, ends_clean)

    def effective(self) -> dict[str, Any]:
        """Return the number of steps, the solver and the guidance scale that are used, for records."""
        return {"steps": self.steps or DEFAULT_STEPS, "solver": self.solver_text, "guidance_scale": self.guidance_scale}

    @property
    def solver_text(self) -> str:
        """The solver for records, such as "ddim" or "tcd (gamma 0.3)"."""
        if SOLVERS.find(self.solver).with_gamma is None:
            return self.solver
        return f"{self.solver} (gamma {GAMMA if self.gamma is None else self.gamma:g})"

    def own_solver(self) -> Solver:
        """Return the solver, with the γ of these settings."""
        solver = SOLVERS.find(self.solver)
        return solver if self.gamma is None or solver.with_gamma is None else solver.with_gamma(self.gamma)

    def times(self, schedule: Schedule) -> list[Time]:
        """Return the falling grid on a schedule. ``timesteps`` apply only to their own number of steps.

        Raises:
            WrongCommand: the schedule has no such grid.
        """
        steps = self.steps or DEFAULT_STEPS
        if self.timesteps is not None and len(self.timesteps) == steps:
            schedule.require_inside(self.timesteps, "the list of timesteps that the model brings")
            return list(self.timesteps)
        return timesteps(schedule, self.spacing, steps, self.offset)

    def transitions(self, schedule: Schedule) -> list[tuple[Time, Time]]:
        """Return the transitions (t, s) on a schedule.

        Raises:
            WrongCommand: the solver cannot start where this schedule starts.
        """
        solver, times = SOLVERS.find(self.solver), self.times(schedule)
        require_start(solver, schedule, times[0])
        return transitions(times, CLEAN if self.ends_clean else 0)

    def reflected(self, reference: str) -> Reflection | None:
        """Return the reflection of x̂, on the CPU, or None for ``none``. ``reference`` names the model in messages.

        Raises:
            WrongCommand: the model brings no bounds.
        """
        if self.reflection == "none":
            return None
        if self.bounds is None:
            raise WrongCommand(
                f"the model {reference!r} cannot be sampled with reflection: it brings no {SYSTEM_FILE} with the "
                "bounds of its data, as the students of 'ddil distill' do; leave reflection out"
            )
        return Reflection(self.reflection, torch.tensor(self.bounds.centre), torch.tensor(self.bounds.bound))

    def starts_scaled(self) -> bool:
        """Whether the trajectory starts from σ_T ε and not from ε, as diffusers' Euler does at some spacings."""
        listed = self.timesteps is not None and len(self.timesteps) == (self.steps or DEFAULT_STEPS)
        return not listed and self.spacing in SOLVERS.find(self.solver).scaled_start


SCHEDULERS: dict[str, tuple[str, dict[str, str]]] = {
    "DDIMScheduler": ("ddim", {"leading": "leading", "trailing": "trailing"}),
    "DPMSolverMultistepScheduler": (
        "dpmpp_2m",
        {"linspace": "even", "trailing": "trailing", "leading": "leading_inner", "flow": "flow_inner"},
    ),
    "EulerDiscreteScheduler": (
        "euler",
        {"leading": "leading", "trailing": "trailing", "linspace": "linspace"},
    ),
    "LCMScheduler": ("lcm", {"": "lcm"}),
    "TCDScheduler": ("tcd", {"": "lcm"}),
    "FlowMatchEulerDiscreteScheduler": ("flow_euler", {"": "flow"}),
    "FlowMatchLCMScheduler": ("lcm", {"": "flow"}),
}
"""For each scheduler of diffusers: its solver, and the name here of each spacing.

"" stands for any spacing, and "flow" for the times of a scheduler with ``use_flow_sigmas``.
"""
USUAL = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "original_inference_steps": 50,
    "clip_sample": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
    "scale_factors": None,
}
"""The values that a scheduler's configuration must have to be supported here. A missing key is fine."""


def sampling_line(name: str, used: Mapping[str, Any]) -> str:
    """Return one line on how a model is sampled, such as "shapes: 32 steps of ddim, guidance 2.6".

    Args:
        name: The name of the model.
        used: What ``Sampling.effective`` returns. Each entry may be missing or None, and a guidance scale may be a
            range of two.
    """
    steps, solver, guidance = (used.get(key) for key in ("steps", "solver", "guidance_scale"))
    parts = []
    if steps is not None:
        parts.append(f"{steps} {'step' if steps == 1 else 'steps'} of {solver}")
    if guidance is not None:
        low, high = (guidance, guidance) if isinstance(guidance, int | float) else guidance
        parts.append(f"guidance {low:g}" + f" to {high:g}" * (high != low))
    return f"{name}: {', '.join(parts)}" if parts else name


def assumed_guidance(reference: str, scale: float) -> str:
    """Return the warning that a model names no guidance scale."""
    return (
        f"{reference!r} names no guidance scale, so that diffusers' default {scale:g} is assumed; say another with "
        "--guidance or with guidance_scale in a protocol"
    )


def misuse_warnings(made_for: Sampling, used: Sampling) -> list[str]:
    """Return one sentence for each setting that a distilled model was not made for."""
    if not made_for.distilled:
        return []
    sentences = []
    own, other = SOLVERS.find(made_for.solver), SOLVERS.find(used.solver)
    if (own.step, own.corrector) != (other.step, other.corrector):  # DDIM, Euler and flow Euler take the same steps
        sentences.append(f"was made for the solver '{own.name}', not '{other.name}': say --solver {own.name}")
    first, last = made_for.step_range or (made_for.steps, made_for.steps)
    if first is not None and last is not None and not first <= (used.steps or DEFAULT_STEPS) <= last:
        number = f"{first}" if first == last else f"{first} to {last}"
        sentences.append(f"was made for {number} steps, not {used.steps}: say --steps {made_for.steps}")
    if used.guidance_scale != made_for.guidance_scale:
        sentences.append(
            f"was made for guidance {made_for.guidance_scale:g}, not {used.guidance_scale:g}: "
            f"say --guidance {made_for.guidance_scale:g}"
        )
    return sentences
