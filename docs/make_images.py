"""Generate the images of the docs: ``python docs/make_images.py``."""

from __future__ import annotations

from pathlib import Path

from ddil_core.shapes.batches import draw_batch
from ddil_core.support.image_grids import image_grid

HERE = Path(__file__).parent / "images"


def main() -> None:
    """Draw seven images of the shapes world's training split, with their captions."""
    batch = draw_batch(7, 0, seed=7)
    image_grid(batch.images[None], [""], batch.captions, HERE / "shapes.png", cell=128)


if __name__ == "__main__":
    main()
