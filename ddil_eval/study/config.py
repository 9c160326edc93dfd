"""The protocol of a study: what is varied, what is measured, what is tested."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ddil_core.distillation.phases import DdilConfig, curve_bounds
from ddil_core.support.protocol import Strict
from ddil_core.support.text import listed
from ddil_eval.metrics import METRICS
from ddil_eval.statistics.paired import MOST_PAIRS

Share = Annotated[float, Field(gt=0, le=1)]
Value = bool | int | float | str | None
"""A value of a factor."""

_STATES = ("data", "teacher", "student")
_LOSSES = tuple(f"{name}_{kind}" for name in ("disagreement", "end_disagreement") for kind in _STATES)
MEASURES = {
    "drift": ("end_distance", "shift_ratio", *_LOSSES[: len(_STATES)]),
    "points": (
        *("end_distance", "energy_distance", "sliced_wasserstein", "modes_found", "log_likelihood"),
        *("shift_ratio", "rollout_ratio", *_LOSSES),
    ),
}
"""The measures of each kind. Those that start with ``end_disagreement`` are of stochastic students alone."""


def label_of(value: Value) -> str:
    """Return the text that stands for a value of a factor. Different numbers have different texts."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short


def _keys(name: str, values: tuple[Value, ...] | dict[str, dict[str, Any]]) -> list[str]:
    """Return the keys that a factor sets."""
    return [key for settings in values.values() for key in settings] if isinstance(values, dict) else [name]


def _overlap(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """Return a key that both set, or that holds a key of the other; None where there is none."""
    pairs = itertools.product(ours, theirs)
    return next(
        (max(a, b, key=len) for a, b in pairs if f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")), None
    )


class MeasureConfig(Strict):
    """What is measured of every student.

    Attributes:
        kinds: The kinds of measures: "points" for teachers that draw points, "drift" for any teacher, "images" for the
            metrics of images.
        count: The number of prompts, or of points.
        teacher_steps: The steps of the teacher that students are compared with. The steps of each student divide them.
        metrics: The metrics of images, for the kind "images".
        tested: The measures that are tested. All tests of a study are corrected together (Holm), so name few. Other
            measures are described, with an interval and without a test.
    """

    kinds: tuple[Literal["points", "drift", "images"], ...] = Field(default=("drift",), min_length=1)
    count: int = Field(default=256, ge=8)
    teacher_steps: int = Field(default=32, ge=1)
    metrics: tuple[str, ...] = ()
    tested: tuple[str, ...] = Field(default=("end_distance",), min_length=1)

    @model_validator(mode="after")
    def _metrics_fit(self) -> MeasureConfig:
        if bool(self.metrics) != ("images" in self.kinds):
            raise ValueError("the kind 'images' and the list 'metrics' belong together; give both or none")
        if {"points", "drift"} <= set(self.kinds):
            raise ValueError("the kinds 'points' and 'drift' measure the same; give one of them")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"there is no metric {unknown[0]!r}; 'ddil metrics' lists them")
        names = [*(name for kind in self.kinds for name in MEASURES.get(kind, ())), *self.metrics]
        if unknown := [name for name in self.tested if name not in names]:
            raise ValueError(f"{unknown[0]!r} in 'tested' is not measured; name {listed(names, 'or')}")
        return self


class StudyConfig(Strict):
    """A study as data: every source of states and share × every combination of factors × every seed.

    A unit is one of these: one distillation, and the measurement of its students. Units with the same seed have the
    same first network, the same data in the same order and the same noise. So a comparison is paired by seed.

    Attributes:
        title: What the study is about, for its page.
        teacher: The reference of the teacher.
        data: The reference of the data set.
        methods: The distillations by name. Each is a protocol of ``ddil distill``, as a path or as its content. The
            keys ``seed`` and ``ddil`` are replaced.
        seeds: The number of seeds, from 0, or the list of seeds.
        sources: Where training states come from, by name: a section ``ddil``, or null for data alone.
        baseline: The source with which every other one is compared.
        shares: The shares of aggregated states. Each one multiplies ``aggregated`` in all phases of all sources.
            Without shares, the sources are taken as they are.
        factors: What else is varied. Each factor has a list of values for the key of its name, in which dots go deeper,
            or a mapping from names to settings of several keys.
        budget: What units have in common: the number of updates, or for each stage the evaluations of the teacher. Then
            all sources get as many updates as the evaluations of the baseline allow.
        measure: What is measured.
        keep_runs: Keep the run folders. Otherwise only their logs stay after the measurement.
    """

    title: str = "A study"
    teacher: str = "shapes"
    data: str = "shapes"
    methods: dict[str, str | dict[str, Any]] = Field(min_length=1)
    seeds: int | tuple[int, ...] = 5
    sources: dict[str, DdilConfig | None] = Field(min_length=2)
    baseline: str = "data"
    shares: tuple[Share, ...] = ()
    factors: dict[str, tuple[Value, ...] | dict[str, dict[str, Any]]] = Field(default_factory=dict)
    budget: Literal["updates", "teacher_evaluations"] = "updates"
    measure: MeasureConfig = MeasureConfig()
    keep_runs: bool = False

    @field_validator("seeds")
    @classmethod
    def _seeds_fit(cls, seeds: int | tuple[int, ...]) -> int | tuple[int, ...]:
        count = seeds if isinstance(seeds, int) else len(set(seeds))
        if not 2 <= count <= MOST_PAIRS:
            raise ValueError(f"a study has 2 to {MOST_PAIRS} seeds, and these are {count}")
        if not isinstance(seeds, int) and (count < len(seeds) or min(seeds) < 0):
            raise ValueError("the seeds are different whole numbers of at least 0")
        return seeds

    @model_validator(mode="after")
    def _fits(self) -> StudyConfig:
        if self.baseline not in self.sources:
            raise ValueError(f"the baseline {self.baseline!r} is no source; name {listed(list(self.sources), 'or')}")
        curves = [phase.aggregated for ddil in self.sources.values() if ddil for phase in ddil.phases]
        largest = max((curve_bounds(curve)[1] for curve in curves), default=0)
        if len(set(self.shares)) < len(self.shares):
            raise ValueError("a share stands twice; name each share once")
        if max(self.shares, default=0) * largest > 1:
            raise ValueError("a share times 'aggregated' is above 1")
        keys = [key for name, values in self.factors.items() for key in _keys(name, values)]
        if fixed := [key for key in keys if key.split(".")[0] in ("seed", "ddil", "method")]:
            raise ValueError(f"the factor key {fixed[0]!r} is set by seeds, sources and methods; vary it there")
        for one, other in itertools.combinations(self.factors, 2):
            if nested := _overlap(_keys(one, self.factors[one]), _keys(other, self.factors[other])):
                raise ValueError(f"the factors {one!r} and {other!r} both set {nested!r}; vary it in one of them")
        for name, values in self.factors.items():
            if not isinstance(values, dict) and len({label_of(value) for value in values}) < len(values):
                raise ValueError(f"a value of the factor {name!r} stands twice; name each value once")
        if empty := [name for name, values in self.factors.items() if not values]:
            raise ValueError(f"the factor {empty[0]!r} has no values; give some or leave it out")
        return self

    def seed_list(self) -> tuple[int, ...]:
        """Return the seeds in order."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds
