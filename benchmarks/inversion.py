"""Images inverted in a second, one by one and in batches.

    python -m benchmarks.inversion [--teacher shapes] [--batch 16] [--rounds 2] [--device cpu] [--csv FILE]

PH2P runs with the settings of the shapes world's Table 5 for fewer rounds; an evaluation costs the same in each round.
Each round gives a candidate, so that no prompts are compared on common noise. Both ways alternate, so that drift of
the machine affects both.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import click
import pandas as pd
import torch

from benchmarks.alternation import compare, ratio
from benchmarks.printing import show
from ddil_core.data.datasets import open_data
from ddil_core.inversion import InversionProblem
from ddil_core.inversion.ph2p import PH2PSettings, ph2p
from ddil_core.inversion.words import model_words
from ddil_core.models.model import load_model
from ddil_core.shapes.training.architecture import caption_words
from ddil_core.support.protocol import read_yaml
from ddil_core.support.resources import protocols
from ddil_eval.cli.options import quiet_libraries


def invert(problem: InversionProblem, settings: PH2PSettings, size: int) -> None:
    """Invert all images of a problem, ``size`` at once."""
    for start in range(0, len(problem.ids), size):
        part = slice(start, start + size)
        ph2p(replace(problem, ids=problem.ids[part], images=problem.images[part]), settings, lambda: None)


@click.command()
@click.option("--teacher", default="shapes", show_default=True)
@click.option("--batch", default=16, show_default=True, help="Images at once.")
@click.option("--rounds", default=2, show_default=True, help="Rounds of PH2P.")
@click.option("--repeats", default=3, show_default=True, help="Turns that are counted, after one warm-up.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(teacher: str, batch: int, rounds: int, repeats: int, device: str, csv_path: Path | None) -> None:
    quiet_libraries()
    model, data = load_model(teacher, device), open_data("shapes")
    table_settings = read_yaml(protocols() / "shapes" / "table5.yaml")["inverters"]["ph2p"]
    settings = PH2PSettings(**table_settings | {"rounds": rounds, "candidates": rounds})
    ids = tuple(prompt.id for prompt in data.prompts(batch))
    problem = InversionProblem(model, model_words(model, tuple(caption_words())), next(data.images(batch)), ids, 0)
    one_by_one, together = "one by one", f"batch {batch}"
    times = compare(
        {one_by_one: lambda: invert(problem, settings, 1), together: lambda: invert(problem, settings, batch)},
        rounds=repeats,
        clock="wall",
    )
    rows = []
    for name, found in times.items():
        median = statistics.median(found)
        rows.append(
            {
                "images": name,
                "images_per_second": batch / median,
                "evaluations_per_second": batch * rounds * settings.evaluations / median,
                "times": ratio(times[one_by_one], found),
            }
        )
    frame = pd.DataFrame(rows)
    show(frame, csv_path, ".3f", title=f"PH2P on {teacher}, {device}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
