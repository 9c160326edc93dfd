"""The folder in which the commands of the pages run: small data and small models under the names that pages use."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from tests.coco import save_coco
from tests.docs.pages import ROOT, pages
from tests.pipelines import BETAS, build, save_lora

_TITLED = re.compile(r'^```\w+ title="(?P<title>[^"]+)"\n(?P<text>.*?)^```', re.MULTILINE | re.DOTALL)

IMAGES = 16
"""Images of a small data set."""


def furnish(desk: Path, hub: Path) -> None:
    """Fill a folder with what the pages say that a reader brings.

    Args:
        desk: The working folder. ``train`` and ``test`` get captioned images, ``data/coco`` the two years of COCO,
            ``results/old`` and ``results/new`` the records of the shapes world, and the files of the pages that have a
            title their content.
        hub: The cache of the hub. ``sd15`` and its LCM-LoRA are there, tiny and untrained.
    """
    for folder, seed in (("train", 0), ("test", 1)):
        _captioned(desk / folder, seed)
    for year in (2014, 2017):
        for part in ("train", "val"):
            save_coco(desk / "data" / "coco", IMAGES, year, part)
    for name in ("old", "new"):
        shutil.copytree(ROOT / "results" / "shapes" / "records", desk / "results" / name / "records")
    (desk / "DIR").symlink_to(desk / "data" / "coco")  # what pages write where any folder may stand
    for page in pages():
        if page == "docs/guides/your-own-teacher.md":  # walked by a test of its own, with names of its own
            continue
        for block in _TITLED.finditer((ROOT / page).read_text(encoding="utf-8")):
            path = desk / block["title"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["text"], encoding="utf-8")
    _publish(hub, desk / "words")


def _captioned(folder: Path, seed: int) -> None:
    """Write images of the shapes world, and their captions in ``metadata.jsonl``."""
    from PIL import Image

    from ddil_core.shapes.batches import draw_batch

    batch = draw_batch(IMAGES, 0, seed=seed)
    folder.mkdir()
    rows = []
    for place, (image, caption) in enumerate(zip(batch.images, batch.captions, strict=True)):
        Image.fromarray(image).save(folder / f"{place:04}.png")
        rows.append(json.dumps({"file_name": f"{place:04}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _publish(hub: Path, words: Path) -> None:
    """Put a pipeline as Stable Diffusion 1.5 is published, and a LoRA for it, into the cache of the hub."""
    from diffusers import PNDMScheduler

    pipeline = build("StableDiffusionPipeline", words)
    pipeline.register_modules(scheduler=PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True))
    pipeline.save_pretrained(_snapshot(hub, "stable-diffusion-v1-5/stable-diffusion-v1-5"), safe_serialization=True)
    save_lora(_snapshot(hub, "latent-consistency/lcm-lora-sdv1-5"), pipeline)


def _snapshot(hub: Path, name: str) -> Path:
    """Return the folder of a model's files in the cache, after its reference."""
    storage, commit = hub / f"models--{name.replace('/', '--')}", "0" * 40
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(commit)
    folder = storage / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder
