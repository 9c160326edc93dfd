"""What stock diffusers, which never reflects, makes of a student, beside our sampler with and without reflection.

    python -m benchmarks.stock_sampling RUN [--prompts 64] [--images 4] [--device cpu] [--csv FILE]

RUN is a run folder of ``ddil distill``. All samplers start from the same noise. Figures are relative to the encoded
data that the run was trained on (``ddil_core.distillation.config.WatchConfig``). In the shapes world the captions
drawn right are counted too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from benchmarks.printing import show
from ddil_core.data.datasets import open_data
from ddil_core.data.pool import encode_pool
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.parameterization import ReflectionMode, calibrate_reflection
from ddil_core.distillation.watch import measure_latents
from ddil_core.models.generate import sample_latents
from ddil_core.models.model import Model, load_model
from ddil_core.models.sampling import Bounds
from ddil_core.support.protocol import read_yaml
from ddil_eval.cli.options import quiet_libraries
from ddil_eval.metrics.shapes_world import attributes_right

BATCH = 64
SEED = 0


def stock(folder: Path, model: Model, texts: list[str], z: Tensor) -> Tensor:
    """Return latents of diffusers' own pipeline, at the student's own steps and guidance."""
    pipeline = DiffusionPipeline.from_pretrained(folder).to(model.device)
    pipeline.set_progress_bar_config(disable=True)
    sampling = model.sampling
    options: dict[str, Any] = {"num_inference_steps": sampling.steps}
    if sampling.timesteps is not None:
        options = {"timesteps": list(sampling.timesteps)}
    done = []
    for start in range(0, len(texts), BATCH):
        rows = slice(start, start + BATCH)
        generator = torch.Generator().manual_seed(SEED + start)
        out = pipeline(
            texts[rows],
            latents=z[rows].to(model.device),
            guidance_scale=sampling.guidance_scale,
            generator=generator,
            output_type="latent",
            **options,
        )
        done.append(out.images)
    return torch.cat(done)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--prompts", default=64, show_default=True)
@click.option("--images", default=4, show_default=True, help="Images of each prompt.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(run: Path, prompts: int, images: int, device: str, csv_path: Path | None) -> None:
    quiet_libraries()
    recorded = read_yaml(run / "run.yaml")
    model, data = load_model(str(run), device), open_data(recorded["data"])
    pool = encode_pool(model, data, recorded["config"]["pool"], run / "checkpoints" / "data.safetensors")
    quantile = recorded["config"]["reflection"]["quantile"]
    reflection = calibrate_reflection(pool.mean.float(), "clamp", quantile)
    bounds = model.sampling.bounds or Bounds.of(reflection, quantile)  # an older student has no bounds in its file
    chosen = data.prompts(prompts)
    samples = [Sample(prompt.id, image) for prompt in chosen for image in range(images)]
    texts = [prompt.text for prompt in chosen for _ in range(images)]

    def ours(mode: ReflectionMode) -> Tensor:
        sampling = replace(model.sampling, reflection=mode, bounds=bounds)
        parts = [slice(start, start + BATCH) for start in range(0, len(samples), BATCH)]
        return torch.cat([sample_latents(model, samples[p], texts[p], sampling, SEED) for p in parts])

    z = initial_noise(samples, model.latent_shape, SEED)
    drawn = {
        "ours": ours("none"),
        "ours, reflected": ours("clamp"),
        "stock diffusers": stock(run / "student", model, texts, z),
    }
    rows = []
    for name, latent in drawn.items():
        apart = float((latent - drawn["ours"]).norm() / drawn["ours"].norm())
        row = {"sampler": name, "from ours": apart, **measure_latents(latent.float().cpu(), pool, reflection, images)}
        if recorded["data"] == "shapes":
            row["drawn right"] = float(attributes_right(model.decode(latent), texts)[:, -1].mean())
        rows.append(row)
    show(pd.DataFrame(rows), csv_path, ".4f")


if __name__ == "__main__":
    main()
