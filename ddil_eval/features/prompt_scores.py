"""The scores of single prompts that experiments keep in ``features`` beside their records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.support.errors import DdilError
from ddil_core.support.outside import DESCRIPTION, parse_json, read_file
from ddil_eval.features.storage import read_features
from ddil_eval.report.records import Record

MADE = ("solver", "guidance_scale", "reflection", "pictures_sha256")
"""What a record and the key of features both say of how images were made, beside grid, weights and seed."""


@dataclass(frozen=True)
class PromptScores:
    """Finds the scores behind the records of a results folder.

    Attributes:
        folder: The results folder.
        keys: The key of each folder of features: what they depend on.
    """

    folder: Path
    keys: dict[Path, dict[str, Any]]

    @classmethod
    def below(cls, folder: Path) -> PromptScores:
        """List the features at or below a folder. A key that cannot be read has no scores."""
        return cls(folder, dict(_keys(folder)))

    def find(self, record: Record, metric: str) -> np.ndarray | None:
        """Return the scores [n] of a metric, one for each prompt in order, or None.

        The features were made as the record says, and the scores have exactly the record's mean. A damaged file has
        no scores.
        """
        measured = record.metrics[metric]
        network = (measured.network or {}).get("name")
        if measured.kind not in ("mean", "group") or not isinstance(network, str) or Path(network).name != network:
            return None
        for place, key in self.keys.items():
            path = place / f"{network}.npy"
            if not _made_as(record, key) or not path.is_file():
                continue
            try:
                scores = np.asarray(read_features(path, measured.estimate.n, "scores"), dtype=np.float64)
            except DdilError:
                continue
            mean = float(scores.mean())
            if scores.shape[1] == 1 and math.isclose(mean, measured.estimate.value, rel_tol=1e-9, abs_tol=1e-12):
                return scores[:, 0]
        return None


def _keys(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.rglob("features/*/key.json")):
        try:
            content = parse_json(read_file(path, DESCRIPTION))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and all(isinstance(content.get(part), dict) for part in ("made", "prompts")):
            yield path.parent, content


def _made_as(record: Record, key: dict[str, Any]) -> bool:
    """Whether features are of the prompts, the model and the sampling of a record."""
    made = key["made"]
    held = record.model_dump(mode="json", include=set(MADE))
    return (
        all(record.data.get(name) == value for name, value in key["prompts"].items())
        and all(made.get(name) == held[name] for name in MADE)
        and (made.get("grid") or []) == record.grid
        and [made.get("weights_sha256")] == [system.weights_sha256 for system in record.systems.values()]
        and record.seeds == ([] if made.get("seed") is None else [made["seed"]])
    )
