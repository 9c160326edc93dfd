"""Stock diffusers on a student's own grid: a scheduler, and the arguments of the pipeline's call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddil_core.diffusion.schedule import FlowSchedule, Time
from ddil_core.diffusion.solvers import GAMMA
from ddil_core.export.finished import FinishedRun
from ddil_core.models.sampling import SYSTEM_FILE
from ddil_core.support.errors import WrongCommand


@dataclass(frozen=True)
class StockCall:
    """How diffusers samples a student as ``ddil sample`` does.

    Attributes:
        scheduler: A scheduler of diffusers.
        arguments: The arguments of the pipeline's call, beside the prompt.
    """

    scheduler: Any
    arguments: dict[str, Any]

    def text(self) -> str:
        """Return the arguments as Python writes them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())


def require_stock(run: FinishedRun) -> None:
    """Refuse a student that diffusers cannot sample as it was made to be sampled.

    Raises:
        WrongCommand: the student draws points, its solver has no scheduler here, its x̂ is reflected, or its network is
            told where its jumps end.
    """
    who, solver = f"the student in {run.student}", run.sampling.solver
    if not run.layout.images.pictures:
        raise WrongCommand(f"{who} draws points, which no pipeline of diffusers does")
    if solver not in _SCHEDULERS:
        raise WrongCommand(
            f"{who} is sampled with {solver}, and export knows no scheduler of diffusers for it; it knows those for "
            f"{', '.join(_SCHEDULERS)}"
        )
    if run.sampling.reflection != "none":
        raise WrongCommand(
            f"{who} is sampled with reflection {run.sampling.reflection}, which no other program does; set reflection "
            f"to none in its {SYSTEM_FILE}, and measure it so"
        )
    if run.sampling.ends_clean == (solver == "tcd"):  # diffusers' TCDScheduler ends at timestep 0, the others clean
        raise WrongCommand(f"{who} is sampled to another end than diffusers' scheduler for {solver} takes")
    if run.network_config.get("class_embed_type") == "timestep":
        raise WrongCommand(f"{who} is told where its jumps end (condition_on_s), which no other program does")


TOLD: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"max_sequence_length": 256},
    "PixArtSigmaPipeline": {"clean_caption": False},
}
"""What a pipeline is told so that it encodes prompts as ``ddil`` does. FLUX.1-schnell reads 256 tokens."""


def stock_call(run: FinishedRun) -> StockCall:
    """Return the scheduler that takes the student's grid, by the number of steps alone where one does.

    Raises:
        WrongCommand: see ``require_stock``.
    """
    require_stock(run)
    times, schedule, solver = run.times, run.schedule, run.sampling.solver
    more = {"guidance_scale": run.sampling.guidance_scale} | _size(run) | TOLD.get(run.layout.pipeline, {})
    if solver == "tcd":
        more["eta"] = GAMMA if run.sampling.gamma is None else run.sampling.gamma
    is_flow = isinstance(schedule, FlowSchedule)
    schedulers = _flow(run) if is_flow else _SCHEDULERS[solver](run.scheduler_config, len(times))
    for scheduler in schedulers:
        taken = _grid(scheduler, len(times), run.layout.pipeline)
        if len(taken) == len(times) and np.allclose(taken, times, rtol=1e-6, atol=0):
            return StockCall(scheduler, {"num_inference_steps": len(times)} | more)
    if isinstance(schedule, FlowSchedule):
        return StockCall(schedulers[-1], {"sigmas": [unshifted(schedule, time) for time in times]} | more)
    return StockCall(schedulers[0], {"timesteps": times} | more)


def _grid(scheduler: Any, steps: int, pipeline: str) -> list[float]:
    """Return the times that a scheduler takes where a pipeline asks it for a number of steps."""
    if pipeline == "FluxPipeline":  # it gives evenly spaced times before the shift
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    grid: list[float] = scheduler.timesteps.tolist()
    return grid


def _size(run: FinishedRun) -> dict[str, Any]:
    """Return the arguments of the size, where the pipeline itself would take another one."""
    if run.layout.network == "unet" and "height" not in run.settings:
        return {}
    height, width = run.model.image_size
    binned = run.layout.pipeline in ("PixArtSigmaPipeline", "SanaPipeline")
    return {"height": height, "width": width} | ({"use_resolution_binning": False} if binned else {})


def unshifted(schedule: FlowSchedule, time: Time) -> float:
    """Return s before the shift of a time on a flow: diffusers' ``sigmas``."""
    shifted = time / len(schedule)
    return shifted / (schedule.shift - (schedule.shift - 1) * shifted)


def _flow(run: FinishedRun) -> list[Any]:
    """Return the scheduler that the run saved, and the same with the schedule's own shift alone."""
    import diffusers

    kind, schedule = getattr(diffusers, run.scheduler_config["_class_name"]), run.schedule
    assert isinstance(schedule, FlowSchedule)
    plain = kind(num_train_timesteps=len(schedule), shift=schedule.shift)
    return [kind.from_config(run.scheduler_config), plain]


def _ddim(config: Mapping[str, Any], steps: int) -> list[Any]:
    """Return DPM-Solver++ of the first order, which is DDIM. diffusers' DDIMScheduler has no grid 999, 749, 500, 250.

    Lu et al., 2211.01095, section 4.1: DPM-Solver++(1) is DDIM.
    """
    from diffusers import DPMSolverMultistepScheduler

    first_order = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
    return [DPMSolverMultistepScheduler.from_config(dict(config), timestep_spacing="linspace", **first_order)]


def _lcm(config: Mapping[str, Any], steps: int) -> list[Any]:
    """Return LCM's scheduler with its own number of points, and with as many points as steps."""
    from diffusers import LCMScheduler

    return [
        LCMScheduler.from_config(dict(config)),
        LCMScheduler.from_config(dict(config), original_inference_steps=steps),
    ]


def _tcd(config: Mapping[str, Any], steps: int) -> list[Any]:
    """Return TCD's scheduler with its own number of points."""
    from diffusers import TCDScheduler

    return [TCDScheduler.from_config(dict(config))]


_SCHEDULERS: dict[str, Callable[[Mapping[str, Any], int], list[Any]]] = {"ddim": _ddim, "lcm": _lcm, "tcd": _tcd}
"""For each solver: makes diffusers' schedulers that take its steps, from the saved scheduler and the number of steps.

On a flow the solvers ddim and lcm have the schedulers of ``_flow``.
"""
