"""How near the networks come to the machine's limit: their operations a second beside those of a product of matrices.

    python -m benchmarks.limits [--batch 32] [--rounds 3] [--csv FILE]

On a CPU everything runs on one thread, in CPU seconds, which other work on the machine disturbs less.

torch counts the floating-point operations of a forward pass; a multiplication with its addition is two. "ceiling" is
what `benchmarks.ceilings` finds for a product of large matrices in the same number format, in the same run. "least_ms"
is the time of one row at that ceiling, and "weights_ms" the time in which the memory yields the weights once: a pass
cannot take less than the larger of the two. The shapes networks run on any machine. The U-Nets of Stable Diffusion 1.5
and SDXL, with random weights in bfloat16, run on a GPU; elsewhere their operations are counted alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.alternation import Clock, compare
from benchmarks.ceilings import copy_rate, product_rate
from benchmarks.claims import Claim
from benchmarks.printing import show
from ddil_core.models.model import load_model
from ddil_eval.cli.options import quiet_libraries

Pass = tuple[str, nn.Module, int, str, Callable[[], object]]
"""The name, the network, the rows at once, the number format, and a forward pass."""


def shapes_passes(device: str, batch: int) -> Iterator[Pass]:
    """Yield the networks of the shapes world, through which every image goes."""
    model = load_model("shapes", device)
    z = torch.randn(batch, *model.latent_shape, device=device)
    t = torch.full((batch,), 500, device=device)
    text = model.encode(["a small red circle on a grey background"]).expand(batch).tensors["encoder_hidden_states"]
    net, vae = model.denoiser.net, model.pipeline.vae
    pixels = torch.randn(batch, 3, 64, 64, device=device)
    yield "shapes, U-Net", net, batch, "float32", lambda: net(z, t, text)
    yield "shapes, decoder", vae.decoder, batch, "float32", lambda: vae.decode(z).sample
    yield "shapes, encoder", vae.encoder, batch, "float32", lambda: vae.encode(pixels)


def full_size_passes(device: str, batch: int) -> Iterator[Pass]:
    """Yield U-Nets of full size with random weights. On the device "meta" they hold no numbers and compute none."""
    from diffusers import UNet2DConditionModel

    from benchmarks.random_models import SHAPES

    for name in ("SD 1.5", "SDXL"):
        config, tensors = SHAPES[name].unet, SHAPES[name].conditions
        with torch.device(device):
            net = UNet2DConditionModel(**config).to(torch.bfloat16).eval().requires_grad_(False)
            z = torch.zeros(batch, 4, config["sample_size"], config["sample_size"], dtype=torch.bfloat16)
            condition = {key: torch.zeros(batch, *shape, dtype=torch.bfloat16) for key, shape in tensors.items()}
            t = torch.full((batch,), 500)
        text = condition.pop("encoder_hidden_states")
        yield (
            f"{name}, U-Net", net, batch, "bfloat16",
            lambda net=net, z=z, t=t, text=text, added=condition: net(z, t, text, added_cond_kwargs=added or None),
        )  # fmt: skip


@torch.no_grad()
def operations(work: Callable[[], object]) -> int:
    """Return the floating-point operations of a pass."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@torch.no_grad()
def measure(device: str, batch: int, rounds: int) -> pd.DataFrame:
    """Return a row for each network."""
    passes = [*shapes_passes(device, batch), *full_size_passes("cuda" if device == "cuda" else "meta", 4)]
    formats = {number for _, net, _, number, _ in passes if not is_counted_alone(net)}
    clock: Clock = "wall" if device == "cuda" else "cpu"
    ceilings = {number: product_rate(number, device, clock=clock) for number in formats}
    bandwidth = copy_rate(device, clock=clock)
    rows = []
    for name, net, count, number, work in passes:
        flop = operations(work) / count
        nbytes = sum(parameter.nbytes for parameter in net.parameters())
        row = {"network": name, "format": number, "rows": count, "GFLOP": flop / 1e9, "weights_MiB": nbytes / 2**20}
        if not is_counted_alone(net):
            seconds = statistics.median(compare({name: work}, rounds=rounds, clock=clock)[name]) / count
            rate = flop / seconds
            row |= {
                "ms": seconds * 1e3,
                "least_ms": flop / ceilings[number] * 1e3,
                "weights_ms": nbytes / bandwidth / count * 1e3,
                "GFLOP_per_s": rate / 1e9,
                "ceiling": ceilings[number] / 1e9,
                "share": rate / ceilings[number],
            }
        rows.append(row)
    return pd.DataFrame(rows)


def is_counted_alone(net: nn.Module) -> bool:
    """Whether a network holds no numbers, so that its operations are counted and not computed."""
    return next(net.parameters()).is_meta


@click.command(help=__doc__)
@click.option("--batch", default=32, show_default=True, help="Rows at once of the shapes networks.")
@click.option("--rounds", default=3, show_default=True, help="Passes that are counted, after a warm-up.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(batch: int, rounds: int, csv_path: Path | None) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    show(measure("cuda" if torch.cuda.is_available() else "cpu", batch, rounds), csv_path)


def summary(frame: pd.DataFrame) -> list[Claim]:
    """Return the share of the ceiling that each network reaches. Nothing is claimed."""
    measured = frame.dropna(subset="share")
    return [
        Claim(f"{row.network} in {row.format}, GFLOP/s beside a product of matrices", row.GFLOP_per_s, row.ceiling)
        for row in measured.itertuples()
    ]


if __name__ == "__main__":
    main()
