"""Option types that take their choices from the registries, the packages' tables of things by name.

A registry imports torch or scipy. A type therefore imports its registry only to convert a value or to show a help page.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from ddil_core.support.registry import Registry


class RowName(click.ParamType):  # type: ignore[type-arg]  # generic in recent versions of click only
    """The name of one row of a registry.

    Args:
        name: What a row is, in messages: "solver", "metric".
        registry: Where the registry is: ``module:attribute``.
    """

    def __init__(self, name: str, registry: str) -> None:
        self.name, self._registry = name, registry

    def rows(self) -> Registry[Any]:
        """Return the registry."""
        module, attribute = self._registry.split(":")
        registry: Registry[Any] = getattr(import_module(module), attribute)
        return registry

    def choices(self) -> list[str]:
        """Return what the option accepts, for help pages."""
        return list(self.rows())

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return the choices as click shows those of its own ``Choice``."""
        return f"[{'|'.join(self.choices())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name, which is what the command receives.

        Raises:
            WrongCommand: The registry has no row of this name.
        """
        self.rows().find(str(value))
        return str(value)


class RowNames(RowName):
    """Names of rows, with commas between them."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return the form of a value. Such registries are long, and commands of their own list them."""
        return "NAME,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the list of names.

        Raises:
            WrongCommand: The registry has no row of one of the names.
        """
        names = [name.strip() for name in str(value).split(",") if name.strip()]
        for name in names:
            self.rows().find(name)
        return names


class DataReference(RowName):
    """The reference of a data set. The command checks the reference when it opens the data set.

    Args:
        use: The use that help pages list data sets for: "training" or "evaluation".
    """

    def __init__(self, use: str) -> None:
        super().__init__("data set", "ddil_core.data.datasets:DATASETS")
        self._use = use

    def choices(self) -> list[str]:
        """Return the forms of the references, such as ``coco2017:DIR``."""
        return [row.form for row in self.rows().values() if self._use in row.use]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the reference as it is."""
        return str(value)


METHOD = RowName("method", "ddil_core.distillation.methods:METHODS")
FORMAT = RowName("format", "ddil_core.export.formats:FORMATS")
SOLVER = RowName("solver", "ddil_core.diffusion.solvers:SOLVERS")
INVERTER = RowName("inverter", "ddil_core.inversion:INVERTERS")
METRICS = RowNames("metric", "ddil_eval.metrics:METRICS")
TRAINING_DATA = DataReference("training")
EVALUATION_DATA = DataReference("evaluation")
