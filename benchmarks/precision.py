"""What the number format, TF32 and compilation change: latents, and metrics in the shapes world.

    python -m benchmarks.precision [--prompts 200] [--model NAME …] [--format NAME …] [--device cpu] [--csv FILE]

Latents: the relative distance from float32 (eager, without TF32), ‖z − z₃₂‖ / ‖z₃₂‖, after 4 and after 32 steps, of the
shapes teacher with its guidance and of Stable Diffusion's layout with random weights (small on a CPU; 1.5 in full size
on a GPU). Metrics: `ddil eval systems` of the shapes teacher at 4 steps in each format on the same prompts, with the
paired difference from float32 and its 95 % interval. A CPU computes float16 slowly, so its metrics are left out there
unless ``--format fp16`` names it. Compilation is measured on a GPU, or with ``--compile``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch import Tensor

import ddil_eval
from benchmarks.printing import show
from benchmarks.random_models import SHAPES, random_model
from ddil_core.diffusion.noise import Sample
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.model import Model, load_model
from ddil_core.support.compute import FP32, Compute
from ddil_eval.cli.options import quiet_libraries
from ddil_eval.experiments.systems import SystemsConfig

METRICS = ("fd_efflite0", "drawn_right")
LATENT_STEPS = (4, 32)
METRIC_STEPS = 4
PROMPTS = [
    f"a {size} {colour} {shape}" for size in ("small", "large") for colour in ("red",) for shape in ("circle", "star")
]


def formats(device: str, compile: bool) -> dict[str, Compute]:
    """Return what can be compared on a device, float32 first."""
    found = {"fp32": FP32, "bf16": Compute("bf16"), "fp16": Compute("fp16")}
    if device == "cuda":
        found["tf32"] = Compute(tf32=True)
    if compile:
        found["fp32, compiled"] = Compute(compile=True)
    return found


def load(name: str, device: str, compute: Compute) -> Model:
    return load_model("shapes", device, compute=compute) if name == "shapes" else random_model(name, device, compute)


def latents(model: Model, steps: int, prompts: list[str]) -> Tensor:
    """Draw a latent of each prompt."""
    samples = [Sample(prompt) for prompt in prompts]
    sampling = resolve_sampling(model, steps=steps)
    return sample_latents(model, samples, prompts, sampling, 0, len(samples)).double().cpu()


def distances(name: str, device: str, chosen: dict[str, Compute]) -> dict[str, dict[str, float]]:
    """Return ‖z − z₃₂‖ / ‖z₃₂‖ of a model by format and number of steps."""
    drawn: dict[str, dict[int, Tensor]] = {}
    prompts = PROMPTS if name == "shapes" or device == "cuda" else PROMPTS[:1]  # larger networks take long on a CPU
    for label, compute in chosen.items():
        model = load(name, device, compute)
        drawn[label] = {steps: latents(model, steps, prompts) for steps in LATENT_STEPS}
    plain = drawn["fp32"]
    return {
        label: {f"{name}, {n} steps": float((z[n] - plain[n]).norm() / plain[n].norm()) for n in LATENT_STEPS}
        for label, z in drawn.items()
    }


def metrics(
    prompts: int, device: str, chosen: dict[str, Compute], reference_images: int | None = None
) -> dict[str, dict[str, Any]]:
    """Return each metric of the shapes teacher by format, with its paired difference from float32."""
    rows = [
        {"name": name, "model": "shapes", "steps": METRIC_STEPS, **compute.changed()}
        for name, compute in chosen.items()
    ]
    config: dict[str, Any] = {
        "systems": rows,
        "differences": [(name, "fp32") for name in chosen if name != "fp32"],
        "num_prompts": prompts,
        "reference_images": reference_images or max(2 * prompts, 100),
        "metrics": METRICS,
    }
    with tempfile.TemporaryDirectory() as folder:
        records = ddil_eval.compare(out=folder, config=SystemsConfig.model_validate(config), device=device)
    found: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for record in records:
        for metric in METRICS:
            estimate = record.metrics[metric].estimate
            if record.kind == "system":
                found[str(record.cell["name"])][metric] = estimate.value
            elif record.kind == "difference":
                name = str(record.cell["of"][0])  # type: ignore[index]
                interval = f"{estimate.value:+.3g} [{estimate.low:+.2g}, {estimate.high:+.2g}]"
                found[name][f"{metric} − fp32"] = interval
    return found


@click.command()
@click.option("--prompts", default=200, show_default=True, help="Prompts of the metrics. 0 leaves the metrics out.")
@click.option(
    "--model",
    "models",
    type=click.Choice(["shapes", *SHAPES]),
    multiple=True,
    help="A model whose latents are compared. The default is shapes and what the device draws in seconds.",
)
@click.option(
    "--format",
    "names",
    type=click.Choice(["bf16", "fp16", "tf32", "fp32, compiled"]),
    multiple=True,
    help="A format to compare with float32. The default is all that the device has.",
)
@click.option("--device", default=None, help="cpu or cuda. The default is cuda if the machine has a GPU.")
@click.option("--compile/--no-compile", default=None, help="Measure compiled networks. The default is yes on a GPU.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(
    prompts: int, models: Sequence[str], names: Sequence[str], device: str | None, compile: bool | None,
    csv_path: Path | None,
) -> None:  # fmt: skip
    """Compare number formats in latents and in metrics."""
    quiet_libraries()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    offered = formats(device, device == "cuda" if compile is None else compile)
    if absent := [name for name in names if name not in offered]:
        raise click.UsageError(f"{', '.join(absent)}: not offered here; the formats are {', '.join(offered)}")
    chosen = {name: c for name, c in offered.items() if not names or name in ("fp32", *names)}
    apart = [
        distances(name, device, chosen) for name in models or ("shapes", "SD 1.5" if device == "cuda" else "small SD")
    ]
    measured = {name: c for name, c in chosen.items() if device == "cuda" or name in names or name != "fp16"}
    found = metrics(prompts, device, measured) if prompts else {}
    rows = [
        {"format": name, **{key: value for part in apart for key, value in part[name].items()}, **found.get(name, {})}
        for name in chosen
    ]
    show(pd.DataFrame(rows).astype(object).fillna(""), csv_path, ".3g", "precision")


if __name__ == "__main__":
    main()
