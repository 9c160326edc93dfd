"""Write what a study found: tables, figures and page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ddil_core.support.files import write_text
from ddil_eval.report.rendering import to_csv, to_latex
from ddil_eval.study.analysis import axes_of, effects_of, is_drawn
from ddil_eval.study.config import StudyConfig
from ddil_eval.study.curves import draw_curves
from ddil_eval.study.figure import draw_effects
from ddil_eval.study.matrix import Unit
from ddil_eval.study.page import render_page
from ddil_eval.study.records import UnitRecord
from ddil_eval.study.tables import effect_tables, effects_csv, values_csv


def write_outputs(config: StudyConfig, units: int, done: Mapping[Unit, UnitRecord], folder: Path) -> None:
    """Write the tables, the figures and the page of a study.

    Args:
        config: The study.
        units: The number of its units.
        done: The records of the units that are done.
        folder: The folder for the files.
    """
    effects = effects_of(config, done)
    for table in effect_tables(config, effects):
        write_text(folder / f"table-{table.name}.csv", to_csv(table))
        write_text(folder / f"table-{table.name}.tex", to_latex(table))
    write_text(folder / "effects.csv", effects_csv(config, effects))
    write_text(folder / "values.csv", values_csv(config, done))
    if is_drawn(config, effects):
        draw_effects(config, effects, folder / "effects.png")
    for axis in axes_of(config, effects):
        draw_curves(config, effects, axis, folder / f"effects-by-{axis}.png")
    write_text(folder / "README.md", render_page(config, units, done, effects))
