"""The measures that know the truth: modes and likelihood of points, and what they say of the exact teacher."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from ddil_core.data.gaussians import GaussiansData
from ddil_core.gaussians.world import shipped_mixture
from ddil_core.models.model import load_model
from ddil_core.support.errors import WrongCommand
from ddil_eval.experiments.point_measures import measure_points
from ddil_eval.metrics.gaussians_world import (
    POINT_MODES,
    ModesFound,
    log_likelihood,
    modes_found,
    modes_reached,
)

DATA = GaussiansData()
POINTS, CLASSES = next(DATA.images(6000, 6000)).reshape(6000, -1), DATA.classes(6000)


def test_the_true_points_find_all_modes() -> None:
    reached = modes_reached(POINTS, CLASSES, shipped_mixture())
    assert reached.any(1).mean() == pytest.approx(0.999, abs=0.002)
    assert modes_found(POINTS, CLASSES) == 1


def test_a_mode_is_lost_when_its_points_go_elsewhere() -> None:
    mixture = shipped_mixture()
    reached = modes_reached(POINTS, CLASSES, mixture)
    moved = POINTS.copy()
    moved[reached[:, 7]] = mixture.means[6].numpy()  # both are modes of class 1
    assert modes_found(moved, CLASSES) == 39 / 40
    halfway = POINTS.copy()
    halfway[reached[:, 7] | reached[:, 30]] += 2
    assert modes_found(halfway, CLASSES) == 38 / 40


def test_the_likelihood_is_the_mixtures() -> None:
    mixture = shipped_mixture()
    weights, means, widths = (part.double().numpy() for part in (mixture.weights, mixture.means, mixture.widths))
    for point, label in zip(POINTS[:5], CLASSES[:5], strict=True):
        modes = range(5 * label, 5 * label + 5)
        terms = [np.log(weights[k]) + multivariate_normal.logpdf(point, means[k], widths[k] ** 2) for k in modes]
        expected = logsumexp(terms) - np.log(sum(weights[k] for k in modes))
        assert log_likelihood(point[None], np.array([label])) == pytest.approx(expected, rel=1e-5)


def test_the_metric_of_modes_counts_as_the_function_does() -> None:
    captions = [prompt.text for prompt in DATA.prompts(6000)]
    features = POINT_MODES.open_on("cpu")(POINTS[:, None, None], captions)
    assert ModesFound().values(features)[0] == modes_found(POINTS, CLASSES)
    few, labels = 400, np.arange(400) % 20  # so few that leaving a group out loses modes
    spread = ModesFound().spread(features[:few], labels).pseudovalues
    whole = modes_found(POINTS[:few], CLASSES[:few])
    without = [modes_found(POINTS[:few][labels != k], CLASSES[:few][labels != k]) for k in range(20)]
    np.testing.assert_allclose(spread[:, 0], [20 * whole - 19 * part for part in without])
    assert len(set(without)) > 1
    with pytest.raises(WrongCommand, match="point_modes measures points of the gaussians world, not images of 64 × 64"):
        POINT_MODES.require((64, 64), ["class 0"])


def test_the_exact_teacher_as_its_own_student() -> None:
    """With the same steps it equals itself; its points have the true distribution."""
    teacher = load_model("gaussians", "cpu")
    found = measure_points(teacher, teacher, 1024, teacher_steps=4)
    assert max(found["end_distance"], found["disagreement_student"]) < 1e-9
    fine = measure_points(teacher, teacher, 1024, teacher_steps=64)
    assert fine["teacher_modes_found"] == 1
    assert abs(fine["teacher_energy_distance"]) < 0.005 < fine["energy_distance"]  # four steps are too few
    with pytest.raises(WrongCommand, match="the truth is known for the teacher 'gaussians' alone"):
        measure_points(load_model("shapes", "cpu"), teacher, 8)
