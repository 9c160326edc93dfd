"""The folder of a run's figures: its key is of the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddil_core.support.protocol import read_yaml, validate
from ddil_eval.experiments.covariate_shift import CovariateShiftConfig
from ddil_eval.experiments.drift_config import DriftConfig
from ddil_eval.experiments.experiments import EXPERIMENTS
from ddil_eval.experiments.image_sources import slug
from ddil_eval.experiments.inversion_config import InversionConfig
from ddil_eval.experiments.results import figures_folder

OUT = Path("results")
SHIFT = CovariateShiftConfig(student="runs/ddil")
ROW = {"systems": [{"name": "PD", "model": "runs/pd"}]}


def folder_of(config: Any, out: Path) -> Path:
    return config.figures_folder(out) if hasattr(config, "figures_folder") else figures_folder(config, out)


@pytest.mark.parametrize("name", ["covariate-shift", "drift-2", "drift-4", "drift-8", "prompt-inversion"])
def test_the_committed_folders_are_those_of_their_protocols(name: str, root: Path) -> None:
    """A new key of a configuration does not rename them, and the settings beside the figures give the folder again."""
    path = root / "protocols" / "shapes" / "tables" / f"{name}.yaml"
    content = read_yaml(path)
    config = validate(EXPERIMENTS[content["experiment"]].config, content, name)
    folder = folder_of(config, root / "results" / "shapes")
    assert list(folder.rglob("*.png"))
    beside = validate(type(config), read_yaml(folder / "protocol.yaml"), "beside the figures")
    assert folder_of(beside, OUT) == folder_of(config, OUT)


@pytest.mark.parametrize(
    "change",
    [
        *({"student": "runs/pd"}, {"teacher": "shapes-flow"}, {"guidance_scale": 3.0}, {"seed": 1}, {"drift": True}),
        {"figure_prompts": 8},
    ],
)
def test_other_settings_have_another_folder(change: dict[str, Any]) -> None:
    assert SHIFT.model_copy(update=change).figures_folder(OUT) != SHIFT.figures_folder(OUT)


@pytest.mark.parametrize("same", [{"batch_size": 2}, {"chunk": 2}, {"teacher_steps": 32}])
def test_how_it_is_computed_and_a_default_that_is_written_change_no_folder(same: dict[str, Any]) -> None:
    assert CovariateShiftConfig(student="runs/ddil", **same).figures_folder(OUT) == SHIFT.figures_folder(OUT)
    assert SHIFT.figures_folder(OUT).parent == OUT / "covariate-shift"
    assert SHIFT.figures_folder(OUT).name.startswith("ddil-")


def test_experiments_of_equal_keys_are_apart() -> None:
    drift, shift = figures_folder(DriftConfig(), OUT), figures_folder(CovariateShiftConfig(), OUT)
    assert drift.name == shift.name and (drift.parent, shift.parent) == (OUT / "drift", OUT / "covariate-shift")


def test_the_folder_of_an_inversion_does_not_depend_on_inverters_without_figures() -> None:
    """An inverter that cannot run here is left out of the run, and ``--show`` looks for the same folder."""
    alone = InversionConfig(**ROW, inverters={"ph2p": {"rounds": 8}})
    both = InversionConfig(**ROW, inverters={"ph2p": {"rounds": 8}, "pez": {}})
    other = InversionConfig(**ROW, inverters={"ph2p": {"rounds": 9}})
    assert alone.figures_folder(OUT) == both.figures_folder(OUT) != other.figures_folder(OUT)


def test_long_names_are_shortened_and_stay_apart() -> None:
    first, second = (slug("a" * 300 + end) for end in "bc")
    assert first != second and len(first) == len(second) == 129 and slug("PD, 4 steps") == "PD-4-steps"
