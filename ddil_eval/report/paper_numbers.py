"""The numbers that the paper reports, from `results/paper`."""

from __future__ import annotations

import csv
from decimal import Decimal

from ddil_core.support.resources import paper_results
from ddil_eval.report.table_type import Cell


def paper_rows(table: str = "table1") -> dict[tuple[str, int], Decimal]:
    """Return the paper's numbers of Table 1 (FID) or 5 (LPIPS diversity), by model and number of steps."""
    with (paper_results() / f"{table}.csv").open(newline="", encoding="utf-8") as file:
        return {(name, int(steps)): Decimal(value) for name, steps, value in list(csv.reader(file))[1:]}


def paper_pairs(name: str) -> dict[float, tuple[Cell, ...]]:
    """Return the paper's (FID, CLIP score) by the value in the first column."""
    with (paper_results() / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return {float(first): (Decimal(fid), Decimal(clip)) for first, fid, clip in list(csv.reader(file))[1:]}
