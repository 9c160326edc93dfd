"""Measure the shapes world's networks, and write their model card."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from ddil_core.data.shapes import ShapesData
from ddil_core.models.generate import sample
from ddil_core.models.model import Model, load_model
from ddil_core.shapes.batches import to_pixels
from ddil_core.shapes.reader import ATTRIBUTES, drawn_right, read
from ddil_core.shapes.render import render
from ddil_core.shapes.scene import Scene, nearly
from ddil_core.shapes.scorer import cosine, load_scorer
from ddil_core.support.files import write_text


@dataclass(frozen=True)
class Words:
    """What a card says beside the figures.

    Attributes:
        title: The title.
        about: The lines on what the folder holds.
        command: The command that measures.
        solver: The name of the solver that the teacher is measured with.
    """

    title: str
    about: tuple[str, ...]
    command: str
    solver: str


NETWORKS = Words(
    title="The shapes world's networks",
    about=(
        "`teacher/` is a small pipeline in Stable Diffusion's layout; `DiffusionPipeline.from_pretrained` loads it.",
        "`scorer/` is a two-tower scorer in open_clip's layout. The teacher draws captions such as *a small red circle",
        "left of a large blue star on a grey background*, 64 × 64. `python -m ddil_core.shapes.training` trains such",
        "networks; the last paragraph says how these were trained.",
    ),
    command="python -m ddil_core.shapes.training --measure",
    solver="DDIM",
)


def shares(images: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Return the share of images uint8 [N, 64, 64, 3] with each attribute right, and with all right (``exact``)."""
    rows = [drawn_right(read(image), scene.meaning) for image, scene in zip(images, scenes, strict=True)]
    return {name: float(np.mean([row[name] for row in rows])) for name in (*ATTRIBUTES, "exact")}


def measure_card(model: Model, count: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Measure a teacher on the first ``count`` held-out scenes, and return the card's figures."""
    data = ShapesData()
    scenes = [data.scene(index) for index in range(count)]
    started = time.perf_counter()
    images = np.stack([render(scene) for scene in scenes])
    rate = count / (time.perf_counter() - started)
    mean, _ = model.encode_images(to_pixels(images))
    round_trips = model.decode(mean)
    errors = np.square(round_trips.astype(np.float64) - images).mean(axis=(1, 2, 3))
    measured: dict[str, Any] = {
        "captions": count,
        "seed": seed,
        "guidance_scale": model.sampling.guidance_scale,
        "rendered_per_second": rate,
        "autoencoder_psnr_db": float(10 * np.log10(255**2 / errors.mean())),
        "rendered": shares(images, scenes),
        "round_trips": shares(round_trips, scenes),
    }
    captions = [scene.meaning.caption for scene in scenes]
    for steps in (32, 16, 8, 4):
        drawn = sample(model, captions, steps=steps, seed=seed)[:, 0]
        measured[f"teacher_{steps}_steps"] = shares(drawn, scenes)
    return measured


def caption_preferred(scorer: Path, count: int = 1000) -> float:
    """Return how often a scorer prefers an image's caption to the same caption with one attribute changed.

    Args:
        scorer: The folder of the scorer.
        count: The number of held-out scenes. Each is drawn, and its caption changed, in one way.
    """
    model, pixels, tokens = load_scorer(scorer)
    data, rng = ShapesData(), np.random.default_rng(0)
    preferred = 0
    for start in range(0, count, 100):
        scenes = [data.scene(index) for index in range(start, min(start + 100, count))]
        images = pixels(np.stack([render(scene) for scene in scenes]))
        captions = [scene.meaning.caption for scene in scenes]
        others = [nearly(scene.meaning, rng).caption for scene in scenes]
        preferred += int(np.sum(cosine(model, images, tokens(captions)) > cosine(model, images, tokens(others))))
    return preferred / count


def write_card(folder: Path, measured: dict[str, Any], training: dict[str, object], words: Words = NETWORKS) -> None:
    """Write ``card.json`` and the model card ``README.md`` into the folder of the weights."""
    write_text(folder / "card.json", json.dumps({"measured": measured, "training": training}, indent=2) + "\n")
    columns = (*ATTRIBUTES, "exact")
    rows = {
        "rendered images": "rendered",
        "autoencoder round trips": "round_trips",
        **{f"teacher, {steps} {words.solver} steps": f"teacher_{steps}_steps" for steps in (32, 16, 8, 4)},
    }
    share = measured.get("scorer_caption_preferred")  # where the folder has a scorer
    scorer_lines = [
        f"The scorer prefers {share:.1%} of these captions to the same caption with one attribute changed."
    ] if share is not None else []  # fmt: skip
    lines = [
        f"# {words.title}",
        "",
        *words.about,
        "",
        f"`{words.command}` measured them on {measured['captions']} held-out captions.",
        "Training never showed these combinations of two objects. "
        f"Guidance {measured['guidance_scale']:g}, seed {measured['seed']}.",
        "An image that the reader cannot read counts as wrong.",
        "",
        "| share read right | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(
            f"| {title} | " + " | ".join(f"{measured[key][column]:.1%}" for column in columns) + " |"
            for title, key in rows.items()
        ),
        "",
        f"Autoencoder round trip: {measured['autoencoder_psnr_db']:.1f} dB. "
        f"Renderer: {measured['rendered_per_second']:,.0f} images a second on one core.",
        *scorer_lines,
        "",
        "Training: " + "; ".join(f"{key} {value}" for key, value in training.items()) + ".",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))


def read_training(weights: Path) -> dict[str, object]:
    """Return what the card in a folder of weights says of the training; nothing where there is no card."""
    card = weights / "card.json"
    found: dict[str, object] = json.loads(card.read_text())["training"] if card.is_file() else {}
    return found


def measure_weights(
    weights: Path, device: torch.device, captions: int, training: dict[str, object], words: Words = NETWORKS
) -> None:
    """Measure a folder of weights and write its card."""
    measured = measure_card(load_model(str(weights / "teacher"), device), captions)
    scorer = weights / "scorer"
    found = {"scorer_caption_preferred": caption_preferred(scorer, captions)} if scorer.is_dir() else {}
    write_card(weights, measured | found, training, words)
    click.echo(f"The weights and their card are in {weights}")
