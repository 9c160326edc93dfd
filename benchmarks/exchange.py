"""Count the bytes that each update of a distillation exchanges, and from how many GPUs on an update is bound by them.

    python -m benchmarks.exchange [--batch 256] [--peak 312] [--share 0.4] [--link 300] [--network 25] [--csv FILE]

Nothing is measured. P is the number of parameters of the U-Net, R the number of GPUs, and B the whole batch. With
DistributedDataParallel a ring joins the gradients, and each GPU sends 2 (R − 1)/R · 4 P bytes (2 P each way in
bfloat16). With ``shard`` it sends (R − 1)/R times the gathered weights (forward and backward, 4 P or 2 P each) and the
gradients in float32 (4 P); the teacher's weights are gathered once more. DMD2 exchanges these for its generator once
and for its critic ``critic_updates`` times.

A student's row takes the operations of three rows, with its gradient, and a guided teacher's row those of two. The
whole batch takes their time divided by R. An update is bound by the exchange from the number of GPUs on where both take
as long.

The defaults are an A100's peak without sparsity (312 TFLOP/s) and its NVLink in one direction (300 GB/s), by NVIDIA's
data sheet, a network of 200 Gbit/s for each machine (25 GB/s), which a ring crosses once, and a guessed share of the
peak.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

from benchmarks.limits import operations
from benchmarks.printing import show
from benchmarks.random_models import SHAPES, conditions
from ddil_core.models.known_sizes import SD1, SDXL
from ddil_eval.cli.options import quiet_libraries

MODELS = {"SD 1.5": SD1, "SDXL": SDXL}
TRAINED, GUIDED = 3, 2
"""The rows' operations of a trained row, with its gradient, and of a guided teacher's row."""
CRITIC_UPDATES = 10
"""The critic's updates for each of the generator, as in ``protocols/paper/dmd2.yaml``."""


def row_operations(name: str) -> float:
    """Return the operations of one row through a U-Net. Networks on the device "meta" compute nothing."""
    from diffusers import UNet2DConditionModel

    shape = SHAPES[name]
    told = conditions(shape, ["a prompt"])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape.unet)
        z, t = torch.zeros(1, 4, unet.config.sample_size, unet.config.sample_size), torch.zeros(1)
        added = {key: rows.to("meta") for key, rows in told.items() if key != "encoder_hidden_states"}
        text = told["encoder_hidden_states"].to("meta")
        more: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
        return float(operations(lambda: unet(z, t, text, **more)))


def bytes_of(parameters: int, width: int, shard: bool) -> float:
    """Return the bytes that a GPU sends for one update of one network, for many GPUs ((R − 1)/R is near 1).

    Args:
        parameters: The number of parameters.
        width: The bytes of a weight where it computes: 4, or 2 in bfloat16.
        shard: Whether the processes divide the network.
    """
    return (2 * width + 4) * parameters if shard else 2 * width * parameters


def rows(batch: int, peak: float, share: float, link: float, network: float) -> pd.DataFrame:
    """Return a line for each model, method, dtype of the student, and way to divide."""
    found = []
    for name, known in MODELS.items():
        parameters, row = known.parameters["unet"], row_operations(name)
        for method, students, teachers in (("PD, LCM", 1, 1), ("DMD2", 1 + CRITIC_UPDATES, 1)):
            for width in (4, 2):
                for shard in (False, True):
                    sent = students * bytes_of(parameters, width, shard) + (
                        teachers * width * parameters if shard else 0
                    )
                    work = batch * row * (students * TRAINED + teachers * GUIDED)
                    seconds = work / (peak * 1e12 * share)
                    line: dict[str, Any] = {
                        "model": name,
                        "method": method,
                        "student": "bfloat16" if width == 2 else "float32",
                        "networks": "shard" if shard else "whole",
                        "GB": sent / 1e9,
                        "compute_s_one_gpu": seconds,
                    }
                    for where, speed in (("one_machine", link), ("machines", network)):
                        line[f"bound_from_{where}"] = max(1, round(seconds / (sent / (speed * 1e9))))
                    found.append(line)
    return pd.DataFrame(found)


@click.command(help=__doc__)
@click.option("--batch", default=256, show_default=True, help="The whole batch.")
@click.option("--peak", default=312.0, show_default=True, help="The card's peak in bfloat16, TFLOP/s.")
@click.option("--share", default=0.4, show_default=True, help="The share of the peak that is reached.")
@click.option("--link", default=300.0, show_default=True, help="What a GPU sends inside a machine, GB/s.")
@click.option("--network", default=25.0, show_default=True, help="What a machine sends to the next, GB/s.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(batch: int, peak: float, share: float, link: float, network: float, csv_path: Path | None) -> None:
    quiet_libraries()
    show(rows(batch, peak, share, link, network), csv_path)


if __name__ == "__main__":
    main()
