"""What the machine can do at most: products of matrices in each number format, and traffic with the memory.

    python -m benchmarks.ceilings [--seconds 1] [--size N] [--csv FILE]

The figures are the limits that other benchmarks are compared with. A product of N × N matrices takes 2 N³ operations. A
copy of a large array moves its bytes twice, in and out. On a GPU, copies between host and device are measured too, from
pageable and from pinned memory. Each figure is the best of as many runs as fit into ``--seconds``, as a ceiling should
be.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd
import torch

from benchmarks.alternation import CLOCKS, Clock, synchronise
from benchmarks.claims import Claim
from benchmarks.printing import show

SIZES = {"cpu": 2048, "cuda": 8192}
"""N of the matrices. The three matrices of 2048 × 2048 take 48 MiB in float32."""
COPIED = {"cpu": 2**28, "cuda": 2**30}
"""Bytes of the array that is copied, more than any cache holds."""
FORMATS = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16", "float16")}


def best(work: Callable[[], object], seconds: float, clock: Clock = "wall") -> float:
    """Return the least seconds of one run, after a warm-up, among the runs of ``seconds``."""
    now = CLOCKS[clock]
    work()
    found, started = [], now()
    while not found or now() - started < seconds:
        synchronise()
        before = now()
        work()
        synchronise()
        found.append(now() - before)
    return min(found)


def product_rate(name: str, device: str, seconds: float = 1.0, size: int | None = None, clock: Clock = "wall") -> float:
    """Return the operations a second of a product of matrices.

    Args:
        name: "float32", "bfloat16", "float16", or "tf32": float32 numbers whose products are rounded on a GPU.
        device: "cpu" or "cuda".
        seconds: How long to measure.
        size: N of the N × N matrices; None takes the one of ``SIZES``.
        clock: "wall"; or "cpu" for one thread beside other work on the machine.
    """
    n = size or SIZES[device]
    a, b = (
        torch.randn(n, n, device=device).to(torch.float32 if name == "tf32" else getattr(torch, name)) for _ in "ab"
    )
    out = torch.empty_like(a)
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if name == "tf32" else "ieee"  # type: ignore[attr-defined]
    try:
        return 2 * n**3 / best(lambda: torch.mm(a, b, out=out), seconds, clock)
    finally:
        switch.fp32_precision = before  # type: ignore[attr-defined]


def copy_rate(device: str, seconds: float = 1.0, clock: Clock = "wall") -> float:
    """Return the bytes a second that a copy within the memory of a device reads and writes, both counted."""
    source = torch.ones(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source), seconds, clock)


def transfer_rate(to_device: bool, pinned: bool, seconds: float = 1.0) -> float:
    """Return the bytes a second of a copy between the memory of the host and of a GPU."""
    host = torch.ones(2**26, pin_memory=pinned)
    device = torch.empty(2**26, device="cuda")
    source, target = (host, device) if to_device else (device, host)
    return host.nbytes / best(lambda: target.copy_(source, non_blocking=pinned), seconds)


def measure(device: str, seconds: float, size: int | None) -> pd.DataFrame:
    """Return one row for each ceiling: what, its figure, its unit."""
    found = [
        (f"product of matrices, {name}", product_rate(name, device, seconds, size) / 1e9, "GFLOP/s")
        for name in FORMATS[device]
    ]
    found.append(("copy within the memory", copy_rate(device, seconds) / 1e9, "GB/s"))
    if device == "cuda":
        for to_device in (True, False):
            for pinned in (False, True):
                way = "host to device" if to_device else "device to host"
                rate = transfer_rate(to_device, pinned, seconds) / 1e9
                found.append((f"{way}, {'pinned' if pinned else 'pageable'}", rate, "GB/s"))
    return pd.DataFrame(found, columns=["ceiling", "rate", "unit"])


@click.command(help=__doc__)
@click.option("--seconds", default=1.0, show_default=True, help="Seconds for each figure.")
@click.option("--size", type=int, default=None, help="N of the matrices.  [default: 2048 on a CPU, 8192 on a GPU]")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(seconds: float, size: int | None, csv_path: Path | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    show(measure(device, seconds, size), csv_path)


def summary(frame: pd.DataFrame) -> list[Claim]:
    """Return the ceilings. They are measured, and nothing is claimed."""
    return [Claim(f"{row.ceiling}, {row.unit}", row.rate) for row in frame.itertuples()]


if __name__ == "__main__":
    main()
