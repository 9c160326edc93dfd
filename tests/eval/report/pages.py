"""Results folders for the tests of the page: every kind of record and picture, with texts that try to get in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddil_eval.report.records import Record, RecordedMetric, RecordedModel, save_record
from ddil_eval.report.strips import write_strips
from tests.records import measured, p_teacher, record, system

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> \"&<!-- {{ 7 * 7 }} \u2028"
)
"""A text that would run if any place of the page, also its JSON, did not escape it."""
CAPTIONS = ("a small red circle", HOSTILE, "a large blue star")
SCORES = {"PD": (0.9, 0.2, 0.8), "LCM": (0.8, 0.95, 0.1)}
"""The scores of the three captions by system: the largest changes are 0.75 and 0.7, of the second and the third."""


def everything(folder: Path) -> Path:
    """Fill a folder with records of every experiment, strips, kept images and their features."""
    for kept in (*_systems(), *_shift(), *_drift(), *drift_of_groups(["PD", HOSTILE])):
        save_record(kept, folder)
    images = np.arange(3 * 2 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 2, 8, 8, 3)
    write_strips(images, ["1", HOSTILE, "3"], CAPTIONS, ["student alone", HOSTILE], folder, "figure2")
    for name in SCORES:
        keep_images(folder, name)
    return folder


def keep_images(folder: Path, name: str) -> None:
    """Write what ``ddil eval systems --save-images`` leaves of one system: images, their index, and features."""
    prompts = {"prompt_ids_sha256": "c" * 64, "captions_sha256": "d" * 64}
    made: dict[str, Any] = {"reference": name, "seed": 0, "solver": "ddim"}
    place = folder / "images" / name
    place.mkdir(parents=True)
    (place / "made.json").write_text(json.dumps(made | prompts))
    lines = [{"id": str(n), "file": f"{n:06d}.png", "prompt": text, "seed": 0} for n, text in enumerate(CAPTIONS)]
    for line in lines:
        Image.new("RGB", (8, 8), "red").save(place / str(line["file"]))
    (place / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    features = folder / "features" / f"of-{name}"
    features.mkdir(parents=True)
    (features / "key.json").write_text(json.dumps({"name": name, "made": made, "prompts": prompts}))
    np.save(features / "shapes_reader.npy", np.array(SCORES[name], dtype=np.float32)[:, None])


def _systems() -> list[Record]:
    network = {"name": "shapes_reader", "version": 1}
    right = RecordedMetric.model_validate(measured(0.75, 0.03).model_dump() | {"network": network})
    metrics = {"fd": measured(50.0, 1.0, "lower", "set"), "drawn_right": right}
    rows = [system("teacher", 32), system("PD", 4, metrics=metrics), system("LCM", 4, metrics=metrics)]
    pair = {"kind": "difference", "name": f"PD − {HOSTILE}", "of": ["PD", HOSTILE]}
    return [*rows, system(HOSTILE, 1), system("", 1, cell=pair, nfe=None)]


def _shift() -> list[Record]:
    cells: list[dict[str, Any]] = [{"kind": "pure", "model": model} for model in ("teacher", "student")]
    cells += [{"kind": kind, "switch_t": t} for kind in TURNS for t in (749, 500, 250)]
    cells += [{"kind": "string", "string": string} for string in ("TT", "TS", "ST", "SS")]
    cells += [{"kind": "effect", "transitions": places} for places in ([0], [1], [0, 1])]
    return [p_teacher(p, fd=20 - 5 * p) for p in (0.8, 0.6, 0.4, 0.2)] + [record(cell) for cell in cells]


def _drift() -> list[Record]:
    names = {
        "drift": ("disagreement_data", "disagreement_teacher", "disagreement_student", "shift_ratio", "rollout_ratio"),
        "drift-ratios": ("log_shift_ratio",),
        "drift-states": ("mmd_data", "mmd_teacher"),
        "drift-paths": ("distance", "commitment_teacher", "commitment_student"),
    }
    return [
        record(
            {"kind": kind, "t": t},
            experiment="drift",
            metrics={name: measured(0.5 + k / 10, 0.05, "lower") for k, name in enumerate(metrics)},
        )
        for kind, metrics in names.items()
        for t in (999, 749, 500, 250, *(["all"] if kind in ("drift", "drift-ratios") else []))
    ]


def drift_of_groups(names: Sequence[str], grid: Sequence[float] = (999, 749.5, 500, 250)) -> list[Record]:
    """The records of groups of three students, and of the second group less the first.

    The shift ratio of group k is 1.1 + k / 10 at each time, and it falls by a fifth from the first to the second.
    """
    roles = {
        f"{name} {n}": RecordedModel(reference=f"runs/{name}/{n}", weights_sha256=None)
        for name in names
        for n in (1, 2, 3)
    }
    values: list[tuple[str, str, dict[str, RecordedMetric]]] = []
    for k, name in enumerate(names):
        own = {"disagreement_data": measured(0.5, 0.05, "lower"), "shift_ratio": measured(1.1 + k / 10, 0.05, "lower")}
        values.append(("drift-group", name, own | {"disagreement_student": measured(0.6, 0.05, "lower")}))
    changed = {name: measured(-0.05, 0.1, "lower") for name in ("disagreement_data", "disagreement_teacher")}
    changed |= {
        "log_rollout_ratio": measured(-0.1, 0.3, "lower"),
        "log_shift_ratio": measured(math.log(0.8), 0.2, "lower"),
    }
    values.append(("drift-group-difference", " − ".join(names[1::-1]), changed))
    alike: dict[str, Any] = {"experiment": "drift", "systems": roles, "grid": list(grid)}
    return [
        record({"kind": kind, "name": name, "t": t, "training_seeds": 3}, metrics=metrics, **alike)
        for kind, name, metrics in values
        for t in (*grid, "all")
    ]


TURNS = ("teacher_then_student", "student_then_teacher")
