"""Add a metric, and measure it: ``python examples/add_a_metric.py --model shapes``.

``METRICS.add`` adds the row for this process. For every command, put the row into a package with an entry point:

    [project.entry-points."ddil.metrics"]
    contrast = "my_package:CONTRAST"
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

import ddil_eval
from ddil_eval.metrics import METRICS, Extractor, Metric, Network


def open_contrast(device: str) -> Extractor:
    """Return a function from images uint8 [B, H, W, 3] and captions to the standard deviation of each image, [B, 1]."""
    return lambda images, captions: images.std(axis=(1, 2, 3), dtype=np.float64)[:, None] / 255


CONTRAST = Metric(
    name="contrast",
    title="standard deviation of an image's values",
    direction="higher",
    kind="mean",
    network=Network("contrast", "nothing", open_contrast),
    bounds=(0.0, 0.5),
)


@click.command()
@click.option("--model", default="shapes", show_default=True, help="The model.")
@click.option("--num-prompts", default=64, show_default=True, help="The number of held-out captions.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/contrast"), show_default=True)
def main(model: str, num_prompts: int, out: Path) -> None:
    """Print the mean contrast of a model's images, with its 95 % interval."""
    METRICS.add(CONTRAST)
    (record,) = ddil_eval.compare([model], num_prompts=num_prompts, metrics=[CONTRAST.name], out=out)
    estimate = record.metrics[CONTRAST.name].estimate
    click.echo(f"{CONTRAST.title}: {estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")


if __name__ == "__main__":
    main()
