"""Let teacher and student take turns, and look at the images.

Run ``python examples/roll_out_a_string.py --student runs/ddil``.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from PIL import Image

import ddil_core

PROMPTS = [
    "a small red circle left of a large blue star on a grey background",
    "a large green square above a small yellow ring on a white background",
]


@click.command()
@click.option("--teacher", default="shapes", show_default=True, help="The teacher.")
@click.option("--student", required=True, help="A student of this teacher.")
@click.option("--string", "strings", multiple=True, default=("TTTT", "TTSS", "SSTT", "SSSS"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("rollouts.png"), show_default=True)
def main(teacher: str, student: str, strings: tuple[str, ...], out: Path) -> None:
    """Save a grid: one row for each prompt, one column for each string. Images of a row share their first noise."""
    models = ddil_core.load_model(teacher), ddil_core.load_model(student)
    images = ddil_core.rollout(*models, PROMPTS, strings)
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in images], axis=0)
    Image.fromarray(grid).save(out)
    click.echo(f"{out}: {' | '.join(strings)}")


if __name__ == "__main__":
    main()
