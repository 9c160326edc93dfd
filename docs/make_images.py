"""Generate the images of the docs: ``python docs/make_images.py``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from ddil_core.distillation.distill import distill
from ddil_core.models.model import load_model
from ddil_core.shapes.batches import draw_batch
from ddil_core.support.image_grids import image_grid
from ddil_eval.experiments.point_figures import point_figure

HERE = Path(__file__).parent / "images"


def main() -> None:
    """Draw all images."""
    draw_shapes()
    draw_gaussians()


def draw_shapes() -> None:
    """Draw seven images of the shapes world's training split, with their captions."""
    batch = draw_batch(7, 0, seed=7)
    image_grid(batch.images[None], [""], batch.captions, HERE / "shapes.png", cell=128)


def draw_gaussians() -> None:
    """Distil the exact teacher by the shipped protocol, and draw its student of four steps."""
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        distill("gaussians", "gaussians", "pd", run, device="cpu")
        student = load_model(str(run / "stages" / "4-steps"), "cpu")
        point_figure(load_model("gaussians", "cpu"), student, HERE / "gaussians.png")


if __name__ == "__main__":
    main()
