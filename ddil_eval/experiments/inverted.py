"""Prompts of pictures, kept as they are found, a small file for each picture and inverter, so that a stopped inversion goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.inversion import InversionProblem, InvertedPrompt, SelectionSettings, get_inverter, invert
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_text
from ddil_core.support.progress import progress
from ddil_core.support.protocol import content_hash
from ddil_eval.experiments.image_sources import slug


def invert_all(
    whole: InversionProblem,
    name: str,
    settings: dict[str, Any],
    batch_size: int,
    choosing: SelectionSettings,
    folder: Path,
) -> list[InvertedPrompt]:
    """The prompts of a problem's pictures by one inverter, in their order; those that lie in ``folder`` are read back."""
    inverter, chosen = get_inverter(name, settings)
    told = {
        "inverter": name,
        "settings": chosen.model_dump(mode="json"),
        "teacher": whole.model.weights_sha256(),
        "words": list(whole.words.words),
        "towers": None if whole.towers is None else whole.towers.identity,
        "choosing": choosing.identity(),
        "seed": whole.seed,
    }
    place = folder / f"{name}-{content_hash(told)[:12]}"
    paths = {
        one: place / f"{slug(one)}-{_digest(one, image)}.json"
        for one, image in zip(whole.ids, whole.images, strict=True)
    }
    left = [row for row, one in enumerate(whole.ids) if not paths[one].is_file()]
    size = min(batch_size, len(whole.ids))  # the same for a run that goes on, so that it finds the same words
    part = replace(whole, ids=tuple(whole.ids[row] for row in left), images=whole.images[left])
    evaluations = inverter.evaluations(chosen)
    with progress(f"invert: {name}", total=-(-len(left) // size) * evaluations) as advance:
        for batch in invert(part, inverter, chosen, size, choosing, advance):
            for found in batch:
                write_text(paths[found.id], json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
    return [read_inverted(paths[one]) for one in whole.ids]


def read_inverted(path: Path) -> InvertedPrompt:
    """A kept prompt.

    Raises:
        DdilError: the file is damaged.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = InvertedPrompt(**told | {"candidates": tuple(told["candidates"])})
        if not all(isinstance(text, str) for text in (found.id, found.prompt, *found.candidates)):
            raise TypeError("a prompt is one text")
        return found
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        raise DdilError(
            f"the inverted prompt {path} is damaged; delete the file to invert its picture again"
        ) from error


def prompts_of(found: Sequence[InvertedPrompt]) -> list[str]:
    """Their prompts."""
    return [one.prompt for one in found]


def _digest(name: str, image: np.ndarray) -> str:
    return content_hash([name, image.tobytes().hex()])[:8]
