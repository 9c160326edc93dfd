"""Estimate what the paper's tables cost on a GPU: operations, counted, and hours, at an assumed share of a card's peak.

    python -m benchmarks.paper_cost [--bf16 312] [--fp32 19.5] [--share 0.4] [--batch 32] [--csv FILE]

Nothing is measured. torch counts the floating-point operations of one row through each network of Stable Diffusion 1.5
and through CLIP ViT-g/14; the protocols of ``protocols/paper`` say how many rows there are. The defaults are an A100's
peaks without sparsity (NVIDIA's data sheet), and a share of them that is a guess. Reading files, metrics other than
CLIP, and the start are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

from benchmarks.limits import operations
from benchmarks.printing import show
from benchmarks.random_models import SHAPES
from ddil_core.support.protocol import read_yaml
from ddil_core.support.resources import protocols
from ddil_eval.cli.options import quiet_libraries

TABLE1_IMAGES, SHIFT_PROMPTS = 30_000, 5_000
"""The counts of the recipes ``gigagan`` and ``coco2017-5k``."""
STRINGS, SEGMENTS, TEACHER_STEPS = 16, 15, 8
"""All strings of four transitions, the segments of each actor in their tree, and the teacher's steps in a segment."""
TRAINED = 3
"""A gradient costs two forward passes beside its own."""


def rows_of_networks() -> dict[str, float]:
    """Return the operations of one row through each network. Networks on the device "meta" compute nothing."""
    import open_clip
    from diffusers import AutoencoderKL, UNet2DConditionModel

    shape = SHAPES["SD 1.5"]
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**shape.unet), AutoencoderKL(**shape.vae)
        clip = open_clip.create_model("ViT-g-14", pretrained=None, device="meta")
        z, image = torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 512, 512)
        small, text = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, 768)
        t = torch.zeros(1)
    passes: dict[str, Callable[[], object]] = {
        "unet": lambda: unet(z, t, text),
        "decoder": lambda: vae.decode(z),
        "encoder": lambda: vae.encode(image),
        "clip": lambda: clip.encode_image(small),
    }
    return {name: float(operations(work)) for name, work in passes.items()}


def distillation(stages: list[dict[str, int]], batch: int, convert: int = 0) -> float:
    """Return the U-Net rows of progressive distillation without DDIL.

    A target of the first, guided stage takes four rows of the teacher, a later one two; a conversion takes one.
    """
    rows = convert * (1 + TRAINED)
    for number, stage in enumerate(stages):
        rows += stage["updates"] * ((2 if number or not convert else 4) + TRAINED)
    return float(rows * batch)


def sampling(system: dict[str, Any]) -> int:
    """Return the U-Net rows of an image: the teacher alone is guided by two rows a step."""
    return int(system["steps"]) * (2 if system["model"] == "sd15" else 1)


def costs(batch: int) -> pd.DataFrame:
    """Return a line for each part of the work, with its U-Net rows and its operations."""
    paper = protocols() / "paper"
    pd_, table1, table5 = (read_yaml(paper / name) for name in ("pd.yaml", "table1.yaml", "table5.yaml"))
    one = rows_of_networks()
    four, eight = pd_["stages"], pd_["stages"][:2]
    pool = 16_384 * one["encoder"]
    convert = pd_["convert"]["updates"]
    work: list[tuple[str, float, float]] = [
        ("distil 4 steps", distillation(four, batch, convert), pool),
        ("distil 8 steps", distillation(eight, batch, convert), pool),
        ("distil 2 steps, from 4", distillation([{"steps": 2, "updates": 15_000}], batch), pool),
    ]
    systems = table1["systems"]
    images = TABLE1_IMAGES * len(systems)
    rows = TABLE1_IMAGES * sum(map(sampling, systems))
    work.append(("table 1", float(rows), images * (one["decoder"] + one["clip"])))
    rows = SHIFT_PROMPTS * SEGMENTS * (2 * TEACHER_STEPS + 1)
    images = SHIFT_PROMPTS * STRINGS
    work.append(("tables 2 to 4, all strings", float(rows), images * (one["decoder"] + one["clip"])))
    ph2p, inverted, each = table5["inverters"]["ph2p"], table5["num_images"], table5["images_per_prompt"]
    rows = inverted * ph2p["rounds"] * ph2p["evaluations"] * TRAINED
    rows += inverted * ph2p["candidates"] * table5["choosing_steps"] * 2
    rows += inverted * each * sum(map(sampling, table5["systems"]))
    images = inverted * (ph2p["candidates"] + each * len(table5["systems"]))
    work.append(("table 5", float(rows), images * one["decoder"]))
    return pd.DataFrame(
        {"work": name, "unet_rows_million": rows / 1e6, "EFLOP": (rows * one["unet"] + rest) / 1e18}
        for name, rows, rest in work
    )


@click.command(help=__doc__)
@click.option("--bf16", default=312.0, show_default=True, help="The card's peak in bfloat16, TFLOP/s.")
@click.option("--fp32", default=19.5, show_default=True, help="The card's peak in float32 without TF32, TFLOP/s.")
@click.option("--share", default=0.4, show_default=True, help="The share of the peak that is reached.")
@click.option("--batch", default=32, show_default=True, help="The batch of the distillations.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(bf16: float, fp32: float, share: float, batch: int, csv_path: Path | None) -> None:
    quiet_libraries()
    frame = costs(batch)
    for name, peak in (("bf16", bf16), ("fp32", fp32)):
        frame[f"hours_{name}"] = frame["EFLOP"] * 1e18 / (peak * 1e12 * share) / 3600
    show(frame, csv_path)


if __name__ == "__main__":
    main()
