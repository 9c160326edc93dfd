"""How a model is meant to be sampled: said by its row of ``systems.yaml``, by ``ddil.json`` beside a pipeline, or by the
configuration of its diffusers scheduler; and what is wrong with sampling it in another way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ddil_core.diffusion.parameterization import Reflection, ReflectionMode
from ddil_core.diffusion.schedule import CLEAN, Schedule, Time, is_flow, timesteps, transitions
from ddil_core.diffusion.solvers import SOLVERS, require_start
from ddil_core.models.systems import SystemSpec
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import GuidanceScale, require_guidance, validate

SYSTEM_FILE = "ddil.json"
"""Beside ``model_index.json``: how a pipeline is meant to be sampled. diffusers ignores it."""
DEFAULT_STEPS = 32


@dataclass(frozen=True)
class Bounds:
    """The range of the data that a student was distilled on, a number for each latent channel: ``centre`` ± ``bound`` holds all but
    1 − ``quantile`` of them at each end."""

    centre: tuple[float, ...]
    bound: tuple[float, ...]
    quantile: float

    @classmethod
    def of(cls, reflection: Reflection, quantile: float) -> Bounds:
        """Those of a calibrated reflection."""
        return cls(tuple(reflection.centre.tolist()), tuple(reflection.bound.tolist()), quantile)


class _Bounds(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    centre: tuple[float, ...]
    bound: tuple[float, ...]
    quantile: float


class _SystemFile(BaseModel):
    """What is read of ``ddil.json``: the fields of ``Sampling``, each of which may be left out."""

    model_config = ConfigDict(allow_inf_nan=False)

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


@dataclass(frozen=True)
class Sampling:
    """How a model is meant to be sampled.

    ``steps`` is None where any number may be asked for (then ``DEFAULT_STEPS``). ``timesteps`` are given outright, or come from
    ``spacing`` and ``offset``. A trajectory ends clean, or at timestep 0, whose σ is not 0 (``ends_clean`` False). ``distilled``
    models were made for exactly this, or for any number of steps in ``step_range``. ``replaces`` names a diffusers scheduler that
    is not known here and in whose place this is. ``reflection`` is how x̂ is kept inside ``bounds``, which this project's students
    bring with them.
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

    def __post_init__(self) -> None:
        require_guidance(self.guidance_scale)

    @classmethod
    def from_system(cls, system: SystemSpec, guidance_scale: float) -> Sampling:
        """From a row; ``guidance_scale`` is taken where the row has none."""
        shared = {
            field.name: getattr(system, field.name) for field in fields(cls) if field.name in SystemSpec.model_fields
        }
        return cls(**(shared | ({"guidance_scale": guidance_scale} if system.guidance_scale is None else {})))

    @classmethod
    def from_file(cls, told: Mapping[str, Any], source: str = SYSTEM_FILE) -> Sampling:
        """From the content of ``ddil.json``; a number of steps in it is what the model was made for, unless it says otherwise.

        Raises:
            WrongCommand: a value in it does not fit.
        """
        read = validate(_SystemFile, dict(told), source)
        known = {name: getattr(read, name) for name in read.model_fields_set}
        if read.bounds is not None:
            known["bounds"] = Bounds(read.bounds.centre, read.bounds.bound, read.bounds.quantile)
        return cls(**({"distilled": read.steps is not None} | known))

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], guidance_scale: float) -> Sampling:
        """As diffusers' scheduler of this configuration samples; in place of one that is not known here, DPM-Solver++ 2M, or
        flow Euler where the model is a flow."""
        kind = str(config.get("_class_name"))
        solver, spacings = SCHEDULERS.get(kind, ("", {}))
        spacing = spacings.get(config.get("timestep_spacing", ""), spacings.get("", ""))
        unusual = [key for key, value in USUAL.items() if config.get(key) not in (None, value)]
        if not spacing or unusual:
            in_place = "flow_euler" if is_flow(config) else "dpmpp_2m"
            return cls(in_place, guidance_scale=guidance_scale, replaces=" with ".join([kind, *unusual[:1]]))
        steps = 4 if solver == "lcm" else None
        ends_clean = solver != "ddim" or bool(config.get("set_alpha_to_one", True))
        offset = config.get("steps_offset", 0)
        return cls(solver, steps, None, guidance_scale, spacing, offset, None, ends_clean)

    def times(self, schedule: Schedule) -> list[Time]:
        """The falling grid on a schedule; ``timesteps`` hold for their own number of steps alone.

        Raises:
            WrongCommand: there is no such grid on this schedule.
        """
        steps = self.steps or DEFAULT_STEPS
        if self.timesteps is not None and len(self.timesteps) == steps:
            schedule.require_inside(self.timesteps, "the list of timesteps that the model brings")
            return list(self.timesteps)
        return timesteps(schedule, self.spacing, steps, self.offset)

    def transitions(self, schedule: Schedule) -> list[tuple[Time, Time]]:
        """The steps (t, s) on a schedule.

        Raises:
            WrongCommand: the solver cannot start where this schedule does.
        """
        require_start(SOLVERS.find(self.solver), schedule)
        return transitions(self.times(schedule), CLEAN if self.ends_clean else 0)

    def reflected(self, reference: str) -> Reflection | None:
        """What keeps x̂ inside the bounds, on the CPU; None where nothing does.

        Raises:
            WrongCommand: reflection is asked for, and the model ``reference`` brings no bounds.
        """
        if self.reflection == "none":
            return None
        if self.bounds is None:
            raise WrongCommand(
                f"the model {reference!r} cannot be sampled with reflection: it brings no {SYSTEM_FILE} with the bounds of its "
                "data, as the students of 'ddil distill' do; leave reflection out"
            )
        return Reflection(self.reflection, torch.tensor(self.bounds.centre), torch.tensor(self.bounds.bound))

    def starts_scaled(self) -> bool:
        """Whether the trajectory starts from σ_T ε, as diffusers' Euler does at some spacings, and not from ε."""
        given = self.timesteps is not None and len(self.timesteps) == (self.steps or DEFAULT_STEPS)
        return not given and self.spacing in SOLVERS.find(self.solver).scaled_start


SCHEDULERS: dict[str, tuple[str, dict[str, str]]] = {
    "DDIMScheduler": ("ddim", {"leading": "leading", "trailing": "trailing"}),
    "DPMSolverMultistepScheduler": (
        "dpmpp_2m",
        {"linspace": "even", "trailing": "trailing", "leading": "leading_inner"},
    ),
    "EulerDiscreteScheduler": (
        "euler",
        {"leading": "leading", "trailing": "trailing", "linspace": "linspace"},
    ),
    "LCMScheduler": ("lcm", {"": "lcm"}),
    "FlowMatchEulerDiscreteScheduler": ("flow_euler", {"": "flow"}),
}
"""diffusers' schedulers, as a solver and as what their spacings are called here; "" is whatever they say."""
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
}
"""How a scheduler of ``SCHEDULERS`` must be configured, in what it says of this, to be the one that is known here."""


def misuse_warnings(made_for: Sampling, used: Sampling) -> list[str]:
    """One sentence for everything that a distilled model was not made for, with what it was made for."""
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
