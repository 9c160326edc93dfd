"""What works with every system, on random weights: loading, sampling as diffusers does, distilling, and analysing.

    python -m benchmarks.systems [--system NAME …] [--csv FILE]     tiny networks, in seconds on a CPU

The tiny pipelines and the diffusers side come from the checkout's tests, which need pytest. The tolerances are
‖ours − diffusers'‖₂/‖diffusers'‖₂ of the last latents in float32, and the mean absolute difference of the images in
levels of 255; rounding alone makes 0.25. `distils` names the methods that made a student in a few updates with DDIL,
which was loaded again; LoRA is that of LCM. Where a system cannot be distilled or analysed, the reason stands below the
table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch

from benchmarks.printing import show
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.rollout import all_strings, rollout_latents
from ddil_core.distillation.distill import distill
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.model import Model, assemble, load_model
from ddil_core.models.sampling import SYSTEM_FILE
from ddil_core.models.system_specs import Files, SystemSpec, load_systems
from ddil_core.models.turns import take_turns
from ddil_core.support.errors import DdilError
from ddil_core.support.size import WantedSize
from ddil_eval.cli.options import quiet_libraries
from ddil_eval.experiments.covariate_shift import CovariateShiftConfig
from tests.reference import PROMPTS, random_files, reference

SAMPLES = [Sample(prompt) for prompt in PROMPTS]
SMALL: dict[str, Any] = {
    "batch_size": 4,
    "pool": 8,
    "ddil": {"collect_every": 2, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]},
}
DISTIL: dict[str, dict[str, Any]] = {
    "pd": {"method": "pd", "stages": [{"steps": 4, "updates": 2}], "convert": {"updates": 2}},
    "lcm": {"method": "lcm", "updates": 2, "teacher_steps": 20},
    "tcd": {"method": "tcd", "updates": 2, "teacher_steps": 20},
    "dmd2": {"method": "dmd2", "updates": 2, "critic_updates": 1, "gan": {}},
    "LoRA": {"method": "lcm", "updates": 2, "teacher_steps": 20, "w_embedding": None, "lora": {"rank": 4}},
}
"""A short distillation by each method, to 4 steps."""
ANALYSIS = CovariateShiftConfig(teacher_steps=8)
SIZE = WantedSize(height=64, width=64)


def generators() -> list[torch.Generator]:
    return [sample.generator(0, "solver") for sample in SAMPLES]


REFUSALS: list[str] = []


def outcome(name: str, folder: Path, work: Callable[[], str]) -> str:
    """Return the result of ``work``. A refusal goes below the table."""
    try:
        return work()
    except DdilError as error:
        refusal = f"{name}: {error}".replace(str(folder), name)
        REFUSALS.extend({refusal} - {*REFUSALS})  # methods may refuse with the same sentence
        return "refused"


def equality(model: Model, theirs: tuple[torch.Tensor, Any]) -> tuple[float, float]:
    """Return the relative norm of the latents' difference, and the mean difference of the images in levels."""
    ours = sample_latents(model, SAMPLES, PROMPTS, resolve_sampling(model), 0)
    distance = float((ours.double() - theirs[0].double()).norm() / theirs[0].double().norm())
    return distance, float(np.abs(model.decode(ours) - 255 * theirs[1]).mean())


def distils(name: str, folder: Path, out: Path) -> str:
    """Distil by each method. Return those that give a student of 4 steps."""

    def by(method: str) -> str:
        config = SMALL | DISTIL[method]
        if config["method"] in ("lcm", "tcd") and (folder / "transformer").is_dir():
            config["w_embedding"] = None
        distill(str(folder), "shapes", config, out / method, device="cpu")
        assert load_model(str(out / method)).sampling.steps == 4
        return method

    found = [outcome(name, folder, partial(by, method)) for method in DISTIL]
    return ", ".join(method for method in found if method in DISTIL) or "refused"


def analyses(teacher: Model, student: Model) -> str:
    """Roll out all sixteen strings of the two."""
    actors, grid = take_turns(teacher, student, ANALYSIS.teacher_steps, ANALYSIS.guidance_scale)
    z = initial_noise(SAMPLES, teacher.latent_shape, 0)
    strings = [set(all_strings(len(grid)))] * len(PROMPTS)
    leaves = rollout_latents(actors, z, teacher.encode(PROMPTS), strings, batch_size=8)
    assert bool(torch.isfinite(leaves.latents).all())
    return f"yes, {len(leaves.latents) // len(PROMPTS)} strings"


def row(name: str, system: SystemSpec, files: Files, folder: Path) -> dict[str, Any]:
    model = assemble(name, files, **SIZE)
    z = initial_noise(SAMPLES, model.latent_shape, 0)
    apart, levels = equality(model, reference(name, files, z, generators))
    other = assemble(name, random_files(system, folder / "other", seed=5), **SIZE)
    return {
        "system": name,
        "layout": system.layout.removesuffix("Pipeline"),
        "sampled": f"{model.sampling.solver}, {model.sampling.steps}",
        "loads": "yes",
        "latents": apart,
        "levels": levels,
        "distils": distils(name, whole(model, folder), folder / "run"),
        "analyses": outcome(name, folder, lambda: analyses(model, other)),
    }


def whole(model: Model, folder: Path) -> Path:
    """Write the system as one pipeline folder with its ``ddil.json``."""
    model.pipeline.save_pretrained(folder / "whole", safe_serialization=True)
    settings = vars(model.sampling) | {"prediction": model.denoiser.prediction}
    if model.asked_size:  # FLUX's network names no size
        settings |= dict(zip(("height", "width"), model.image_size, strict=True))
    (folder / "whole" / SYSTEM_FILE).write_text(json.dumps(settings))
    return folder / "whole"


@click.command()
@click.option("--system", "names", multiple=True, help="A row of systems.yaml; all rows without this option.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(names: tuple[str, ...], csv_path: Path | None) -> None:
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            row(name, system, random_files(system, Path(scratch) / name), Path(scratch) / name)
            for name, system in load_systems().items()
            if not names or name in names
        ]
    show(pd.DataFrame(rows), csv_path, ".2g")
    for refusal in REFUSALS:
        click.echo(refusal)


if __name__ == "__main__":
    main()
