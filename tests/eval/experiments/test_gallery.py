"""A gallery's finished batches are taken up by the same work alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddil_core.inversion.towers import SHAPES, load_inversion_towers
from ddil_core.models.sampling import Sampling
from ddil_eval.experiments.gallery import Gallery
from ddil_eval.experiments.image_sources import ImageOrigin
from ddil_eval.features.extraction import Extractors

ORIGIN = ImageOrigin("runs/a", "a" * 64, "ddim", (999, 500), 1.0, 2.0, 3)
SAMPLING = Sampling("ddim", 2, 1.0)
PROMPTS = ("a red circle", "a blue star")


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    references = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    extractors, towers = Extractors(["lpips_efflite0"], "cpu"), load_inversion_towers(SHAPES)
    return Gallery(("0", "1"), references, "lpips_efflite0", extractors, towers, 3, 8, 3, Path("partial"), "cpu")


def key(
    gallery: Gallery, origin: ImageOrigin = ORIGIN, sampling: Sampling = SAMPLING, prompts: tuple[str, ...] = PROMPTS
) -> str:
    return gallery._work_key(origin, sampling, prompts)


def test_the_work_key_ignores_folder_and_device(gallery: Gallery) -> None:
    assert key(gallery) == key(replace(gallery, work=Path("elsewhere"), device="cuda"))
    assert key(gallery, replace(ORIGIN, reference="./runs/a")) == key(gallery)


@pytest.mark.parametrize(
    "change",
    [
        {"origin": replace(ORIGIN, weights_sha256="b" * 64)},
        {"sampling": replace(SAMPLING, steps=3)},
        {"sampling": replace(SAMPLING, guidance_scale=2.0)},
        {"sampling": replace(SAMPLING, solver="dpmpp_2m")},
        {"prompts": PROMPTS[::-1]},
    ],
)
def test_other_sampling_or_prompts_are_other_work(change: dict[str, Any], gallery: Gallery) -> None:
    assert key(gallery, **change) != key(gallery)


def test_a_gallery_of_other_settings_is_other_work(gallery: Gallery) -> None:
    brighter = gallery.references.copy()
    brighter[0, 0, 0, 0] ^= 1
    others = [
        replace(gallery, ids=("1", "0")),
        replace(gallery, references=brighter),
        replace(gallery, number=4),
        replace(gallery, batch_size=9),
        replace(gallery, seed=4),
        replace(gallery, distance="lpips_diversity"),
        replace(gallery, extractors=Extractors(["fd_efflite0"], "cpu")),
        replace(gallery, towers=replace(gallery.towers, identity={"name": "another"})),
    ]
    keys = {key(other) for other in others}
    assert len(keys) == len(others) and key(gallery) not in keys
