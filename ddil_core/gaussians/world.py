"""The default world: the parameters of its mixture, the names of its classes, and points of it.

``python -m ddil_core.gaussians`` writes the folder ``world`` again.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch

from ddil_core.gaussians.networks import GaussianMixture
from ddil_core.support.errors import WrongCommand

FOLDER = Path(__file__).parent / "world"
"""The shipped world, a pipeline folder."""
CLASS = "class "
"""The name of a class is this word and its number."""
NARROWEST, WIDEST = 0.08, 0.3
"""The range of the modes' widths, in standard deviations of the whole mixture."""


def make_mixture(dimensions: int = 8, modes: int = 40, classes: int = 8, seed: int = 0) -> GaussianMixture:
    """Draw a mixture whose coordinates have mean 0 and variance 1.

    The means are normal, the widths log-uniform from ``NARROWEST`` to ``WIDEST``, and the weights log-normal, so that
    the largest is about ten times the smallest.

    Args:
        dimensions: D.
        modes: The number of modes, a multiple of ``classes``.
        classes: The number of classes.
        seed: The seed.
    """
    random = np.random.default_rng(seed)
    weights = np.exp(random.normal(0, 0.5, modes))
    weights /= weights.sum()
    widths = np.exp(random.uniform(np.log(NARROWEST), np.log(WIDEST), modes))
    means = random.normal(size=(modes, dimensions))
    means -= weights @ means
    means *= np.sqrt((1 - weights @ widths**2) / (weights @ means**2))
    mixture = GaussianMixture(dimensions, modes, classes)
    with torch.no_grad():
        for parameter, values in ((mixture.means, means), (mixture.widths, widths), (mixture.weights, weights)):
            parameter.copy_(torch.from_numpy(values))
    return mixture


@cache
def shipped_mixture() -> GaussianMixture:
    """Return the mixture of the shipped world."""
    mixture: GaussianMixture = GaussianMixture.from_pretrained(FOLDER / "denoiser")
    return mixture.eval()


def draw_points(mixture: GaussianMixture, classes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw a point of each class, float32 [N, D]. The first points do not depend on N.

    Args:
        mixture: The mixture.
        classes: The classes, int64 [N].
        random: Gives two generators, one for the modes and one for the noise.
    """
    for_modes, for_noise = random.spawn(2)
    weights, widths, means = (part.double().numpy() for part in (mixture.weights, mixture.widths, mixture.means))
    within = weights.reshape(mixture.config.classes, -1)
    cumulative = np.cumsum(within / within.sum(1, keepdims=True), axis=1)
    chosen = (for_modes.random((len(classes), 1)) > cumulative[classes, :-1]).sum(1)
    mode = classes * within.shape[1] + chosen
    points = means[mode] + widths[mode, None] * for_noise.normal(size=(len(classes), means.shape[1]))
    return points.astype(np.float32)


def draw_classes(mixture: GaussianMixture, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw classes by their probability, int64 [count]."""
    probability = mixture.class_weights().double().numpy()
    return random.choice(len(probability), size=count, p=probability / probability.sum())


def class_name(index: int) -> str:
    """Return the name of a class, which is its prompt."""
    return f"{CLASS}{index}"


def class_index(name: str, classes: int) -> int:
    """Return the number of a class.

    Raises:
        WrongCommand: there is no such class.
    """
    names = [class_name(index) for index in range(classes)]
    if name not in names:
        raise WrongCommand(
            f"the prompt {name!r} is no class of the gaussians world; it may be one of {names[0]!r} to {names[-1]!r}"
        )
    return names.index(name)
