"""What stock diffusers, which reflects nothing, makes of a student, beside what our sampler does with and without reflection.

    python benchmarks/stock_sampling.py RUN [--prompts 64] [--images 4] [--device cpu] [--csv FILE]

RUN is a run folder of ``ddil distill``. All samplers start from the same noise. Figures are against the encoded data that the run
was trained on (``ddil_core.distill.config.WatchConfig``); in the shapes world the captions drawn right are counted too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ddil_core.data.dataset import open_data
from ddil_core.data.pool import encode_pool
from ddil_core.distill.watch import look
from ddil_core.models.model import Model, load_model
from ddil_core.noise import Sample, initial_noise
from ddil_core.parameterization import calibrate_reflection
from ddil_core.protocol import read_yaml
from ddil_core.sample import latents
from ddil_eval.cli.options import quiet_libraries
from ddil_eval.metrics.drawn_right import attribute_shares

BATCH = 64
SEED = 0


def stock(folder: Path, model: Model, texts: list[str], z: Tensor) -> Tensor:
    """Latents of diffusers' own pipeline, at the student's own steps and guidance."""
    pipeline = DiffusionPipeline.from_pretrained(folder).to(model.device)
    pipeline.set_progress_bar_config(disable=True)
    sampling = model.sampling
    told: dict[str, Any] = {"num_inference_steps": sampling.steps}
    if sampling.timesteps is not None:
        told = {"timesteps": list(sampling.timesteps)}
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
            **told,
        )
        done.append(out.images)
    return torch.cat(done)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--prompts", default=64, show_default=True)
@click.option("--images", default=4, show_default=True, help="Pictures of each prompt.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(run: Path, prompts: int, images: int, device: str, csv_path: Path | None) -> None:
    quiet_libraries()
    told = read_yaml(run / "run.yaml")
    model, data = load_model(str(run), device), open_data(told["data"])
    pool = encode_pool(model, data, told["config"]["pool"], run / "checkpoints" / "data.safetensors")
    reflection = calibrate_reflection(pool.mean.float(), "clamp", told["config"]["reflection"]["quantile"]).to(device)
    chosen = data.prompts(prompts)
    samples = [Sample(prompt.id, image) for prompt in chosen for image in range(images)]
    texts = [prompt.text for prompt in chosen for _ in range(images)]

    def ours(*reflected: Any) -> Tensor:
        parts = [slice(start, start + BATCH) for start in range(0, len(samples), BATCH)]
        return torch.cat([latents(model, samples[p], texts[p], model.sampling, SEED, *reflected) for p in parts])

    z = initial_noise(samples, model.latent_shape, SEED)
    drawn = {
        "ours": ours(),
        "ours, reflected": ours(reflection),
        "stock diffusers": stock(run / "student", model, texts, z),
    }
    rows = []
    for name, latent in drawn.items():
        apart = float((latent - drawn["ours"]).norm() / drawn["ours"].norm())
        row = {"sampler": name, "from ours": apart, **look(latent.float().cpu(), pool, reflection, images)}
        if told["data"] == "shapes":
            row["drawn right"] = attribute_shares(model.decode(latent), texts)["exact"]
        rows.append(row)
    show(pd.DataFrame(rows), csv_path)


def show(frame: pd.DataFrame, csv_path: Path | None) -> None:
    table = Table(*frame.columns)
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row))
    Console(width=140).print(table)
    if csv_path is not None:
        frame.to_csv(csv_path, index=False)


if __name__ == "__main__":
    main()
