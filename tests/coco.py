"""A small COCO folder with real JPEG files, of different sizes as COCO's are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CAPTIONS = ("a small red circle", "a large blue star")


def photograph(place: int) -> np.ndarray:
    """uint8 [H, W, 3]: a smooth picture of its own for each place, landscape and portrait by turns."""
    rng = np.random.default_rng([7, place])
    height, width = (60 + place % 3, 90 + place % 5)[:: 1 if place % 2 else -1]
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save_coco(folder: Path, count: int = 12, year: int = 2014, part: str = "val") -> Path:
    """``val20XX/`` and ``annotations/captions_val20XX.json`` as COCO has them; two captions an image, not in the images' order."""
    split = f"{part}{year}"
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    names = {1000 - 7 * place: f"COCO_{split}_{1000 - 7 * place:012d}.jpg" for place in range(count)}
    for place, name in enumerate(names.values()):
        Image.fromarray(photograph(place)).save(folder / split / name, quality=95)
    annotations = [
        {
            "image_id": image,
            "id": 10 * image + number,
            "caption": f" {CAPTIONS[number]} \n on a  grey background, {image} ",
        }
        for number in range(2)
        for image in sorted(names)
    ]
    content = {
        "info": {},
        "images": [{"id": image, "file_name": name} for image, name in names.items()],
        "annotations": annotations,
    }
    (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return folder
