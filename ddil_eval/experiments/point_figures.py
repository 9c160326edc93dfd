"""The figure of the gaussians world: the field of the exact teacher, two trajectories, and the states that each visits.

All is drawn in the plane of the first two principal directions of the true points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure

from ddil_core.data.gaussians import GaussiansData
from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.parameterization import to_eps
from ddil_core.diffusion.schedule import rows_at
from ddil_core.models.model import Model
from ddil_core.support.image_grids import save_figure
from ddil_eval.experiments.drift_states import KINDS, measure_states, pair_models
from ddil_eval.experiments.point_measures import CONSISTENCY_STEP
from ddil_eval.features.storage import Arrays
from ddil_eval.report.figures import MIXED, STUDENT, TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIELD_TIME = 200
"""The timestep of the field."""
ARROWS = 17
"""The arrows along each side of the field."""
TRAJECTORIES = 12
"""The trajectories that are drawn."""
JOINED = 120
"""The states of each kind that are drawn in pairs."""
EDGE = 2.8
"""The half width of each panel."""


@dataclass(frozen=True)
class Plane:
    """The plane of the first two principal directions.

    Attributes:
        origin: The mean of the points, [D].
        directions: Two orthonormal directions, [2, D].
    """

    origin: np.ndarray
    directions: np.ndarray

    @classmethod
    def of(cls, points: np.ndarray) -> Plane:
        """Return the plane of points [N, D]."""
        origin = points.mean(0)
        return cls(origin, np.linalg.svd(points - origin, full_matrices=False)[2][:2])

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Project points [..., D] to [..., 2]."""
        return (points - self.origin) @ self.directions.T


def point_figure(teacher: Model, student: Model, path: Path, *, teacher_steps: int = 16, points: int = 600) -> Path:
    """Draw the figure of a student of the exact teacher, and return the file.

    Args:
        teacher: The model ``gaussians``.
        student: A student of it.
        path: The file.
        teacher_steps: DDIM steps of the teacher, a multiple of the student's.
        points: The number of points in each panel of states.
    """
    pair = pair_models(teacher, student, teacher_steps, None, CONSISTENCY_STEP)
    data = GaussiansData()
    images = np.concatenate(list(data.images(points)))
    arrays = measure_states(pair, data.prompts(points), images, seed=0)
    truth = images.reshape(points, -1)
    plane = Plane.of(truth)
    columns = max(4, len(pair.grid))
    figure = Figure(figsize=(3.2 * columns, 7.2), layout="constrained")
    axes = figure.subplots(2, columns)
    for ax in (*axes[0, 4:], *axes[1, len(pair.grid) :]):
        ax.set_axis_off()
    _field(axes[0, 0], teacher, plane, plane(truth))
    _trajectories(axes[0, 1], arrays, plane, plane(truth))
    for ax, kind, colour in ((axes[0, 2], "teacher", TEACHER), (axes[0, 3], "student", STUDENT)):
        _scatter(ax, plane(truth), MIXED)
        _scatter(ax, plane(arrays[f"end {kind}"][..., 0, 0]), colour)
        _finish(ax, f"The {kind}'s points, over true points")
    for place, t in enumerate(pair.grid):
        _states(axes[1, place], arrays, place, plane, f"States at t = {t:g}")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return save_figure(figure, path, 120)


def _field(ax: Axes, teacher: Model, plane: Plane, truth: np.ndarray) -> None:
    """Draw −ε̂, the direction of a DDIM step, on the plane through the mean, without a class."""
    side = np.linspace(-EDGE, EDGE, ARROWS)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    z = torch.from_numpy((plane.origin + grid @ plane.directions).astype(np.float32))[..., None, None]
    nothing = teacher.nothing()
    t = rows_at(FIELD_TIME, z)
    with torch.no_grad():
        x0 = teacher.denoiser(z, t, Condition(dict(nothing.tensors)).expand(len(z)))
        eps = to_eps(x0, z, *teacher.denoiser.schedule.at(t, z))
    arrows = -eps.flatten(1).numpy() @ plane.directions.T
    _scatter(ax, truth, MIXED)
    ax.quiver(*grid.T, *arrows.T, color=TEACHER, width=0.004, angles="xy")
    _finish(ax, f"The exact field, −ε̂ at t = {FIELD_TIME}")


def _trajectories(ax: Axes, arrays: Arrays, plane: Plane, truth: np.ndarray) -> None:
    """Draw both actors' trajectories from the same noise, from z_T to the end."""
    _scatter(ax, truth, MIXED)
    for kind, colour in (("teacher", TEACHER), ("student", STUDENT)):
        path = np.concatenate([arrays[f"states {kind}"], arrays[f"end {kind}"][:, None]], axis=1)[
            :TRAJECTORIES, ..., 0, 0
        ]
        for states in plane(path):
            ax.plot(*states.T, color=colour, linewidth=0.9, alpha=0.8)
            ax.plot(*states[-1], marker="o", markersize=3, color=colour)
    _finish(ax, "Trajectories from the same noise")


def _states(ax: Axes, arrays: Arrays, place: int, plane: Plane, title: str) -> None:
    """Draw the states at a transition: of data, and the student's, each joined to the teacher's of the same noise."""
    data, teacher, student = (plane(arrays[f"states {kind}"][:, place, :, 0, 0]) for kind in KINDS)
    _scatter(ax, data, MIXED, "forward-diffused data")
    pairs = np.stack([teacher[:JOINED], student[:JOINED]])
    ax.plot(pairs[..., 0], pairs[..., 1], color=STUDENT, linewidth=0.8, alpha=0.7)
    _scatter(ax, teacher[:JOINED], TEACHER, "the teacher's states", size=10)
    _scatter(ax, student[:JOINED], STUDENT, "the student's own states, from the same noise", size=10)
    _finish(ax, title)


def _scatter(ax: Axes, points: np.ndarray, colour: str, label: str | None = None, size: float = 4) -> None:
    x, y = points.T
    ax.scatter(x, y, s=size, color=colour, alpha=0.3 if colour == MIXED else 0.5, linewidths=0, label=label)


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlim(-EDGE, EDGE)
    ax.set_ylim(-EDGE, EDGE)
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
