"""Options that take their choices from the registries."""

from __future__ import annotations

from collections.abc import Callable

import click
import pytest
from click.testing import Result

from ddil_core.data.datasets import DATASETS
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.distillation.methods import METHODS
from ddil_core.inversion import INVERTERS
from ddil_core.support.errors import WrongCommand
from ddil_core.support.registry import Registry
from ddil_eval.cli import choices
from ddil_eval.metrics import METRICS

TYPES = (
    (choices.METHOD, METHODS),
    (choices.SOLVER, SOLVERS),
    (choices.INVERTER, INVERTERS),
    (choices.METRICS, METRICS),
)


@pytest.mark.parametrize(("kind", "registry"), TYPES, ids=lambda value: getattr(value, "name", ""))
def test_a_type_accepts_the_names_of_its_registry_and_no_others(
    kind: choices.RowName, registry: Registry[object]
) -> None:
    assert kind.rows() is registry
    name = next(iter(registry))
    assert kind.convert(name, None, None) in (name, [name])
    with pytest.raises(WrongCommand, match=f"the {kind.name} 'none' is not known; it may be one of {name}, "):
        kind.convert("none", None, None)


def test_names_have_commas_between_them() -> None:
    assert choices.METRICS.convert("fid, kid,", None, None) == ["fid", "kid"]
    with pytest.raises(WrongCommand, match="the metric 'fidd' is not known"):
        choices.METRICS.convert("fid,fidd", None, None)


@pytest.mark.parametrize(
    ("kind", "use"), [(choices.TRAINING_DATA, "training"), (choices.EVALUATION_DATA, "evaluation")]
)
def test_help_lists_the_data_sets_of_a_use(kind: choices.DataReference, use: str) -> None:
    metavar = kind.get_metavar(click.Option(["--data"]), click.Context(click.Command("try")))
    assert metavar.strip("[]").split("|") == [row.form for row in DATASETS.values() if use in row.use]


def test_a_help_page_lists_the_rows(cli: Callable[..., Result]) -> None:
    assert f"[{'|'.join(SOLVERS)}]" in cli("sample", "--help").stdout
