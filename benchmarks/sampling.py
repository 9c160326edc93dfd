"""Images a second: ours against diffusers' own pipeline, with the same weights, scheduler, dtype, noise and batch.

    python -m benchmarks.sampling [--device cpu] [--rounds 3] [--csv FILE]

On a CPU: the shapes teacher, and a small U-Net with random weights, in float32. On a GPU: Stable Diffusion 1.5 and SDXL
in full size with random weights, in bfloat16, eager and compiled; diffusers compiled is its documented recipe (bfloat16,
channels-last, fused projections of queries, keys and values, compiled U-Net and decoder). First the latents of both are
compared. A time covers all of a batch: the condition, noise, steps and the decoder. ``ceiling`` is the share of the
floating-point operations a second that a matrix product reaches in the same dtype.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.alternation import compare, ratio, spread, synchronise
from benchmarks.claims import Claim
from benchmarks.printing import show
from benchmarks.random_models import SHAPES, conditions, random_model, random_pipeline
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.models.generate import sample_images, sample_latents
from ddil_core.models.model import Model, load_model
from ddil_core.models.sampling import Sampling
from ddil_core.support.compute import FP32, Compute
from ddil_eval.cli.options import quiet_libraries

STEPS = 4
SEED = 0
APART = {"fp32": 1e-4, "bf16": 5e-2}
"""The largest relative distance between the latents of both, by dtype."""
BARS = {"eager": 1.5, "compiled": 1.0}
"""On a GPU: our images a second over diffusers', at least. Ours is compiled in both."""


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        name: "shapes", or a size of ``random_models``.
        batch: Images of the batch.
        compute: How both compute.
    """

    name: str
    batch: int
    compute: Compute


CPU = (Case("shapes", 64, FP32), Case("small SD", 8, FP32))
GPU = (Case("SD 1.5", 16, Compute("bf16")), Case("SDXL", 8, Compute("bf16")))


def load(case: Case, device: str, compile: bool = False) -> Model:
    """Load our model of a case, eager or compiled."""
    compute = case.compute.override(compile=compile)
    return (
        load_model("shapes", device, compute=compute)
        if case.name == "shapes"
        else random_model(case.name, device, compute)
    )


def peer(case: Case, device: str, recipe: bool = False) -> Any:
    """Return diffusers' pipeline of a case, eager or by its documented recipe."""
    if case.name == "shapes":
        pipeline = load_model("shapes", device, compute=case.compute).pipeline
        pipeline.set_progress_bar_config(disable=True)
    else:
        pipeline = random_pipeline(SHAPES[case.name], device, case.compute.torch_dtype)
    if recipe:
        pipeline.fuse_qkv_projections()
        for net in (pipeline.unet, pipeline.vae):
            net.to(memory_format=torch.channels_last)
        pipeline.unet = torch.compile(pipeline.unet, mode="reduce-overhead", fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="reduce-overhead", fullgraph=True)
    return pipeline


def draw(pipeline: Any, case: Case, texts: list[str], noise: Tensor, output: str) -> Any:
    """Draw a batch with diffusers' pipeline, without guidance, as a few-step student is drawn."""
    inputs: dict[str, Any] = {"prompt": texts}
    if case.name != "shapes":
        own = {name: rows.to(noise.device, noise.dtype) for name, rows in conditions(SHAPES[case.name], texts).items()}
        inputs = {"prompt_embeds": own["encoder_hidden_states"]}
        if "text_embeds" in own:
            inputs["pooled_prompt_embeds"] = own["text_embeds"]
    images: Any = pipeline(
        **inputs, latents=noise, num_inference_steps=STEPS, guidance_scale=1.0, output_type=output
    ).images
    return images


def measure(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    """Compare the latents of both, then time them."""
    samples = [Sample(f"a small red circle, number {row}") for row in range(case.batch)]
    texts = [sample.prompt_id for sample in samples]
    models = {"ours": load(case, device)} | ({"ours, compiled": load(case, device, True)} if device == "cuda" else {})
    peers = {"diffusers": peer(case, device)} | (
        {"diffusers, recipe": peer(case, device, True)} if device == "cuda" else {}
    )
    scheduler = peers["diffusers"].scheduler
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    sampling = Sampling.from_scheduler(config, 1.0)
    sampling = Sampling(**(vars(sampling) | {"steps": STEPS}))
    model = models["ours"]
    noise = initial_noise(samples, model.latent_shape, SEED).to(device, case.compute.torch_dtype)
    theirs = draw(peers["diffusers"], case, texts, noise, "latent").float()
    apart = float((sample_latents(model, samples, texts, sampling, SEED) - theirs).norm() / theirs.norm())
    if not apart <= APART[case.compute.dtype]:  # NaN is no agreement
        raise click.ClickException(f"{case.name}: the latents are {apart:.2g} apart, so both do not compute the same")

    def ours(model: Model) -> Callable[[], object]:
        return lambda: sample_images(model, samples, texts, sampling, SEED, case.batch)

    def diffusers(pipeline: Any) -> Callable[[], object]:
        return lambda: draw(pipeline, case, texts, noise, "np")

    work = {name: ours(model) for name, model in models.items()}
    work |= {name: diffusers(pipeline) for name, pipeline in peers.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work["ours"]()
    times = compare(work, rounds=rounds)
    ceiling = matmul_ceiling(device, case.compute.torch_dtype)
    return [
        {
            "model": case.name,
            "batch": case.batch,
            "steps": STEPS,
            "dtype": case.compute.dtype,
            "sampler": name,
            "latents_apart": apart,
            "median_s": statistics.median(seconds),
            "spread": spread(seconds),
            "images_per_s": case.batch / statistics.median(seconds),
            "ratio": ratio(seconds, times["diffusers"]),
            "ceiling": counter.get_total_flops() / statistics.median(seconds) / ceiling,
        }
        for name, seconds in times.items()
    ]


def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a large matrix product, the best of five."""
    side = 8192 if device == "cuda" else 1536
    a = torch.randn(side, side, device=device, dtype=dtype)
    now = time.perf_counter if device == "cuda" else time.process_time
    best = float("inf")
    for _ in range(6):
        synchronise()
        started = now()
        a @ a
        synchronise()
        best = min(best, now() - started)
    return 2 * side**3 / best


def summary(frame: pd.DataFrame) -> list[Claim]:
    """Return our images a second over those of diffusers, eager and by its recipe."""
    claims = []
    for name, rows in frame.groupby("model", sort=False):
        speed = dict(zip(rows["sampler"], rows["images_per_s"], strict=True))
        ours = speed.get("ours, compiled", speed["ours"])
        bar = BARS["eager"] if "ours, compiled" in speed else 1.0
        claims.append(Claim(f"images a second, {name}", ours, speed["diffusers"], bar, at_least=True))
        if "diffusers, recipe" in speed:
            title = f"images a second, {name}, diffusers by its recipe"
            claims.append(Claim(title, ours, speed["diffusers, recipe"], BARS["compiled"], at_least=True))
    return claims


@click.command()
@click.option("--device", default=None, help="cpu or cuda. The default is cuda if the machine has a GPU.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(device: str | None, rounds: int, csv_path: Path | None) -> None:
    """Time our sampler and diffusers' own pipeline in alternation."""
    quiet_libraries()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for case in (GPU if device == "cuda" else CPU) for row in measure(case, device, rounds)]
    show(pd.DataFrame(rows), csv_path, ".3g", "sampling")


if __name__ == "__main__":
    main()
