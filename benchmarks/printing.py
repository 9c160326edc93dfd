"""Show the figures of every benchmark: a table on the terminal, and CSV where a file is named."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table


def show(frame: pd.DataFrame, csv_path: Path | None, digits: str = ".4g", title: str | None = None) -> None:
    """Print a frame with floats in the format ``digits``, and write it to ``csv_path`` in full."""
    table = Table(*frame.columns, title=title)
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{value:z{digits}}" if isinstance(value, float) else str(value) for value in row))
    Console(width=max(140, Console().width)).print(table)
    if csv_path is not None:
        frame.to_csv(csv_path, index=False)
