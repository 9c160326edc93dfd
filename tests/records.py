"""Records for tests: the fields that matter are given, the others stand still."""

from __future__ import annotations

from typing import Any

from ddil_eval.report.records import Record, RecordedEstimate, RecordedMetric, RecordedModel


def measured(value: float, half: float, direction: str = "higher", kind: str = "mean", n: int = 256) -> RecordedMetric:
    return RecordedMetric.model_validate(
        {
            "estimate": RecordedEstimate(value=value, low=value - half, high=value + half, n=n),
            "direction": direction,
            "kind": kind,
        }
    )


def record(cell: dict[str, Any], fd: float | None = 12.5, right: float | None = 0.75, **changes: Any) -> Record:
    """A covariate-shift record of `cell` with the two metrics, less those that are None."""
    metrics = {}
    if fd is not None:
        metrics["fd_efflite0"] = measured(fd, 0.5, "lower", "set")
    if right is not None:
        metrics["drawn_right"] = measured(right, 0.03125)
    fields: dict[str, Any] = {
        "experiment": "covariate-shift",
        "cell": cell,
        "protocol": {"num_prompts": 256},
        "protocol_hash": "0" * 64,
        "systems": {
            "teacher": RecordedModel(reference="shapes", weights_sha256="a" * 64),
            "student": RecordedModel(reference="runs/pd_4", weights_sha256="b" * 64),
        },
        "data": {"reference": "shapes", "split": "val", "prompt_ids_sha256": "c" * 64},
        "recipe": "shapes-64",
        "solver": "ddim",
        "grid": [999, 749, 500, 250],
        "guidance_scale": 3.0,
        "reflection": "clamp",
        "nfe": 40.8,
        "seeds": [0],
        "n_asked": 256,
        "n_done": 256,
        "metrics": metrics,
        "wall_time_s": 12.0,
        "device": "cpu",
        "versions": {"torch": "2.11.0"},
        "commit": None,
        "created": "2026-01-02T03:04:05+00:00",
    }
    return Record.model_validate(fields | changes)


def p_teacher(rate: float, **changes: Any) -> Record:
    return record({"kind": "p_teacher", "p_teacher": rate}, **changes)


def system(name: str, steps: int, **changes: Any) -> Record:
    cell = changes.pop("cell", {"kind": "system", "name": name, "steps": steps})
    alone = {"model": RecordedModel(reference=name, weights_sha256=None)}
    return record(cell, **({"experiment": "systems", "systems": alone, "nfe": float(steps)} | changes))
