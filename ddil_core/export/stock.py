"""Stock diffusers on a student's own grid: a scheduler, and the arguments of the pipeline's call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddil_core.diffusion.schedule import Time
from ddil_core.export.finished import FinishedRun
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
        WrongCommand: the student draws points, its solver has no scheduler here, or its x̂ is reflected.
    """
    if not run.layout.images.pictures:
        raise WrongCommand(f"the student in {run.student} draws points, which no pipeline of diffusers does")
    if run.sampling.solver not in _SCHEDULERS:
        raise WrongCommand(
            f"the student in {run.student} is sampled with {run.sampling.solver}, and export knows no scheduler of "
            f"diffusers for it; it knows those for {', '.join(_SCHEDULERS)}"
        )
    if run.sampling.reflection != "none" or not run.sampling.ends_clean:
        what = f"reflection {run.sampling.reflection}" if run.sampling.ends_clean else "an end at timestep 0"
        raise WrongCommand(f"the student in {run.student} is sampled with {what}, which no other program does")


def stock_call(run: FinishedRun) -> StockCall:
    """Return the scheduler that takes the student's grid, by the number of steps alone where one does.

    Raises:
        WrongCommand: see ``require_stock``.
    """
    require_stock(run)
    times, guidance = run.times, {"guidance_scale": run.sampling.guidance_scale}
    schedulers = _SCHEDULERS[run.sampling.solver](run.scheduler_config, times)
    for scheduler in schedulers:
        scheduler.set_timesteps(len(times))
        if scheduler.timesteps.tolist() == times:
            return StockCall(scheduler, {"num_inference_steps": len(times)} | guidance)
    assert "timesteps" in inspect.signature(schedulers[0].set_timesteps).parameters
    return StockCall(schedulers[0], {"timesteps": times} | guidance)


def _ddim(config: Mapping[str, Any], times: Sequence[Time]) -> list[Any]:
    """Return DPM-Solver++ of the first order, which is DDIM. diffusers' DDIMScheduler has no grid 999, 749, 500, 250.

    Lu et al., 2211.01095, section 4.1: DPM-Solver++(1) is DDIM.
    """
    from diffusers import DPMSolverMultistepScheduler

    first_order = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
    return [DPMSolverMultistepScheduler.from_config(dict(config), timestep_spacing="linspace", **first_order)]


def _lcm(config: Mapping[str, Any], times: Sequence[Time]) -> list[Any]:
    """Return LCM's scheduler with its own number of points, and with as many points as steps."""
    from diffusers import LCMScheduler

    own = LCMScheduler.from_config(dict(config))
    return [own, LCMScheduler.from_config(dict(config), original_inference_steps=len(times))]


_SCHEDULERS: dict[str, Callable[[Mapping[str, Any], Sequence[Time]], list[Any]]] = {"ddim": _ddim, "lcm": _lcm}
"""For each solver: makes schedulers of diffusers that take its steps, from the student's own scheduler and grid."""
