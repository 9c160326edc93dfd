"""Inverted prompts, kept one small file for each image and inverter, so that a stopped inversion goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.inversion import InversionProblem, InvertedPrompt, SelectionSettings, get_inverter, invert
from ddil_core.support.checksums import with_content_sha256, without_content_sha256
from ddil_core.support.environment import full_precision
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_text
from ddil_core.support.outside import DESCRIPTION, parse_json, read_file
from ddil_core.support.progress import progress
from ddil_core.support.protocol import content_hash
from ddil_eval.experiments.image_sources import slug


def invert_all(
    problem: InversionProblem,
    name: str,
    settings: dict[str, Any],
    batch_size: int,
    choosing: SelectionSettings,
    folder: Path,
) -> list[str]:
    """Invert all images of a problem, and return their prompts in order. Prompts that lie in ``folder`` are read back.

    Args:
        problem: The images, the teacher and the words.
        name: The name of the inverter.
        settings: The inverter's settings; those left out get their defaults.
        batch_size: The number of images that are inverted at a time.
        choosing: How a prompt is chosen among its candidates.
        folder: Where prompts are kept.
    """
    inverter, chosen = get_inverter(name, settings)
    depends = {
        "inverter": name,
        "settings": chosen.model_dump(mode="json"),
        "teacher": problem.model.weights_sha256(),
        "words": list(problem.words.words),
        "towers": None if problem.towers is None else problem.towers.identity,
        "choosing": choosing.identity(),
        "seed": problem.seed,
    }
    place = folder / f"{name}-{content_hash(depends)[:12]}"
    paths = [
        place / f"{slug(image_id)}-{_digest(image_id, image)}.json"
        for image_id, image in zip(problem.ids, problem.images, strict=True)
    ]
    by_id = dict(zip(problem.ids, paths, strict=True))
    todo = [row for row, path in enumerate(paths) if not path.is_file()]
    size = min(batch_size, len(paths))  # as in the first run, so that a run that goes on finds the same words
    rest = replace(problem, ids=tuple(problem.ids[row] for row in todo), images=problem.images[todo])
    evaluations = inverter.evaluations(chosen)
    total = -(-len(todo) // size) * evaluations
    with full_precision(), progress(f"invert: {name}", total=total) as advance:
        for batch in invert(rest, inverter, chosen, size, choosing, advance):
            for inverted in batch:
                content = with_content_sha256(asdict(inverted))
                write_text(by_id[inverted.id], json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return [read_inverted(path).prompt for path in paths]


def read_inverted(path: Path) -> InvertedPrompt:
    """Read a kept prompt.

    Raises:
        DdilError: the file is damaged.
    """
    try:
        content = without_content_sha256(parse_json(read_file(path, DESCRIPTION)))
        inverted = InvertedPrompt(**content | {"candidates": tuple(content["candidates"])})
        if not all(isinstance(text, str) for text in (inverted.id, inverted.prompt, *inverted.candidates)):
            raise TypeError("id, prompt and candidates are texts")
        return inverted
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise DdilError(f"the inverted prompt {path} is damaged; delete the file to invert its image again") from error


def _digest(image_id: str, image: np.ndarray) -> str:
    return content_hash([image_id, image.tobytes().hex()])[:8]
