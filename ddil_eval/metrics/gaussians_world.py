"""Networks for points of the gaussians world: the points, the modes that they reach, and their likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import chdtri

from ddil_core.support.errors import WrongCommand
from ddil_eval.metrics.metric import Extractor, Network
from ddil_eval.statistics.jackknife import Spread, pseudovalues

if TYPE_CHECKING:
    from ddil_core.gaussians.networks import GaussianMixture

Array = np.ndarray
HELD = 0.999
"""The share of a mode's mass inside the radius within which a point has reached the mode."""
ENOUGH = 0.5
"""The share of a mode's expected mass that must reach the mode, so that it counts as found."""


def modes_reached(points: Array, classes: Array, mixture: GaussianMixture) -> Array:
    """Return which mode each point has reached, bool [N, modes]; a row without a mode reached none.

    A point reaches the most probable mode of its class, if it lies inside the radius that holds ``HELD`` of the mode's
    mass.

    Args:
        points: float [N, D].
        classes: The class of each point, int64 [N].
        mixture: The mixture.
    """
    log_responsibility, _ = _log_probabilities(points, classes, mixture)
    mode = log_responsibility.argmax(1)
    means, widths = mixture.means.double().numpy(), mixture.widths.double().numpy()
    squared = np.square((points - means[mode]) / widths[mode, None]).sum(1)
    inside = squared <= chdtri(points.shape[1], 1 - HELD)
    return np.eye(len(means), dtype=bool)[mode] & inside[:, None]


def modes_found(points: Array, classes: Array, mixture: GaussianMixture | None = None) -> float:
    """Return the share of all modes that are found: at least ``ENOUGH`` of the expected mass reaches them.

    The expected mass of a mode is its share of each class, summed over the classes that were asked for.

    Args:
        points: float [N, D].
        classes: The class that was asked for, int64 [N].
        mixture: The mixture; None for the shipped one.
    """
    mixture = mixture or _shipped()
    reached = modes_reached(points, classes, mixture)
    return float(_found(reached.sum(0), expected_mass(classes, mixture).sum(0)))


def log_likelihood(points: Array, classes: Array, mixture: GaussianMixture | None = None) -> Array:
    """Return log p(x₀ | class), float64 [N], in nats. For the arguments see ``modes_found``."""
    return _log_probabilities(points, classes, mixture or _shipped())[1]


def _log_probabilities(points: Array, classes: Array, mixture: GaussianMixture) -> tuple[Array, Array]:
    """Return log p(k | x₀, class) [N, modes], and log p(x₀ | class) [N], float64."""
    import torch

    x = torch.from_numpy(np.asarray(points, dtype=np.float64))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(classes), mixture.config.classes)
    clean = torch.ones(len(x), 1, dtype=torch.float64)
    with torch.no_grad():
        modes, density = mixture.log_responsibilities(x, clean, torch.zeros_like(clean), one_hot)
    return modes.numpy(), density.numpy()


def expected_mass(classes: Array, mixture: GaussianMixture) -> Array:
    """Return p(k | class) of every mode, float64 [N, modes], for classes int64 [N]."""
    weights = mixture.weights.double().numpy().reshape(mixture.config.classes, -1)
    mass = np.zeros((len(classes), *weights.shape))
    mass[np.arange(len(classes)), classes] = (weights / weights.sum(1, keepdims=True))[classes]
    return mass.reshape(len(classes), -1)


def _found(reached: Array, expected: Array) -> Array:
    """Return the share of the modes with some expected mass that are found."""
    possible = expected > 0
    return (reached[..., possible] >= ENOUGH * expected[possible]).mean(-1)


class ModesFound:
    """The share of modes that are found, as a statistic of rows that hold ``modes_reached`` and the expected mass."""

    def __init__(self, reference: Array | None = None) -> None:
        pass

    def values(self, features: Array) -> Array:
        """Return the share as one column."""
        reached, expected = np.split(features.sum(0), 2)
        return np.array([_found(reached, expected)])

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return the share with its pseudovalues."""
        of_groups = np.eye(int(labels.max()) + 1)[labels].T @ features
        reached, expected = np.split(features.sum(0) - of_groups, 2, axis=1)
        without = np.array([_found(*rows) for rows in zip(reached, expected, strict=True)])
        value = self.values(features)
        return Spread(value, pseudovalues(value, without[:, None], labels))


def _require_points(metric: str, size: tuple[int, int], captions: Sequence[str]) -> None:
    """Refuse what cannot be points with the names of their classes. Raises WrongCommand."""
    if size != (1, 1):
        raise WrongCommand(
            f"{metric} measures points of the gaussians world, not images of {size[1]} × {size[0]} px; leave the "
            "metric out for other models"
        )
    _classes(captions)


def _shipped() -> GaussianMixture:
    from ddil_core.gaussians.world import shipped_mixture  # loads torch, which a list of metrics does not need

    return shipped_mixture()


def _classes(captions: Sequence[str]) -> Array:
    from ddil_core.gaussians.world import class_index

    count = _shipped().config.classes
    return np.array([class_index(caption, count) for caption in captions], dtype=np.int64)


def _flat(images: Array) -> Array:
    return images.reshape(len(images), -1).astype(np.float64)


def _open(features: Extractor) -> Callable[[str], Extractor]:
    return lambda device: features


def _points_of(images: Array, captions: list[str]) -> Array:
    return _flat(images)


def _modes_of(images: Array, captions: list[str]) -> Array:
    mixture, classes = _shipped(), _classes(captions)
    reached = modes_reached(_flat(images), classes, mixture)
    return np.concatenate([reached, expected_mass(classes, mixture)], axis=1)


def _likelihood_of(images: Array, captions: list[str]) -> Array:
    return log_likelihood(_flat(images), _classes(captions))[:, None]


def _network(name: str, features: Extractor, *, reads_captions: bool = True) -> Network:
    return Network(
        name=name,
        needs="nothing: the mixture is part of the gaussians world",
        open_on=_open(features),
        reads_captions=reads_captions,
        require=partial(_require_points, name),
    )


POINTS = _network("points", _points_of, reads_captions=False)
POINT_MODES = _network("point_modes", _modes_of)
POINT_LIKELIHOOD = _network("point_likelihood", _likelihood_of)
