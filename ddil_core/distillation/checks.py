"""Whether the aggregated dataset can serve every phase of a run, seen before anything is done.

A collection makes the states that the coming updates use. They must find room beside those that are still to be used.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from ddil_core.distillation.config import Collection, DdilConfig, MethodConfig, PhaseConfig
from ddil_core.support.errors import WrongCommand


def require_capacity(config: MethodConfig) -> None:
    """Raises WrongCommand: in some phase the dataset may hold more states than ``ddil.capacity``; says which setting serves."""
    ddil = config.ddil
    if ddil is None:
        return
    needs = {stage.title: most_states(ddil, stage, config.batch_size) for stage in config.collections()}
    worst = max(needs, key=lambda title: needs[title], default=None)
    if worst is None or needs[worst] <= ddil.capacity:
        return
    fewer = _collect_every(config, ddil)
    other = "" if fewer is None else f", or --set ddil.collect_every={fewer}"
    raise WrongCommand(
        f"the aggregated dataset is too small for the stage {worst!r}: with batch_size {config.batch_size} and ddil.collect_every "
        f"{ddil.collect_every} it may hold {needs[worst]:,} states, and ddil.capacity is {ddil.capacity:,}; say --set "
        f"ddil.capacity={needs[worst]}{other}"
    )


def most_states(ddil: DdilConfig, stage: Collection, batch_size: int) -> int:
    """An upper bound of the states that the dataset holds at once in a stage."""
    most, first = 0, 0
    for phase in ddil.phases:
        end = round(phase.until * stage.draws)
        updates = min(ddil.collect_every, end - first)
        count = math.ceil(round(phase.aggregated * batch_size, 6))  # the most of a batch; 0.1 · 30 is above 3
        if updates > 0 and count > 0:
            # Before a collection fewer uses are pending than a batch takes, each perhaps of a state of its own. With ``period``
            # more of them there are at least as many states, so that the last ones decide.
            period = ddil.uses * max(stage.lengths)
            pending = range(max(0, count - period), count)
            most = max(most, *(held + collected(updates * count - held, ddil.uses, stage, phase) for held in pending))
        first = end
    return most


def collected(wanted: int, uses: int, stage: Collection, phase: PhaseConfig) -> int:
    """The most states that a collection adds to give ``wanted`` uses: whole trajectories, of each kind one too many at most."""
    states = math.ceil(wanted / uses)
    if len(stage.lengths) == 1:
        return math.ceil(states / stage.lengths[0]) * stage.lengths[0]
    shares = zip(stage.lengths, (phase.p_teacher, 1 - phase.p_teacher), strict=True)
    return states + sum(length for length, share in shares if share > 0) - 1


def _collect_every(config: MethodConfig, ddil: DdilConfig) -> int | None:
    """The most updates between collections that the capacity serves; None where it serves not even one."""

    def too_much(every: int) -> bool:
        fewer = ddil.model_copy(update={"collect_every": every})
        return any(most_states(fewer, stage, config.batch_size) > ddil.capacity for stage in config.collections())

    return bisect_left(range(1, ddil.collect_every), True, key=too_much) or None
