"""Sample from a student, and compare it with its teacher.

Run ``python examples/compare_a_student.py --student runs/ddil``.
"""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image

import ddil_core
import ddil_eval

PROMPT = "a small red circle left of a large blue star on a grey background"


@click.command()
@click.option("--teacher", default="shapes", show_default=True, help="The teacher.")
@click.option("--student", required=True, help="A student, such as a run folder of 'ddil distill'.")
@click.option("--num-prompts", default=256, show_default=True, help="The number of held-out captions.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/example"), show_default=True)
def main(teacher: str, student: str, num_prompts: int, out: Path) -> None:
    """Save one image of the student, then print both systems with their intervals."""
    images = ddil_core.sample(ddil_core.load_model(student), [PROMPT])
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images[0, 0]).save(out / "student.png")

    ddil_eval.compare([teacher, student], num_prompts=num_prompts, metrics=["drawn_right"], out=out)
    rows = ddil_eval.load_records(out)
    columns = ["kind", "name", "nfe", "drawn_right", "drawn_right_low", "drawn_right_high", "drawn_right_p"]
    click.echo(rows.reindex(columns=columns).to_string(index=False))


if __name__ == "__main__":
    main()
