"""Features of cells to estimates of cells and of their contrasts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from ddil_core.data.base import Prompt
from ddil_core.data.shapes import ShapesData
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_eval.experiments.measurement import Cells
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.storage import concatenate
from ddil_eval.metrics import METRICS
from ddil_eval.statistics import estimate_mean, frechet_distance
from ddil_eval.statistics.moments import blocks
from tests.pixels import add_metric, mosaic

PROMPTS = 120


@pytest.fixture(scope="module", autouse=True)
def metrics(pixel_metrics: tuple[str, ...]) -> tuple[str, ...]:
    return pixel_metrics


@pytest.fixture(scope="module")
def cells() -> Cells:
    """Two cells on the same prompts: hard prompts are hard for both, and the second cell is a little better."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(PROMPTS, 1))
    scores = np.concatenate([common, common + 0.3 + 0.1 * rng.normal(size=(PROMPTS, 1))])
    base = rng.normal(size=(PROMPTS, 5)) * [3, 2, 1, 1, 0.5]
    sets = np.concatenate([base, base + 0.4 + 0.05 * rng.normal(size=(PROMPTS, 5))])
    rows = {"a": np.arange(PROMPTS), "b": np.arange(PROMPTS) + PROMPTS}
    return Cells({"brightness": scores, "fd_mosaic": sets}, rows, {"fd_mosaic": rng.normal(size=(400, 5))})


def test_batches_cover_everything_once() -> None:
    assert list(blocks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(blocks(6, 3)) == [slice(0, 3), slice(3, 6)]
    assert list(blocks(2, 8)) == [slice(0, 2)]
    assert list(blocks(0, 8)) == []


def test_features_are_joined_in_order() -> None:
    parts = [{"x": np.array([[1.0], [2.0]]), "y": np.zeros((2, 3))}, {"x": np.array([[3.0]]), "y": np.ones((1, 3))}]
    joined = concatenate(parts)
    assert joined["x"].ravel().tolist() == [1.0, 2.0, 3.0]
    assert joined["y"].shape == (3, 3) and joined["y"][2].tolist() == [1.0] * 3


def test_a_cell_is_its_mean_or_its_distance(cells: Cells) -> None:
    found = cells.estimates(cells.single())
    for name, rows in cells.rows.items():
        scores, features = cells.features["brightness"][rows], cells.features["fd_mosaic"][rows]
        assert found[name]["brightness"].value == pytest.approx(scores.mean(), abs=1e-12)
        distance = frechet_distance(features, cells.reference["fd_mosaic"])
        assert found[name]["fd_mosaic"].value == pytest.approx(distance, rel=1e-9)
        assert found[name]["brightness"] == estimate_mean(scores, np.ones(1))
        for estimate in found[name].values():
            assert estimate.low < estimate.value < estimate.high and estimate.n == PROMPTS
        assert found[name]["fd_mosaic"].low >= 0


def test_a_difference_is_the_difference_of_the_values(cells: Cells) -> None:
    single = cells.single()
    found = cells.estimates(single | {"b − a": single["b"] - single["a"]})
    for metric in cells.features:
        expected = found["b"][metric].value - found["a"][metric].value
        assert found["b − a"][metric].value == pytest.approx(expected, abs=1e-10)
    assert found["b − a"]["brightness"].low > 0.2
    for metric in cells.features:
        difference = found["b − a"][metric]
        assert found["a"][metric].p_value is None
        assert (difference.p_value < 0.05) == (difference.low > 0 or difference.high < 0)
    assert found["b − a"]["brightness"].p_value < 1e-20


def test_a_distance_may_fall_below_the_other(cells: Cells) -> None:
    """The distance of a cell is at least 0; the interval of a difference is not cut there."""
    single = cells.single()
    turned = cells.estimates({"a − b": single["a"] - single["b"], "b − a": single["b"] - single["a"]})
    one, other = (turned[name]["fd_mosaic"] for name in ("a − b", "b − a"))
    assert one.value == pytest.approx(-other.value) and one.value != 0
    assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))
    assert min(one.low, other.low) < 0


def test_pairing_by_prompt_narrows_a_difference(cells: Cells) -> None:
    """With the prompts of the second cell out of order the values stay, and the interval is several times as wide."""
    shuffled = np.random.default_rng(1).permutation(PROMPTS) + PROMPTS
    unpaired = replace(cells, rows={"a": cells.rows["a"], "b": shuffled})
    contrast = {"difference": np.array([-1.0, 1.0])}
    for metric in cells.features:
        paired, apart = (c.estimates(contrast)["difference"][metric] for c in (cells, unpaired))
        assert paired.value == pytest.approx(apart.value, abs=1e-9)
        assert apart.high - apart.low > 2 * (paired.high - paired.low)


def test_cells_may_share_images(cells: Cells) -> None:
    """A cell that takes half of its images from another cell is measured on those images."""
    half = np.where(np.arange(PROMPTS) < PROMPTS // 2, cells.rows["a"], cells.rows["b"])
    mixed = replace(cells, rows={**cells.rows, "mixed": half})
    found = mixed.estimates(mixed.single())
    assert found["mixed"]["brightness"].value == pytest.approx(cells.features["brightness"][half].mean())
    assert found["mixed"]["fd_mosaic"].value == pytest.approx(
        frechet_distance(cells.features["fd_mosaic"][half], cells.reference["fd_mosaic"])
    )


class Pictures(ShapesData):
    """The images of the shapes world in batches of five."""

    def images(self, count: int, batch_size: int = 5) -> Iterator[np.ndarray]:
        return super().images(count, batch_size)


def test_only_set_metrics_need_a_reference(metrics: tuple[str, ...]) -> None:
    found = Extractors(metrics, "cpu").reference(Pictures(), 12)
    assert list(found) == ["fd_mosaic"]
    np.testing.assert_array_equal(found["fd_mosaic"], mosaic(np.concatenate(list(ShapesData().images(12)))))
    assert Extractors(["brightness"], "cpu").reference(Pictures(), 12) == {}


def test_extractors_give_every_metric_a_row_for_each_image(metrics: tuple[str, ...]) -> None:
    (images,) = ShapesData().images(3)
    features = Extractors(metrics, "cpu")(images, [prompt.text for prompt in ShapesData().prompts(3)])
    assert {name: values.shape for name, values in features.items()} == {"brightness": (3, 1), "fd_mosaic": (3, 48)}
    assert isinstance(ShapesData().prompts(1)[0], Prompt)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(WrongCommand) as error:
        Extractors(["drawn_right", "fib"], "cpu")
    assert (
        str(error.value) == f"the metric 'fib' is not known; it may be one of {', '.join(METRICS)}; did you mean 'fid'?"
    )


def test_a_metric_names_missing_files_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "the weights are not here; fetch them"
    network = replace(METRICS["brightness"].network, lacks=lambda: sentence)
    lacking = replace(METRICS["brightness"], name="lacking", network=network)
    add_metric(monkeypatch, lacking)
    with pytest.raises(DdilError) as error:
        Extractors(["brightness", "lacking"], "cpu")
    assert str(error.value) == f"lacking: {sentence}" and error.value.exit_status == 1
