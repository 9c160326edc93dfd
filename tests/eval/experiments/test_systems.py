"""Systems side by side: each as it samples by itself, their differences paired by prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddil_core.data.datasets import open_data
from ddil_core.data.shapes import ShapesData
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.schedule import timestep_grid
from ddil_core.models.generate import begin_images, resolve_sampling
from ddil_core.models.model import load_model
from ddil_core.support import ranks
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.protocol import validate
from ddil_eval.experiments import image_sources, rows
from ddil_eval.experiments.engine import leaders
from ddil_eval.experiments.system_configs import image_origin
from ddil_eval.experiments.systems import SystemsConfig, compare_systems, measure_comparison, plan_comparison
from ddil_eval.features.reference_features import content_sha256
from ddil_eval.report.records import Record, read_records
from ddil_eval.report.tables import build
from ddil_eval.statistics import Estimate
from tests.counted import Counted
from tests.pipelines import plain_picture, plain_step
from tests.pixels import NAMES

PROMPTS = 7


@pytest.fixture(scope="module", autouse=True)
def metrics(pixel_metrics: tuple[str, ...]) -> tuple[str, ...]:
    return pixel_metrics


@pytest.fixture(scope="module")
def config(teacher: Path, student: Path) -> SystemsConfig:
    return SystemsConfig.model_validate(
        {
            "systems": [
                {"name": "teacher, 6 steps", "model": str(teacher), "steps": 6},
                {"name": "teacher, 4 steps", "model": str(teacher), "steps": 4, "guidance_scale": 1.0},
                {"name": "student", "model": str(student), "steps": 4, "reflection": "none"},
            ],
            "differences": [["student", "teacher, 6 steps"]],
            "num_prompts": PROMPTS,
            "reference_images": 60,
            "metrics": NAMES,
            "batch_size": 4,
        }
    )


@pytest.fixture(scope="module")
def out(config: SystemsConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("systems")
    compare_systems(config, folder)
    return folder


@pytest.fixture(scope="module")
def records(out: Path) -> dict[str, Record]:
    return {str(record.cell["name"]): record for record in read_records(out)}


def test_every_system_and_difference_has_its_record(records: dict[str, Record], config: SystemsConfig) -> None:
    kinds = {name: record.kind for name, record in records.items()}
    assert {name: kind for name, kind in kinds.items() if kind != "pair"} == {
        "teacher, 6 steps": "system",
        "teacher, 4 steps": "system",
        "student": "system",
        "student − teacher, 6 steps": "difference",
    }
    settings = {name: (r.nfe, r.guidance_scale, r.grid) for name, r in records.items() if r.kind == "system"}
    assert settings == {
        "teacher, 6 steps": (12, 3.0, timestep_grid(6)),
        "teacher, 4 steps": (4, 1.0, timestep_grid(4)),
        "student": (4, 1.0, timestep_grid(4)),
    }
    for record in records.values():
        assert list(record.systems) == (record.cell.get("of") or [record.cell["name"]])
    assert {(record.experiment, record.n_done, record.recipe) for record in records.values()} == {
        ("systems", PROMPTS, "shapes (7 → 60)")
    }
    assert all(record.protocol["recipe"]["crop"] == "none" for record in records.values())  # type: ignore[index, call-overload]


def test_a_row_says_how_it_reflects(student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    told = json.loads((student / "ddil.json").read_text())
    bounds = {"centre": [0.0] * 8, "bound": [0.5] * 8, "quantile": 0.9995}
    (folder / "ddil.json").write_text(json.dumps(told | {"bounds": bounds}))
    model = load_model(str(folder))
    assert image_origin(model, resolve_sampling(model, reflection="fold"), 0).reflection == "fold"
    assert image_origin(model, resolve_sampling(model), 0).reflection == "none"


def test_a_record_holds_the_hash_of_its_reference_images(
    records: dict[str, Record], config: SystemsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set draws other images here; the row goes to another table."""
    assert {r.data["reference_sha256"] for r in records.values()} == {content_sha256(ShapesData(), 60)}
    one = config.model_copy(update={"systems": config.systems[2:], "differences": ()})
    alone = config.model_copy(update={"systems": one.systems, "differences": (), "metrics": ("brightness",)})
    (scored,) = compare_systems(alone, tmp_path)
    assert "reference_sha256" not in scored.data
    drawn = ShapesData.images
    monkeypatch.setattr(ShapesData, "images", lambda *args: (255 - images for images in drawn(*args)))
    (other,) = compare_systems(one, tmp_path)
    assert other.identity() != records["student"].identity()
    assert [table.name for table in build([records["student"], other])].count("systems") == 2


def test_the_two_best_systems_have_their_difference(records: dict[str, Record]) -> None:
    """Each metric has the paired difference of its two best systems, asked for or not."""
    systems = {name: record for name, record in records.items() if record.kind == "system"}
    differences = [frozenset(map(str, r.cell["of"])) for r in records.values() if r.kind != "system"]  # type: ignore[arg-type]
    for metric, sign in (("brightness", -1), ("fd_mosaic", 1)):
        order = sorted(systems, key=lambda name: sign * systems[name].metrics[metric].estimate.value)
        assert frozenset(order[:2]) in differences
    assert len(differences) == len(set(differences)) <= 3
    assert all(r.metrics[m].estimate.p_value is not None for r in records.values() if r.kind != "system" for m in NAMES)


def test_leaders_follow_the_direction() -> None:
    def found(brightness: float, distance: float) -> dict[str, Estimate]:
        values = {"brightness": brightness, "fd_mosaic": distance}
        return {name: Estimate(value, value, value, 9) for name, value in values.items()}

    cells = {"a": found(0.9, 3.0), "b": found(0.8, 2.0), "c": found(0.1, 1.0)}
    assert leaders(cells) == {frozenset("ab"), frozenset("bc")}


@pytest.mark.parametrize(("name", "steps", "scale"), [("teacher, 6 steps", 6, 3.0), ("student", 4, 1.0)])
def test_a_system_has_the_numbers_of_its_model_alone(
    name: str, steps: int, scale: float, records: dict[str, Record], teacher: Path, student: Path
) -> None:
    pipeline: Any = load_model(str(student if name == "student" else teacher)).pipeline
    found = []
    for prompt in open_data("shapes").prompts(PROMPTS):
        z = initial_noise([Sample(prompt.id)], (8, 8, 8), 0)
        for t, s in zip(timestep_grid(steps), [*timestep_grid(steps)[1:], None], strict=True):
            z = plain_step(pipeline, z, prompt.text, t, s, scale)
        found.append(plain_picture(pipeline, z).mean().item())
    assert records[name].metrics["brightness"].estimate.value == pytest.approx(np.mean(found), abs=2e-5)


def test_a_difference_is_the_first_less_the_second(records: dict[str, Record]) -> None:
    difference = records["student − teacher, 6 steps"]
    for name in NAMES:
        a, b = (records[system].metrics[name].estimate.value for system in ("student", "teacher, 6 steps"))
        estimate = difference.metrics[name].estimate
        assert estimate.value == pytest.approx(a - b, abs=1e-9)
        assert estimate.low <= estimate.value <= estimate.high
        assert difference.metrics[name].direction == records["student"].metrics[name].direction


def test_records_become_a_table_of_systems_and_one_of_differences(records: dict[str, Record]) -> None:
    tables = {table.name: table for table in build(records.values())}
    assert [row[0] for row in tables["systems"].rows] == ["teacher, 6 steps", "teacher, 4 steps", "student"]
    assert [row[0] for row in tables["differences"].rows] == ["student − teacher, 6 steps"]


def test_a_finished_run_adds_nothing_when_repeated(out: Path, config: SystemsConfig) -> None:
    before = sorted((out / "records").iterdir())
    compare_systems(config, out)
    assert sorted((out / "records").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"differences": [["student", "nobody"]]},
            "x.yaml has a value that does not fit: the differences name 'nobody', which is none of the systems student",
        ),
        (
            {"systems": [{"name": "student", "model": "shapes", "steps": 4}] * 2},
            "x.yaml has a value that does not fit: two systems are named 'student'",
        ),
        (
            {"systems": [{"name": name, "model": "shapes"} for name in ("A", "B", "A − B")]},
            "x.yaml has a value that does not fit: the system 'A − B' is named like the difference of two others; rename it",
        ),
        (
            {"systems": [{"name": "student", "model": "shapes", "steps": 4, "paper": "SD"}]},
            "x.yaml has a value that does not fit: the paper's Table 1 has no row 'SD' of 4 steps",
        ),
        (
            {"systems": [{"name": "student", "model": "shapes", "steps": 0}]},
            "x.yaml has a value that does not fit at 'systems.0.steps': "
            "it takes a whole number of at least 1 (or null), not 0",
        ),
        (
            {"seed": -1},
            "x.yaml has a value that does not fit at 'seed': it takes a whole number of at least 0, not -1",
        ),
        ({"sytems": []}, "x.yaml has the unknown key 'sytems'; did you mean 'systems'?"),
    ],
)
def test_an_impossible_comparison_is_refused(change: dict[str, Any], sentence: str) -> None:
    content: dict[str, Any] = {"systems": [{"name": "student", "model": "shapes", "steps": 4}]}
    with pytest.raises(WrongCommand) as error:
        validate(SystemsConfig, content | change, "x.yaml")
    assert str(error.value) == sentence


def test_an_interrupted_comparison_continues_at_the_next_batch(
    config: SystemsConfig, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_sources, "begin_images", Counted(allowed=3, of=begin_images))
    with pytest.raises(KeyboardInterrupt):
        compare_systems(config, tmp_path)
    assert read_records(tmp_path) == [] and len(list(tmp_path.rglob("*.npz"))) == 3
    rest = Counted(of=begin_images)
    monkeypatch.setattr(image_sources, "begin_images", rest)
    compare_systems(config, tmp_path)
    assert rest.chunks == 3  # three systems of two batches each, of which three were done
    assert {r.identity(): r.numbers() for r in read_records(tmp_path)} == {
        r.identity(): r.numbers() for r in read_records(out)
    }
    assert list(tmp_path.rglob("*.npz")) == []


def test_an_interrupted_comparison_ignores_batches_of_other_settings(
    config: SystemsConfig, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of another size, or with other captions under the same ids, are other files."""
    prompts = tmp_path / "mine.jsonl"
    rows = [json.dumps({"id": p.id, "prompt": "a large blue square"}) for p in open_data("shapes").prompts(PROMPTS)]
    prompts.write_text("\n".join(rows))
    monkeypatch.setattr(image_sources, "begin_images", Counted(allowed=1, of=begin_images))
    for change in ({"prompts": str(prompts)}, {"batch_size": 2}):
        with pytest.raises(KeyboardInterrupt):
            compare_systems(config.model_copy(update=change), tmp_path)
        monkeypatch.setattr(image_sources, "begin_images", Counted(allowed=1, of=begin_images))
    prompts.write_text("\n".join(rows).replace("blue", "red"))
    rest = Counted(of=begin_images)
    monkeypatch.setattr(image_sources, "begin_images", rest)
    compare_systems(config.model_copy(update={"prompts": str(prompts)}), tmp_path)
    compare_systems(config, tmp_path)
    assert rest.chunks == 12
    assert {r.identity() for r in read_records(out)} < {r.identity() for r in read_records(tmp_path)}
    mine = {r.identity(): r.numbers() for r in read_records(tmp_path)}
    assert all(mine[r.identity()] == r.numbers() for r in read_records(out))


def counted_draws(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(of=begin_images)
    monkeypatch.setattr(image_sources, "begin_images", counted)
    return counted


def numbers(out: Path) -> dict[str, dict[str, Any]]:
    return {record.identity(): record.numbers() for record in read_records(out)}


BATCHES = 2
"""Seven prompts, four at a time."""


def test_an_added_system_is_the_only_one_drawn(
    config: SystemsConfig, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its paired differences equal those of a table that was measured in one run."""
    compare_systems(config.model_copy(update={"systems": config.systems[:2], "differences": ()}), tmp_path)
    before = read_records(tmp_path)
    counted = counted_draws(monkeypatch)
    compare_systems(config, tmp_path)
    assert counted.chunks == BATCHES
    assert numbers(out).items() <= numbers(tmp_path).items()
    assert all(record in read_records(tmp_path) for record in before)
    assert not (tmp_path / "partial").exists()


def test_a_row_of_other_code_is_drawn_again(
    config: SystemsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = config.model_copy(update={"systems": config.systems[2:], "differences": ()})
    compare_systems(one, tmp_path)
    counted = counted_draws(monkeypatch)
    compare_systems(one.model_copy(update={"reference_images": 20}), tmp_path)
    assert counted.chunks == 0  # features of a row know no reference
    monkeypatch.setattr(rows, "code_sha256", lambda: "other")
    compare_systems(one, tmp_path)
    assert counted.chunks == BATCHES
    keys = [json.loads(path.read_text()) for path in tmp_path.rglob("key.json")]
    assert [key["name"] for key in keys] == ["student"] * 2 and keys[0]["made"] == keys[1]["made"]


def test_rows_whose_images_would_share_a_folder_are_refused(config: SystemsConfig, tmp_path: Path) -> None:
    row = config.systems[2]
    alike = tuple(row.model_copy(update={"name": name}) for name in ("a/b", "a-b"))
    config = config.model_copy(update={"systems": alike, "differences": ()})
    with pytest.raises(WrongCommand, match=r"'a/b' and 'a-b' would share the folder images/a-b; give the rows names"):
        compare_systems(config, tmp_path, save_images=True)
    assert not (tmp_path / "images").exists()


def test_a_row_is_drawn_again_when_its_images_are_missing(
    config: SystemsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = config.model_copy(update={"systems": config.systems[2:], "differences": ()})
    compare_systems(one, tmp_path)
    counted = counted_draws(monkeypatch)
    compare_systems(one, tmp_path, save_images=True)
    assert counted.chunks == BATCHES
    compare_systems(one, tmp_path, save_images=True)
    assert counted.chunks == BATCHES
    (tmp_path / "images" / "student" / "000005.png").unlink()
    compare_systems(one, tmp_path, save_images=True)
    assert counted.chunks == BATCHES + 1 and len(read_records(tmp_path)) == 1
    assert (tmp_path / "images" / "student" / "000005.png").is_file()


def test_damaged_features_are_reported_in_one_sentence(config: SystemsConfig, tmp_path: Path) -> None:
    one = config.model_copy(update={"systems": config.systems[2:], "differences": ()})
    compare_systems(one, tmp_path)
    file = next(tmp_path.rglob("fd_mosaic.npy"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DdilError) as error:
        compare_systems(one, tmp_path)
    assert str(error.value) == (
        f"the file of the stored features of 'student' {file} does not match its checksum fd_mosaic.npy.sha256, so one "
        "of the two was damaged or changed after it was written; delete the file to compute them again"
    )


def test_a_missing_batch_is_named(config: SystemsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process writes to a folder on another machine."""
    for wait in ("meet", "barrier"):
        monkeypatch.setattr(ranks, wait, lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DdilError) as error:
        compare_systems(config.model_copy(update={"systems": config.systems[2:], "differences": ()}), tmp_path)
    (folder,) = (tmp_path / "partial").iterdir()
    assert str(error.value) == (
        f"1 of 2 batches of 'student' are not in {folder}; --out must be one folder for all processes"
    )


def test_a_row_takes_its_models_sampling_unless_it_sets_its_own(teacher: Path, student: Path, tmp_path: Path) -> None:
    own = {"name": "own", "model": str(student)}
    other = {"name": "other", "model": str(student), "steps": 2, "solver": "dpmpp_2m", "guidance_scale": 2.0}
    twice = {"name": "twice", "model": str(student), "steps": 2, "solver": "heun"}
    config = {"systems": [own, other, twice], "num_prompts": 4, "reference_images": 8, "metrics": ["brightness"]}
    records = compare_systems(SystemsConfig.model_validate(config), tmp_path)
    assert [(r.solver, r.grid, r.guidance_scale, r.nfe) for r in records if r.kind == "system"] == [
        ("ddim", timestep_grid(4), 1.0, 4.0), ("dpmpp_2m", timestep_grid(2), 2.0, 4.0),
        ("heun", timestep_grid(2), 1.0, 3.0),
    ]  # fmt: skip


def test_missing_parts_are_named_and_the_rest_is_measured(student: Path, tmp_path: Path) -> None:
    rows = [
        {"name": "here", "model": str(student)},
        {"name": "distilled", "model": str(tmp_path / "run"), "provide": "distil it with: ddil distill …"},
        {"name": "named", "model": "no/where"},
    ]
    config = SystemsConfig.model_validate(
        {"systems": rows, "differences": [["here", "named"]], "num_prompts": 4, "reference_images": 8,
         "metrics": ["brightness"]}
    )  # fmt: skip
    found = plan_comparison(config)
    assert list(found.absent) == ["distilled", "named"]
    assert (
        str(found.absent["distilled"]) == f"the model '{tmp_path / 'run'}' is not here; distil it with: ddil distill …"
    )
    assert str(found.absent["named"]).startswith("the model 'no/where' ")
    records = measure_comparison(found, tmp_path / "out")
    assert [record.cell["name"] for record in records] == ["here"]
    (table,) = build(records)
    assert table.missing == ("distilled: no record", "named: no record")
    assert [row[0] for row in table.rows] == ["here", "distilled", "named"]


def test_a_protocol_continued_with_more_rows_is_one_table(student: Path, teacher: Path, tmp_path: Path) -> None:
    """The numbers of a row do not depend on other rows, so rows measured one by one make one table."""
    shared = {"num_prompts": 4, "reference_images": 8, "metrics": ["brightness"]}
    for model in (student, teacher):
        row = {"name": model.parent.name, "model": str(model), "steps": 2}
        compare_systems(SystemsConfig.model_validate({"systems": [row], **shared}), tmp_path)
    (table,) = build(read_records(tmp_path))
    assert len(table.rows) == 2
