"""Show the figures of every benchmark: a table on the terminal, and CSV where a file is named.

A CSV file starts with the line ``# DEVICE; VERSIONS`` of `benchmarks.machine`. `read` returns the table without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import machine


def show(
    frame: pd.DataFrame,
    csv_path: Path | None,
    digits: str = ".4g",
    title: str | None = None,
    packages: Iterable[str] = (),
) -> None:
    """Print a frame with floats in the format ``digits``, and write it to ``csv_path`` in full.

    Args:
        frame: The figures.
        csv_path: The CSV file; its folder is made where it is missing. None writes nothing.
        digits: The format of floats on the terminal. The file holds all digits.
        title: The title on the terminal.
        packages: Packages, such as a peer's, whose versions the header names beside torch's and our own.
    """
    header = machine.header(packages)
    table = Table(*map(str, frame.columns), title=title, caption=Text(header), caption_justify="left")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(f"{value:z{digits}}" if isinstance(value, float) else str(value)) for value in row))
    Console(width=max(140, Console().width)).print(table)
    if csv_path is not None:
        csv_path.parent.mkdir(parents=True, exist_ok=True)
        csv_path.write_text(f"# {header}\n{frame.to_csv(index=False)}", encoding="utf-8")


def read(csv_path: Path) -> pd.DataFrame:
    """Return the frame that `show` wrote."""
    return pd.read_csv(csv_path, skiprows=1)
