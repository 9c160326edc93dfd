"""Draw the figures of the concepts' pages: ``python docs/concept_images.py [--student RUN] [--prompts N]``.

Without ``--student`` the figures that need no student are drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddil_core.diffusion.parameterization import Reflection
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.phases import curve_bounds
from ddil_core.support.image_grids import save_figure
from ddil_core.support.protocol import read_yaml, validate
from ddil_core.support.resources import protocols

HERE = Path(__file__).parent / "images"
DATA, TEACHER, STUDENT = "#444444", "#0072B2", "#D55E00"  # the palette of Okabe and Ito, for any colour vision
DPI = 130

Points = tuple[np.ndarray, np.ndarray]
"""The places of states along an axis, and the student's loss at each."""


def draw_reflection(path: Path) -> None:
    """Draw what becomes of x̂ by each mode, for a bound of 1. Another image's largest value decides ``dynamic``."""
    x = np.linspace(-3.2, 3.2, 641)
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    panels = {"clamp": "clamp: stops at the bound", "fold": "fold: mirrored at the bound", "dynamic": "dynamic: scaled"}
    for ax, (mode, title) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        reflection = Reflection(mode, torch.zeros(1), torch.ones(1))
        inside = reflection(torch.tensor(x, dtype=torch.float64).reshape(1, 1, 1, -1))[0].flatten().numpy()
        ax.axhspan(-1, 1, color=DATA, alpha=0.08, lw=0)
        ax.plot(x, x, color=DATA, lw=1, ls=":", label="none")
        ax.plot(x, inside, color=STUDENT, lw=2, label=mode)
        ax.set(title=title, xlabel="x̂ after guidance", ylim=(-2.2, 2.2), xticks=[-3, -1, 0, 1, 3])
        ax.set_yticks([-1, 0, 1], ["−c", "0", "c"])
        ax.set_xticklabels(["−3c", "−c", "0", "c", "3c"])
        ax.legend(loc="lower right", frameon=False)
    save_figure(figure, path, DPI)


def draw_sources(path: Path) -> None:
    """Draw the shares of a batch over a stage, as the phases of the shipped protocol say."""
    file = protocols() / "shapes" / "pd.yaml"
    config = validate(ProgressiveConfig, read_yaml(file), str(file))
    assert config.ddil is not None
    edges, shares = [0.0], []
    for phase in config.ddil.phases:
        edges.append(phase.until)
        aggregated, p_teacher = (sum(curve_bounds(curve)) / 2 for curve in (phase.aggregated, phase.p_teacher))
        shares.append((1 - aggregated, aggregated * p_teacher, aggregated - aggregated * p_teacher))
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    ax = figure.subplots()
    rows = np.array(shares).T
    labels = ("noised data", "states where the teacher acts", "states where the student acts")
    bottom = np.zeros(len(shares))
    for row, colour, label in zip(rows, (DATA, TEACHER, STUDENT), labels, strict=True):
        ax.bar(edges[:-1], row, np.diff(edges), bottom, align="edge", color=colour, alpha=0.85, ec="white", label=label)
        for left, right, low, height in zip(edges, edges[1:], bottom, row, strict=False):
            if height > 0.06:
                ax.text((left + right) / 2, low + height / 2, f"{height:.0%}", ha="center", va="center", color="white")
        bottom += row
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="share of the updates of a stage", ylabel="share of a batch")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save_figure(figure, path, DPI)


def draw_shift(student: str, count: int, path: Path) -> None:
    """Draw covariate shift: the states of training beside the student's own, and its error over both.

    At each transition the horizontal axis is the direction that tells the two kinds of states apart, found on one half
    of the prompts and drawn on the other (ridge regression, as the drift experiment's probe).

    Args:
        student: The reference of a student of progressive distillation.
        count: The number of held-out prompts.
        path: The file.
    """
    from ddil_core.data.datasets import open_data
    from ddil_core.data.pool import image_side
    from ddil_core.models.model import load_model
    from ddil_eval.experiments.drift_states import measure_states, pair_models
    from ddil_eval.experiments.targets import read_targets

    teacher = load_model("shapes")
    learner = load_model(student)
    steps = 2 * len(learner.sampling.times(teacher.denoiser.schedule))  # of the teacher that it learnt from
    pair = pair_models(teacher, learner, steps, None, 20)
    data = open_data("shapes")
    images = read_targets(data, count, image_side(teacher)).images
    prompts = data.prompts(count)
    parts = [
        measure_states(pair, prompts[start : start + 64], images[start : start + 64], seed=0)
        for start in range(0, count, 64)
    ]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    transitions = range(1, len(pair.grid))  # at the first both are pure noise
    figure = Figure(figsize=(3.4 * len(transitions), 4.6), layout="constrained")
    axes = figure.subplots(2, len(transitions), sharex="col", height_ratios=(1, 1))
    for column, k in enumerate(transitions):
        data_states, own = (found[f"states {kind}"][:, k].reshape(count, -1) for kind in ("data", "student"))
        places = [_along(data_states, own, held_out) for held_out in (0, 1)]
        x_data, x_own = (np.concatenate([place[i] for place in places]) for i in (0, 1))
        order = np.concatenate([np.arange(count)[0::2], np.arange(count)[1::2]])
        y_data, y_own = (found[f"disagreement {kind}"][order, k] for kind in ("data", "student"))
        _draw_column(axes[:, column], f"t = {pair.grid[k]}", (x_data, y_data), (x_own, y_own), first=column == 0)
    save_figure(figure, path, DPI)


def _along(data: np.ndarray, own: np.ndarray, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of held-out rows of both kinds along the direction that tells the other rows apart.

    ``held_out`` is 0 for the even rows and 1 for the odd ones. Rows of ``data`` lie around −1, those of ``own`` around 1.
    """
    x, y = data[1 - held_out :: 2].astype(np.float64), own[1 - held_out :: 2].astype(np.float64)
    both = np.concatenate([x, y])
    origin = both.mean(axis=0)
    products = (both - origin) @ (both - origin).T
    penalty = np.trace(products) / len(both)
    weights = np.linalg.solve(products + penalty * np.eye(len(both)), np.repeat([-1.0, 1.0], [len(x), len(y)]))
    direction = (both - origin).T @ weights
    scale = np.std(np.concatenate([(part[held_out::2] - origin) @ direction for part in (data, own)]))
    return tuple((part[held_out::2] - origin) @ direction / scale for part in (data, own))


def _draw_column(axes: Sequence[Axes], title: str, data: Points, own: Points, first: bool) -> None:
    """Draw the densities of both kinds of states above, and the mean disagreement by place below."""
    top, bottom = axes
    everything = np.concatenate([data[0], own[0]])
    edges = np.linspace(*np.quantile(everything, [0.002, 0.998]), 22)
    for (x, y), colour, label in ((data, DATA, "noised data (training)"), (own, STUDENT, "the student's own states")):
        top.hist(x, edges, density=True, color=colour, alpha=0.45, label=label)
        top.axvline(x.mean(), color=colour, lw=1.5)
        bins = np.quantile(x, np.linspace(0, 1, 6))
        inside = [(x >= low) & (x <= high) for low, high in itertools.pairwise(bins)]
        means = np.array([y[rows].mean() for rows in inside])
        errors = np.array([1.96 * y[rows].std(ddof=1) / np.sqrt(rows.sum()) for rows in inside])
        centres = np.array([x[rows].mean() for rows in inside])
        bottom.errorbar(centres, means, errors, color=colour, marker="o", ms=4, lw=1.5)
        bottom.axhline(y.mean(), color=colour, lw=1, ls=":")
    ratio = own[1].mean() / data[1].mean()
    top.set(title=f"{title}: error {ratio - 1:+.0%}", yticks=[])
    bottom.set(ylim=(0, None))
    if first:
        top.set_ylabel("density of states")
        bottom.set_ylabel("the student's loss")
        top.legend(frameon=False, fontsize=8, loc="upper left")
    bottom.set_xlabel("direction that tells them apart")


@click.command(help=__doc__)
@click.option("--student", default=None, help="A run of progressive distillation in the shapes world.")
@click.option("--prompts", default=512, show_default=True, help="The number of held-out prompts.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=HERE, help="The folder.")
def main(student: str | None, prompts: int, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    draw_reflection(out / "reflection.png")
    draw_sources(out / "aggregated.png")
    if student is not None:
        draw_shift(student, prompts, out / "covariate-shift.png")


if __name__ == "__main__":
    main()
