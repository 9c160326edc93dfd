"""``pool: all``: all images of a folder. The run keeps their number, so that it is the run of that number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from PIL import Image

from ddil_core.data.datasets import open_data
from ddil_core.distillation.checks import pool_size
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.distill import distill
from ddil_core.support.errors import WrongCommand
from ddil_core.support.misfits import value_text
from ddil_core.support.protocol import validate
from tests.coco import photograph
from tests.shards import save_shards

CONFIG = {"stages": [{"steps": 2, "updates": 2}], "batch_size": 4, "warmup": 1}


def save_photographs(folder: Path, count: int) -> str:
    folder.mkdir(exist_ok=True)
    for place in range(count):
        Image.fromarray(photograph(place)).save(folder / f"{place}.png")
        (folder / f"{place}.txt").write_text(f"photograph {place}")
    return f"folder:{folder}"


def test_all_is_the_number_of_the_images(folder: Path, tmp_path: Path) -> None:
    data = save_photographs(tmp_path / "photos", 6)
    config = validate(ProgressiveConfig, CONFIG | {"pool": "all"}, "the test")
    out = tmp_path / "run"
    student = distill(str(folder), data, config, out, device="cpu")
    assert yaml.safe_load((out / "run.yaml").read_text())["config"]["pool"] == 6
    same = validate(ProgressiveConfig, CONFIG | {"pool": 6}, "the test")
    assert distill(str(folder), data, same, out, device="cpu", resume=True) == student
    save_photographs(tmp_path / "photos", 7)
    with pytest.raises(WrongCommand, match="holds another run .*pool is 6 there"):
        distill(str(folder), data, config, out, device="cpu", resume=True)


def test_a_number_stays_a_number(tmp_path: Path) -> None:
    data = open_data(save_photographs(tmp_path / "photos", 5))
    assert pool_size(3, data) == 3 and pool_size("all", data) == 5


def test_data_without_a_known_number_are_refused(tmp_path: Path) -> None:
    for reference in ("shapes", save_shards(tmp_path)):
        with pytest.raises(WrongCommand) as error:
            pool_size("all", open_data(reference))
        assert str(error.value) == (
            f"pool: all takes all images of a folder or of COCO, and {reference!r} does not say how many it has; give a "
            "number, as in --set pool=16384"
        )


@pytest.mark.parametrize("value", ["none", 0, -1, 1.5, True, None])
def test_a_pool_is_a_number_or_all(value: object) -> None:
    with pytest.raises(WrongCommand) as error:
        validate(ProgressiveConfig, CONFIG | {"pool": value}, "a.yaml")
    assert str(error.value) == (
        "a.yaml has a value that does not fit at 'pool': it takes a whole number of at least 1 or 'all', not "
        f"{value_text(value)}"
    )


def test_the_largest_count_still_holds() -> None:
    with pytest.raises(WrongCommand, match="pool is at most 100,000,000, not 100,000,001"):
        validate(ProgressiveConfig, CONFIG | {"pool": 100_000_001}, "a.yaml")


def test_the_command_takes_it(cli: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    result = cli("distill", "--teacher", folder, "--data", "shapes", "--set", "pool=all", "--device", "cpu", "--out",
                 tmp_path / "run")  # fmt: skip
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(
        "error: pool: all takes all images of a folder or of COCO, and 'shapes'"
    )
