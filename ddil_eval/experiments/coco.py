"""Models on COCO, or on any captioned pictures: rows of one comparison, by the recipe that belongs to the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def rows(models: Sequence[str], **sampling: Any) -> list[dict[str, Any]]:
    """A row for each model that a command names, all with the ``sampling`` given (steps, solver, guidance_scale; None: its own)."""
    given = {key: value for key, value in sampling.items() if value is not None}
    return [{"name": model, "model": model} | given for model in models]


def from_the_first(names: Sequence[str]) -> list[tuple[str, str]]:
    """The differences of rows that a command names: each later one less the first."""
    return [(name, names[0]) for name in names[1:]]
