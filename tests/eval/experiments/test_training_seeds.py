"""Rows of students of several training seeds: their mean, their absence, and how their students are sampled."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file

from ddil_core.models.generate import begin_images
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import validate
from ddil_eval.experiments import image_sources
from ddil_eval.experiments.systems import SystemsConfig, compare_systems, plan_comparison
from ddil_eval.report.records import read_records
from ddil_eval.report.tables import build
from tests.counted import Counted
from tests.pixels import NAMES

SMALL: dict[str, Any] = {"num_prompts": 7, "reference_images": 60, "metrics": NAMES, "batch_size": 4}


@pytest.fixture(scope="module", autouse=True)
def metrics(pixel_metrics: tuple[str, ...]) -> tuple[str, ...]:
    return pixel_metrics


@pytest.fixture(scope="module")
def seeds(teacher: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students of two training seeds, ``pd-0`` and ``pd-1``, and the records of a comparison that has them."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed in range(2):
        shutil.copytree(student, folder / f"pd-{seed}")
    file = folder / "pd-1" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.05 * value for name, value in load_file(file).items()}, file)
    rows = [
        *({"name": f"seed {seed}", "model": str(folder / f"pd-{seed}"), "steps": 4} for seed in range(2)),
        {"name": "PD", "model": str(folder / "pd-{training_seed}"), "training_seeds": 2, "steps": 4},
        {"name": "PD, 2 steps", "model": str(folder / "pd-{training_seed}"), "training_seeds": 2, "steps": 2},
        {"name": "teacher", "model": str(teacher), "steps": 4},
    ]
    differences = [["PD", "teacher"], ["PD, 2 steps", "PD"], ["seed 0", "teacher"], ["seed 1", "teacher"]]
    config = SystemsConfig.model_validate(SMALL | {"systems": rows, "differences": differences})
    compare_systems(config, folder / "results")
    return folder


def test_a_row_of_training_seeds_is_the_mean_of_its_students(seeds: Path) -> None:
    found = {str(record.cell["name"]): record for record in read_records(seeds / "results")}
    mean, both = found["PD"], [found["seed 0"], found["seed 1"]]
    assert mean.cell == {"kind": "system", "name": "PD", "steps": 4, "training_seeds": 2}
    assert list(mean.systems) == ["PD, training seed 0", "PD, training seed 1"]
    assert [model.reference for model in mean.systems.values()] == [str(seeds / f"pd-{seed}") for seed in range(2)]
    assert mean.nfe == both[0].nfe
    for name, metric in mean.metrics.items():
        values = [record.metrics[name].estimate.value for record in both]
        assert metric.estimate.value == pytest.approx(np.mean(values)), name
        assert metric.estimate.degrees is not None and both[0].metrics[name].estimate.degrees is None
        assert values[0] != values[1] or name == "drawn_right", name
        less = [found[f"seed {seed} − teacher"].metrics[name].estimate.value for seed in range(2)]
        difference = found["PD − teacher"].metrics[name].estimate
        assert difference.value == pytest.approx(np.mean(less), abs=1e-6), name
        assert difference.p_value is not None
    assert found["PD, 2 steps − PD"].nfe is None
    assert list(found["PD − teacher"].systems) == ["PD, training seed 0", "PD, training seed 1", "teacher"]


def test_a_table_says_how_many_training_seeds_a_row_has(seeds: Path) -> None:
    table = next(table for table in build(read_records(seeds / "results")) if table.name == "systems")
    assert [column.key for column in table.columns][:3] == ["system", "training_seeds", "steps"]
    assert [row[:3] for row in table.rows] == [
        ("seed 0", None, 4),
        ("seed 1", None, 4),
        ("PD", 2, 4),
        ("PD, 2 steps", 2, 2),
        ("teacher", None, 4),
    ]
    assert "Rows with seeds are means over students of several training seeds" in table.caption


def test_a_row_of_training_seeds_is_absent_where_one_of_them_is(seeds: Path) -> None:
    row = {"name": "PD", "model": str(seeds / "pd-{training_seed}"), "training_seeds": 3, "provide": "train it"}
    three = SystemsConfig.model_validate(SMALL | {"systems": [row]})
    assert str(plan_comparison(three).absent["PD"]) == f"the model '{seeds / 'pd-2'}' is not here; train it"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"model": "runs/pd", "training_seeds": 5},
            "the model 'runs/pd' of 'PD' has 5 training_seeds and no place for them: write {training_seed} where the "
            "seed stands, or leave training_seeds out",
        ),
        (
            {"model": "runs/pd-{training_seed}"},
            "the model 'runs/pd-{training_seed}' of 'PD' holds {training_seed}, and nothing says how many seeds there "
            "are: say training_seeds",
        ),
    ],
)
def test_training_seeds_and_reference_must_fit(row: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongCommand, match=re.escape(message)):
        validate(SystemsConfig, {"systems": [{"name": "PD"} | row]}, "p.yaml")


def change(folder: Path, file: str, **settings: object) -> None:
    """Change settings of a JSON file of a model. None takes a key away."""
    path = folder / file
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("ddil.json", {"solver": "heun"}),
        ("ddil.json", {"steps": 2}),
        ("ddil.json", {"guidance_scale": 2.0}),
        ("ddil.json", {"timesteps": [999, 600, 400, 100]}),
        ("ddil.json", {"reflection": "fold", "bounds": {"centre": [0.0] * 8, "bound": [1.0] * 8, "quantile": 0.99}}),
        ("unet/config.json", {"time_cond_proj_dim": 8}),
    ],
)
def test_students_that_are_sampled_in_different_ways_are_refused_before_any_image(
    file: str,
    settings: dict[str, object],
    student: Path,
    tmp_path: Path,
    cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The row before them would be drawn first. A guidance of 2 costs two evaluations, or one where it is an input."""
    for seed in range(3):
        shutil.copytree(student, tmp_path / f"pd-{seed}")
    if file != "ddil.json":
        for seed in range(3):
            change(tmp_path / f"pd-{seed}", "ddil.json", guidance_scale=2.0)
    change(tmp_path / "pd-2", file, **settings)
    rows = [
        {"name": "alone", "model": str(student)},
        {"name": "PD", "model": str(tmp_path / "pd-{training_seed}"), "training_seeds": 3},
    ]
    protocol = tmp_path / "systems.yaml"
    protocol.write_text(yaml.safe_dump(SMALL | {"systems": rows, "metrics": list(NAMES)}))
    drawn = Counted(of=begin_images)
    monkeypatch.setattr(image_sources, "begin_images", drawn)
    result = cli("eval", "run", protocol, "--device", "cpu", "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: the students of the row 'PD' are sampled in different ways; say its steps, solver and guidance_scale\n",
    )
    assert drawn.chunks == 0 and not (tmp_path / "out").exists()


def test_a_row_that_says_how_its_students_are_sampled_is_measured(
    seeds: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    for seed in range(2):
        shutil.copytree(seeds / f"pd-{seed}", tmp_path / f"pd-{seed}")
    change(tmp_path / "pd-1", "ddil.json", solver="heun", guidance_scale=2.0)
    row = {"name": "PD", "model": str(tmp_path / "pd-{training_seed}"), "training_seeds": 2}
    row |= {"steps": 4, "solver": "ddim", "guidance_scale": 1.0}
    protocol = tmp_path / "systems.yaml"
    protocol.write_text(yaml.safe_dump(SMALL | {"systems": [row], "metrics": ["brightness"]}))
    result = cli("eval", "run", protocol, "--device", "cpu", "--out", tmp_path / "out", "--json")
    assert (result.exit_code, json.loads(result.stdout)[0]["nfe"]) == (0, 4)
    assert result.stderr.splitlines() == [
        f"warning: PD, training seed 1: '{row['model']}' was made for the solver 'heun', not 'ddim': say --solver heun",
        f"warning: PD, training seed 1: '{row['model']}' was made for guidance 2, not 1: say --guidance 2",
        "PD: 4 steps of ddim, guidance 1",
    ]


def test_what_holds_for_all_students_of_a_row_is_said_once(
    teacher: Path, seeds: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """Teachers without ddil.json name no guidance scale."""
    for seed in range(3):
        shutil.copytree(teacher, tmp_path / f"raw-{seed}")
        (tmp_path / f"raw-{seed}" / "ddil.json").unlink()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["a small red circle"] * 4 + ["red " * 100]))
    model = str(tmp_path / "raw-{training_seed}")
    rows = [
        {"name": "PD", "model": str(seeds / "pd-{training_seed}"), "training_seeds": 2, "steps": 2},
        {"name": "raw", "model": model, "training_seeds": 3, "steps": 1},
    ]
    protocol = tmp_path / "systems.yaml"
    few = {"num_prompts": 5, "prompts": str(prompts), "metrics": ["brightness"]}
    protocol.write_text(yaml.safe_dump(SMALL | few | {"systems": rows}))
    result = cli("eval", "run", protocol, "--device", "cpu", "--out", tmp_path / "out", "--json")
    cut = "1 of 5 prompts are longer than the text encoder takes; the rest of each is not read"
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines() == [
        f"warning: PD: '{rows[0]['model']}' was made for 4 steps, not 2: say --steps 4",
        f"warning: PD: {cut}",
        "PD: 2 steps of ddim, guidance 1",
        f"warning: raw: '{model}' names no guidance scale, so that diffusers' default 7.5 is assumed; say another with "
        "--guidance or with guidance_scale in a protocol",
        f"warning: raw: {cut}",
        "raw: 1 step of ddim, guidance 7.5",
    ]
