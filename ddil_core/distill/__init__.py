"""Distillers: a table of methods. An addition is one file with a stage class, and one row of ``METHODS``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A row of the table: the paper that a method comes from, and what the rows of tables call it."""

    name: str
    title: str
    source: str


METHODS = {
    method.name: method
    for method in (
        Method("pd", "Progressive Distillation (PD)", "Salimans & Ho, 2202.00512; DDIL, Algorithms 1 and 2"),
    )
}
