"""Systems side by side on the same prompts and seeds, with their paired differences (Table 1's form)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ddil_core.data import Prompt, open_data
from ddil_core.models import Model, load_model
from ddil_core.noise import Sample, initial_noise
from ddil_core.progress import progress
from ddil_core.protocol import Strict, content_hash
from ddil_core.rollout import STUDENT, Actor, rollout
from ddil_core.schedule import grid, transitions
from ddil_core.solvers import SOLVERS
from ddil_eval.experiments.records import provenance, save_cells
from ddil_eval.measure import Cells, Extractors, Features, batches, concatenate, kept
from ddil_eval.store import Record, digest

EXPERIMENT = "compare"


class SystemConfig(Strict):
    """A row: its name in the table, the model's reference, its number of DDIM steps, its guidance (None: the model's own)."""

    name: str
    model: str
    steps: int = Field(ge=1)
    guidance_scale: float | None = None


class SystemsConfig(Strict):
    """A comparison as data. ``differences`` are pairs of names, the first less the second."""

    experiment: Literal["systems"] = "systems"
    data: str = "shapes"
    systems: tuple[SystemConfig, ...]
    differences: tuple[tuple[str, str], ...] = ()
    num_prompts: int = Field(default=1000, ge=4)
    reference_pictures: int = Field(default=2000, ge=2)
    metrics: tuple[str, ...] = ("fd_efflite0", "clip_score_shapes", "drawn_right")
    batch_size: int = Field(default=64, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _names_fit(self) -> SystemsConfig:
        names = [system.name for system in self.systems]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two systems are named {twice[0]!r}")
        unknown = [name for pair in self.differences for name in pair if name not in names]
        if unknown:
            raise ValueError(f"the differences name {unknown[0]!r}, which is none of the systems {', '.join(names)}")
        return self


def compare(config: SystemsConfig, out: Path, device: str = "cpu") -> list[Record]:
    """Measure every system and every difference, and save their records below ``out``.

    Interrupted, it goes on at the next batch.
    """
    started = time.monotonic()
    extractors = Extractors(config.metrics, device)
    models = {system.name: load_model(system.model, device) for system in config.systems}
    data = open_data(config.data)
    prompts = data.prompts(config.num_prompts)
    weights = {name: model.weights_sha256() for name, model in models.items()}
    work = out / "partial" / content_hash({"config": config.model_dump(mode="json"), "weights": weights})[:16]
    features = concatenate([draw(models[s.name], s, prompts, extractors, config, work) for s in config.systems])
    count = len(prompts)
    rows = {s.name: np.arange(count) + index * count for index, s in enumerate(config.systems)}
    reference = extractors.reference(data, config.reference_pictures)
    cells = Cells(features, rows, reference, config.seed, config.metrics)
    single = cells.single()
    pairs = {f"{a} − {b}": (a, b) for a, b in config.differences}
    estimates = cells.estimates(single | {name: single[a] - single[b] for name, (a, b) in pairs.items()})
    by_name = {system.name: system for system in config.systems}
    shared: dict[str, Any] = {
        "experiment": EXPERIMENT,
        "config": config,
        "data": {
            "reference": data.reference,
            "split": "validation",
            "prompt_ids_sha256": digest([p.id for p in prompts]),
        },
        "solver": "ddim",
        "reflection": "none",
        "seeds": [config.seed],
        "n_asked": config.num_prompts,
        "n_done": count,
        "device": device,
        "wall_time_s": time.monotonic() - started,
    }
    records = []
    for name, members in ({system.name: (system.name,) for system in config.systems} | pairs).items():
        first = by_name[members[0]]
        model = models[first.name]
        scale = model.sampling.guidance_scale if first.guidance_scale is None else first.guidance_scale
        common = provenance(
            systems={member: models[member] for member in members},
            recipe=f"{data.reference}-{model.latent_shape[1] * 8}px",
            grid=grid(first.steps),
            guidance_scale=scale,
            **shared,
        )
        cell: dict[str, Any] = {"kind": "difference", "name": name}
        if name in by_name:
            cell = {"kind": "system", "name": name, "steps": first.steps}
        nfe = {name: float(first.steps * (1 if scale == 1 else 2))} if name in by_name else {}
        records += save_cells(common, {name: cell}, estimates, nfe, out)
    shutil.rmtree(work, ignore_errors=True)
    return records


def draw(
    model: Model,
    system: SystemConfig,
    prompts: Sequence[Prompt],
    extractors: Extractors,
    config: SystemsConfig,
    work: Path,
) -> Features:
    """Features of one picture for each prompt, in the prompts' order; batches that are done lie in ``work``."""
    actor = Actor(model.guided(system.guidance_scale), [transitions(grid(system.steps))], SOLVERS["ddim"])

    def measure(part: slice) -> Features:
        texts = [prompt.text for prompt in prompts[part]]
        z = initial_noise([Sample(prompt.id) for prompt in prompts[part]], model.latent_shape, config.seed)
        strings = [[STUDENT]] * len(texts)
        leaves = rollout(
            {STUDENT: actor}, z.to(model.device), model.encode(texts), strings, batch_size=config.batch_size
        )
        return extractors(model.decode(leaves.latents), texts)

    place = config.systems.index(system)
    parts = []
    with progress(system.name, total=len(prompts)) as advance:
        for part in batches(len(prompts), config.batch_size):
            parts.append(kept(work / f"{place}-{part.start}.npz", partial(measure, part)))
            advance(part.stop - part.start)
    return concatenate(parts)
