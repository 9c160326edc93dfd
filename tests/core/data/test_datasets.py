"""The table of data sets, and a data set that another package adds to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddil_core.data.datasets import DATASETS, list_datasets, open_data
from ddil_core.data.shapes import ShapesData
from ddil_core.support.errors import DdilError, WrongCommand
from tests.toy_data import install


def test_each_kind_has_its_row() -> None:
    assert list(DATASETS) == ["shapes", "gaussians", "coco2014", "coco2017", "folder", "webdataset"]
    assert all(kind.form.partition(":")[0] == name for name, kind in DATASETS.items())
    assert [row["name"] for row in list_datasets()] == [kind.form for kind in DATASETS.values()]
    assert isinstance(open_data("shapes"), ShapesData)


@pytest.mark.parametrize("reference", ["shapes:", "folder", "coco2014", "webdataset", ""])
def test_a_reference_in_another_form_is_refused(reference: str) -> None:
    with pytest.raises(WrongCommand, match=r"is not known: it may be one of 'shapes', 'gaussians', "):
        open_data(reference)


def test_a_data_set_of_another_package_is_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path)
    data = open_data("toy:5")
    assert data.reference == "toy:5"
    np.testing.assert_array_equal(next(data.images(2)), next(open_data("shapes").images(2)))
    with pytest.raises(WrongCommand, match=r"; did you mean 'toy:NUMBER'\?$"):
        open_data("toys:5")


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "raise OSError('no disk')")
    assert open_data("shapes").reference == "shapes"  # the project's own data sets do not need the package
    with pytest.raises(
        DdilError, match=r"^the entry point 'toy' \(toy_data:KIND\) of the group 'ddil\.datasets' cannot be"
    ):
        open_data("toy:5")
