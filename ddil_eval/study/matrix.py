"""The matrix of a study: its conditions and its units."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.cost import evaluations, updates_of, with_cost_of
from ddil_core.distillation.methods import METHODS, method_of
from ddil_core.distillation.phases import DdilConfig
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import content_hash, override, read_yaml, validate
from ddil_core.support.resources import find_protocol
from ddil_eval.study.config import StudyConfig, Value, label_of


@dataclass(frozen=True)
class Condition:
    """What two sources are compared under.

    Attributes:
        method: The name of the method in the study.
        factors: The value of each factor, as text.
    """

    method: str
    factors: tuple[tuple[str, str], ...] = ()

    def words(self, methods: bool = True) -> str:
        """Return the condition in words, with or without its method."""
        named = [f"{name.rpartition('.')[2]} {value}" for name, value in self.factors]
        return ", ".join([self.method] * methods + named)


@dataclass(frozen=True)
class Cell:
    """A source of states under a condition.

    Attributes:
        condition: The condition.
        source: The name of the source.
        share: The share of aggregated states; None where the source is taken as it is.
    """

    condition: Condition
    source: str
    share: float | None = None

    def words(self) -> str:
        """Return the cell in words."""
        return f"{self.condition.words()}, {self.source}" + ("" if self.share is None else f" {self.share:g}")

    def sentence(self) -> str:
        """Return the cell as the subject of a message."""
        share = "" if self.share is None else f" and the share {self.share:g}"
        return f"the condition {self.condition.words()!r} with the source {self.source!r}{share}"


@dataclass(frozen=True, eq=False)
class Unit:
    """One distillation, and the measurement of its students.

    Attributes:
        cell: What is distilled.
        seed: The seed.
        config: The whole configuration of the distillation.
        baseline: That of the unit that gives the budget of teacher evaluations; None where units share updates.
        study: The teacher, the data, and what is measured.
    """

    cell: Cell
    seed: int
    config: MethodConfig
    baseline: MethodConfig | None
    study: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A hash of configuration, study and seed. The record also holds the hash of the teacher's weights."""
        configs = [config and config.model_dump(mode="json") for config in (self.config, self.baseline)]
        return content_hash([configs, dict(self.study)])[:12]

    @property
    def name(self) -> str:
        """The name of the unit's files."""
        text = f"{self.cell.words()} seed {self.seed}".lower()
        words = "".join(c if c.isalnum() or c == "." else " " for c in text).split()
        return "-".join(words)[:120].rstrip("-") + f"-{self.key}"

    def words(self) -> str:
        """Return the unit in words."""
        return f"{self.cell.words()}, seed {self.seed}"

    def within_budget(self, model: Model) -> tuple[MethodConfig, int | None]:
        """Return the configuration within the budget, and its evaluations of the teacher.

        The evaluations are None for a method that nobody counts.

        Raises:
            WrongCommand: the study needs equal evaluations, and they cannot be equal or nobody counts them.
        """
        make = METHODS[self.config.method].costs
        if make is None:
            if self.baseline is not None:
                raise WrongCommand(
                    f"nobody counts the evaluations of the method {self.config.method!r}; say budget: updates"
                )
            return self.config, None
        config = self.config
        if self.baseline is not None:
            budget = {key: cost(updates_of(self.baseline, key)) for key, cost in make(self.baseline, model).items()}
            try:
                config = with_cost_of(config, make(config, model), budget)
            except WrongCommand as error:
                raise WrongCommand(f"{self.cell.sentence()} does not fit its budget, {error}") from error
        return config, evaluations(config, make(config, model))


def cells_of(config: StudyConfig, condition: Condition) -> Iterator[tuple[Cell, DdilConfig | None]]:
    """Yield the cells of a condition with their sections ``ddil``. The baseline comes first."""
    for source in sorted(config.sources, key=lambda name: name != config.baseline):
        ddil = config.sources[source]
        shares = config.shares if ddil is not None and source != config.baseline else ()
        for share in shares or (None,):
            phases = {"phases": tuple(_scaled(phase, share) for phase in ddil.phases)} if ddil and share else {}
            yield Cell(condition, source, share), ddil and ddil.model_copy(update=phases)


def _scaled(phase: Any, share: float) -> Any:
    return phase.model_copy(update={"aggregated": phase.aggregated * share})


def conditions_of(config: StudyConfig) -> Iterator[tuple[Condition, list[str]]]:
    """Yield the conditions of a study with their settings KEY=VALUE."""
    choices = [list(_choices(name, values)) for name, values in config.factors.items()]
    for method in config.methods:
        for chosen in itertools.product(*choices):
            labels = tuple((name, label) for name, (label, _) in zip(config.factors, chosen, strict=True))
            yield Condition(method, labels), [setting for _, settings in chosen for setting in settings]


def _choices(name: str, values: tuple[Value, ...] | dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the values of a factor as text, each with its settings."""
    if isinstance(values, dict):
        for label, settings in values.items():
            yield label, [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return
    for value in values:
        yield label_of(value), [f"{name}={json.dumps(value)}"]


def units_of(config: StudyConfig) -> list[Unit]:
    """Return the units of a study. Those of the first seed come first, so that a part of a study is whole.

    Raises:
        WrongCommand: a protocol of a method does not exist, or a condition does not fit its method.
    """
    study = {"teacher": config.teacher, "data": config.data, "measure": config.measure.model_dump(mode="json")}
    contents = {name: _content(method) for name, method in config.methods.items()}
    units = []
    for condition, settings in conditions_of(config):
        content = override(contents[condition.method], settings)
        cells = list(cells_of(config, condition))
        for seed in config.seed_list():
            made = [
                _method_config(content | {"seed": seed, "ddil": ddil and ddil.model_dump(mode="json")}, cell.sentence())
                for cell, ddil in cells
            ]
            for (cell, _), complete in zip(cells, made, strict=True):
                fixed = config.budget == "teacher_evaluations" and cell.source != config.baseline
                units.append(Unit(cell, seed, complete, made[0] if fixed else None, study))
    order = {seed: place for place, seed in enumerate(config.seed_list())}
    return sorted(units, key=lambda unit: order[unit.seed])


def _method_config(content: dict[str, Any], source: str) -> MethodConfig:
    config: MethodConfig = validate(method_of(content, source).config, content, source)
    return config


def _content(method: str | dict[str, Any]) -> dict[str, Any]:
    """Return the content of a method's protocol."""
    return dict(method) if isinstance(method, dict) else read_yaml(find_protocol(Path(method)))
