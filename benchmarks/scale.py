"""How cost grows: sampling by batch, steps and prompts, and statistics by the number of images N.

    python -m benchmarks.scale [--model shapes] [--rounds 1] [--clock wall] [--out DIR] [--csv FILE]

Sampling goes from prompts to decoded images, with the model's own solver and guidance. Statistics go from features
[N, 512] on the host to values and their intervals, against a reference of 1,000. The plots are DIR/scale.png and
DIR/scale.svg; DIR is the folder of the CSV file by default. "peak_MiB" is the memory that the work takes at its peak,
beside what is held before it: of the GPU, or of the process on Linux.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch

from benchmarks.alternation import CLOCKS, Clock, synchronise
from benchmarks.claims import Claim
from benchmarks.printing import show
from ddil_core.data.datasets import open_data
from ddil_core.diffusion.noise import Sample
from ddil_core.models.generate import resolve_sampling, sample_images
from ddil_core.models.model import Model, load_model
from ddil_eval.cli.options import quiet_libraries
from ddil_eval.statistics import FrechetInfinity, FrechetReference, group_labels
from ddil_eval.statistics.kernels import KernelDistance
from ddil_eval.statistics.neighbours import Neighbours

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
STEPS = (1, 2, 4, 8, 16)
PROMPTS = (1, 8, 32, 128)
COUNTS = (250, 500, 1000, 2000, 4000)
FEW = 4
"""The steps of a student, for the sweeps of batch and prompts."""
DIMENSIONS = 512
STATISTICS = {
    "Fréchet distance": FrechetReference,
    "FID∞": FrechetInfinity,
    "KID": KernelDistance,
    "precision to coverage": Neighbours,
}
Work = Callable[[], object]
Point = tuple[str, str, int, int, Work]
"""The axis, what is measured, the place on the axis, the images, and the work."""


def draw(model: Model, texts: list[str], steps: int, batch: int) -> Work:
    """Return a function that draws and decodes one image of each text, ``batch`` at once."""
    sampling = resolve_sampling(model, steps=steps)

    def work() -> None:
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            sample_images(model, [Sample(text, start + place) for place, text in enumerate(part)], part, sampling, 0)

    return work


def features(count: int, seed: int) -> np.ndarray:
    """Return float32 [count, 512]. Their variances fall as a network's do."""
    scale = 1 / np.sqrt(np.arange(1, DIMENSIONS + 1))
    return (np.random.default_rng(seed).normal(size=(count, DIMENSIONS)) * scale).astype(np.float32)


def points(model: Model, texts: list[str]) -> Iterator[Point]:
    """Yield what is measured, from small to large on each axis."""
    for batch in BATCHES:
        yield "batch", "sampling", batch, batch, draw(model, texts[:batch], FEW, batch)
    for steps in STEPS:
        yield "steps", "sampling", steps, 8, draw(model, texts[:8], steps, 8)
    for count in PROMPTS:
        yield "prompts", "sampling", count, count, draw(model, texts[:count], FEW, 32)
    reference = features(1000, 1)
    for name, kind in STATISTICS.items():
        statistic = kind(reference)
        for count in COUNTS:
            x, labels = features(count, 0), group_labels(count)
            yield "N", name, count, count, lambda s=statistic, x=x, labels=labels: s.spread(x, labels)


def reset_peak() -> float:
    """Start a new measurement of the largest memory, and return the MiB that are held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would hide what the work takes
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _of_the_process("VmRSS")


def peak() -> float:
    """Return MiB at the peak since `reset_peak`; NaN where the system does not tell."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _of_the_process("VmHWM")


def _of_the_process(entry: str) -> float:
    """Return MiB of an entry of Linux's status of this process."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(entry)), float("nan"))


def seconds_of(work: Work, rounds: int, clock: Clock) -> float:
    """Return the median seconds of some runs."""
    found = []
    for _ in range(rounds):
        synchronise()
        started = CLOCKS[clock]()
        work()
        synchronise()
        found.append(CLOCKS[clock]() - started)
    return statistics.median(found)


def measure(model: Model, rounds: int, clock: Clock) -> pd.DataFrame:
    """Return a row for each point. The first point of each kind runs once before, uncounted."""
    texts = [prompt.text for prompt in open_data("shapes").prompts(max(BATCHES))]
    rows: list[dict[str, Any]] = []
    warm = set()
    for axis, what, place, images, work in points(model, texts):
        if what not in warm:
            work()
            warm.add(what)
        held = reset_peak()
        seconds = seconds_of(work, rounds, clock)
        row = {"axis": axis, "what": what, "at": place, "seconds": seconds, "seconds_per_image": seconds / images}
        rows.append(row | {"peak_MiB": peak() - held})
    return pd.DataFrame(rows)


PANELS = (
    ("batch", "seconds_per_image", "images at once", "s an image"),
    ("steps", "seconds_per_image", "steps", "s an image"),
    ("prompts", "seconds", "prompts", "s"),
    ("N", "seconds", "images N", "s"),
    ("batch", "peak_MiB", "images at once", "MiB that the work takes"),
    ("N", "peak_MiB", "images N", "MiB that the work takes"),
)


def plot(frame: pd.DataFrame, title: str, folder: Path) -> None:
    """Draw a panel for each axis and quantity into ``folder``/scale.png and scale.svg."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(title)
    for axes, (axis, quantity, label, unit) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for what, line in frame[frame["axis"] == axis].groupby("what", sort=False):
            axes.plot(line["at"], line[quantity], marker="o", label=what)
        axes.set(xscale="log", xlabel=label, ylabel=unit)
        axes.set_xticks(sorted(set(frame.loc[frame["axis"] == axis, "at"])))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        if quantity == "peak_MiB" or axis == "batch":
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if axis == "N":
            axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"scale.{suffix}")


@click.command(help=__doc__)
@click.option("--model", "reference", default="shapes", show_default=True)
@click.option("--rounds", default=1, show_default=True, help="Runs of each point.")
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=None, help="The folder for plots.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(reference: str, rounds: int, clock: Clock, out: Path | None, csv_path: Path | None) -> None:
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    frame = measure(load_model(reference, device), rounds, clock)
    show(frame, csv_path)
    if folder := out or (csv_path and csv_path.parent):
        plot(frame, f"{reference} on {device}, {clock} seconds", folder)


def summary(frame: pd.DataFrame) -> list[Claim]:
    """Return what grows, as ratios of the ends of each axis: ours at the large end, "peer" at the small end."""
    found = []
    for (axis, what), line in frame.groupby(["axis", "what"], sort=False):
        small, large = line.iloc[0], line.iloc[-1]
        claim = f"{what}, seconds an image, {axis} {large['at']} beside {small['at']}"
        found.append(Claim(claim, large["seconds_per_image"], small["seconds_per_image"]))
    return found


if __name__ == "__main__":
    main()
