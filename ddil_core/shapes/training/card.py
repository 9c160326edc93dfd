"""The shapes world measured: what the model card says, by the reader that sees only pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.data.shapes import ShapesData
from ddil_core.models.generate import sample
from ddil_core.models.model import Model
from ddil_core.shapes.batches import to_pixels
from ddil_core.shapes.reader import ATTRIBUTES, drawn_right, read
from ddil_core.shapes.render import render
from ddil_core.shapes.scene import Scene
from ddil_core.support.files import write_text


def shares(images: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """The share of pictures uint8 [N, 64, 64, 3] that show each attribute, and all of it (``exact``), as stated."""
    rows = [drawn_right(read(image), scene.meaning) for image, scene in zip(images, scenes, strict=True)]
    return {name: float(np.mean([row[name] for row in rows])) for name in (*ATTRIBUTES, "exact")}


def measure_card(model: Model, count: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The card's figures on the first ``count`` held-out scenes."""
    data = ShapesData()
    scenes = [data.scene(index) for index in range(count)]
    started = time.perf_counter()
    pictures = np.stack([render(scene) for scene in scenes])
    rate = count / (time.perf_counter() - started)
    mean, _ = model.encode_images(to_pixels(pictures))
    round_trips = model.decode(mean)
    errors = np.square(round_trips.astype(np.float64) - pictures).mean(axis=(1, 2, 3))
    found: dict[str, Any] = {
        "captions": count,
        "seed": seed,
        "guidance_scale": model.sampling.guidance_scale,
        "rendered_per_second": rate,
        "autoencoder_psnr_db": float(10 * np.log10(255**2 / errors.mean())),
        "rendered": shares(pictures, scenes),
        "round_trips": shares(round_trips, scenes),
    }
    captions = [scene.meaning.caption for scene in scenes]
    for steps in (32, 16, 8, 4):
        drawn = sample(model, captions, steps=steps, seed=seed)[:, 0]
        found[f"teacher_{steps}_steps"] = shares(drawn, scenes)
    return found


def write_card(folder: Path, found: dict[str, Any], training: dict[str, Any]) -> None:
    """``card.json`` and the model card ``README.md`` in the folder of the weights."""
    write_text(folder / "card.json", json.dumps({"measured": found, "training": training}, indent=2) + "\n")
    columns = (*ATTRIBUTES, "exact")
    rows = {
        "rendered pictures": "rendered",
        "autoencoder round trips": "round_trips",
        **{f"teacher, {steps} DDIM steps": f"teacher_{steps}_steps" for steps in (32, 16, 8, 4)},
    }
    lines = [
        "# The shapes world's networks",
        "",
        "Small networks in Stable Diffusion's layout (`teacher/`, loads with `DiffusionPipeline.from_pretrained`) and a two-tower",
        "scorer in open_clip's layout (`scorer/`). They draw captions such as *a small red circle left of a large blue star on a",
        "grey background*, 64 × 64. `python -m ddil_core.shapes.training` trains such networks; how these came about stands last.",
        "",
        f"Measured by `python -m ddil_core.shapes.training --measure` on {found['captions']} held-out captions, each of two",
        f"objects whose combination training never showed; guidance {found['guidance_scale']:g}, seed {found['seed']}.",
        "A picture that the reader cannot read counts as wrong.",
        "",
        "| share read right | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(
            f"| {title} | " + " | ".join(f"{found[key][column]:.1%}" for column in columns) + " |"
            for title, key in rows.items()
        ),
        "",
        f"Autoencoder round trip: {found['autoencoder_psnr_db']:.1f} dB. "
        f"Renderer: {found['rendered_per_second']:,.0f} pictures a second on one core.",
        "",
        "Training: " + "; ".join(f"{key} {value}" for key, value in training.items()) + ".",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))
