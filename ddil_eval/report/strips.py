"""Strips: the images of one prompt side by side, one PNG file for each prompt, with an index that a report reads.

A folder of strips lies in ``RESULTS/EXPERIMENT/KEY/strips/NAME``. Its index has one line for each prompt. The checksums
of all files are beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from ddil_core.support.checksums import MANIFEST, write_manifest
from ddil_core.support.files import replacing, write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDER, INDEX = "strips", "strips.jsonl"


class Strip(BaseModel):
    """One line of the index.

    Attributes:
        id: The id of the prompt.
        file: The name of the PNG file, which holds the images from left to right.
        prompt: The prompt.
        columns: The name of each image.
        scores: For each metric of single prompts: the score of each image; None for an image without a score.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    file: str
    prompt: str
    columns: list[str]
    scores: dict[str, list[float | None]] = {}


def write_strips(
    images: NDArray[np.uint8],
    ids: Sequence[str],
    prompts: Sequence[str],
    columns: Sequence[str],
    figures: Path,
    name: str,
    scores: Mapping[str, NDArray[np.float64]] | None = None,
) -> Path:
    """Write a strip for each prompt, then their index, and return the folder ``figures/strips/name``.

    Args:
        images: uint8 [P, C, H, W, 3].
        ids: The ids of the P prompts.
        prompts: The P prompts.
        columns: The names of the C images of each prompt.
        figures: The folder of the run's figures.
        name: The name of the folder.
        scores: For each metric: scores [P, C]; NaN where an image has none.

    Raises:
        DdilError: A file cannot be written.
    """
    folder = figures / FOLDER / name
    for index in (MANIFEST, INDEX):  # new ones are written once all strips are kept
        (folder / index).unlink(missing_ok=True)
    lines = []
    for row, strip in enumerate(images):
        line = Strip(
            id=ids[row],
            file=f"{row:06d}.png",
            prompt=prompts[row],
            columns=list(columns),
            scores={
                metric: [None if np.isnan(score) else float(score) for score in values[row]]
                for metric, values in (scores or {}).items()
            },
        )
        with replacing(folder / line.file) as temporary:
            Image.fromarray(np.concatenate(list(strip), axis=1)).save(temporary)
        lines.append(line.model_dump_json() + "\n")
    write_text(folder / INDEX, "".join(lines))
    write_manifest(folder, [folder / INDEX, *(folder / f"{row:06d}.png" for row in range(len(lines)))])
    return folder


def read_strips(folder: Path) -> list[Strip]:
    """Return the lines of a folder's index. A line that cannot be read, or names a file elsewhere, is left out."""
    strips = []
    try:
        lines = (folder / INDEX).read_text(encoding="utf-8").split("\n")  # a prompt may hold other line ends
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            strip = Strip.model_validate(json.loads(line))
        except (ValidationError, ValueError, RecursionError):
            continue
        if Path(strip.file).name == strip.file and strip.columns:
            strips.append(strip)
    return strips
