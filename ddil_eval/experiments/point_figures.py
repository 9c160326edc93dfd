"""The figure of the gaussians world: the field of the exact teacher, two trajectories, and the states that each visits.

All is drawn in the plane of the first two principal directions of the true points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ddil_core.data.gaussians import GaussiansData
from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.parameterization import to_eps
from ddil_core.diffusion.schedule import rows_at
from ddil_core.models.model import Model
from ddil_core.support.image_grids import save_figure
from ddil_eval.experiments.drift_states import measure_states, pair_models
from ddil_eval.experiments.point_measures import CONSISTENCY_STEP
from ddil_eval.features.storage import Arrays
from ddil_eval.report.drift_figure import DATA, STUDENT, TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIELD_TIME = 500
"""The timestep of the field."""
ARROWS = 17
"""The arrows along each side of the field."""
TRAJECTORIES = 12
"""The trajectories that are drawn."""
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


def draw_points(teacher: Model, student: Model, path: Path, *, teacher_steps: int = 16, points: int = 600) -> Path:
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
    columns = max(2, len(pair.grid))
    figure = Figure(figsize=(3.4 * columns, 7.4), layout="constrained")
    axes = figure.subplots(2, columns)
    _field(axes[0, 0], teacher, plane, plane(truth))
    _trajectories(axes[0, 1], arrays, plane, plane(truth))
    for ax in axes[0, 2:]:
        ax.set_axis_off()
    for place, t in enumerate(pair.grid):
        _states(axes[1, place], arrays, place, plane, f"States at t = {t:g}")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", frameon=False, markerscale=3)
    return save_figure(figure, path, 150)


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
    ax.scatter(*truth.T, s=2, color=DATA, alpha=0.35, linewidths=0)
    ax.quiver(*grid.T, *arrows.T, color=TEACHER, width=0.004, angles="xy")
    _finish(ax, f"The exact field, −ε̂ at t = {FIELD_TIME}")


def _trajectories(ax: Axes, arrays: Arrays, plane: Plane, truth: np.ndarray) -> None:
    """Draw both actors' trajectories from the same noise, from z_T to the end."""
    ax.scatter(*truth.T, s=2, color=DATA, alpha=0.35, linewidths=0)
    for kind, colour in (("teacher", TEACHER), ("student", STUDENT)):
        path = np.concatenate([arrays[f"states {kind}"], arrays[f"end {kind}"][:, None]], axis=1)[
            :TRAJECTORIES, ..., 0, 0
        ]
        for states in plane(path):
            ax.plot(*states.T, color=colour, linewidth=0.9, alpha=0.8)
            ax.plot(*states[-1], marker="o", markersize=3, color=colour)
    _finish(ax, "Trajectories from the same noise")


def _states(ax: Axes, arrays: Arrays, place: int, plane: Plane, title: str) -> None:
    """Draw the states that the three distributions have at a transition."""
    sources: tuple[tuple[str, str, str], ...] = (
        ("data", DATA, "forward-diffused data"),
        ("teacher", TEACHER, "the teacher's states"),
        ("student", STUDENT, "the student's own states"),
    )
    for kind, colour, label in sources:
        shown: Any = plane(arrays[f"states {kind}"][:, place, :, 0, 0])
        ax.scatter(*shown.T, s=3, color=colour, alpha=0.5, linewidths=0, label=label)
    _finish(ax, title)


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlim(-EDGE, EDGE)
    ax.set_ylim(-EDGE, EDGE)
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
