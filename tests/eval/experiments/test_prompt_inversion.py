"""Prompt inversion from a protocol to Table 5 on tiny pipelines: measured, stopped and continued, refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from ddil_core.data.datasets import open_data
from ddil_core.diffusion.noise import Sample
from ddil_core.inversion import INVERTERS, Inverter, ph2p
from ddil_core.inversion.ph2p import PH2PSettings
from ddil_core.inversion.towers import load_inversion_towers
from ddil_core.models.generate import resolve_sampling, sample_images
from ddil_core.models.model import load_model
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import content_hash, read_yaml, validate
from ddil_core.support.registry import Registry
from ddil_eval.cli import ddil
from ddil_eval.experiments.caption_recall import caption_recall
from ddil_eval.experiments.gallery import mean_to_first
from ddil_eval.experiments.inversion_config import InversionConfig
from ddil_eval.experiments.inversion_records import NOT_HASHED
from ddil_eval.experiments.prompt_inversion import measure_inversion, plan_inversion
from ddil_eval.experiments.results import hashed
from ddil_eval.features.extraction import Extractors
from ddil_eval.report.records import Record, read_records
from ddil_eval.report.strips import read_strips
from ddil_eval.report.tables import build
from tests.pipelines import save_pipeline

IMAGES, NUMBER = 5, 3


@pytest.fixture(scope="module")
def config(teacher: Path, student: Path) -> InversionConfig:
    return InversionConfig.model_validate(
        {
            "teacher": str(teacher),
            "inverters": {
                "ph2p": {"tokens": 6, "rounds": 2, "evaluations": 2, "candidates": 2, "radius": 4.0},
                "random": {"tokens": 6},
            },
            "systems": [
                {"name": "teacher", "model": str(teacher), "steps": 3, "paper": None},
                {"name": "student", "model": str(student), "paper": "DDIL", "steps": 4},
                {"name": "elsewhere", "model": "nowhere/at-all", "provide": "make it", "paper": "SD", "steps": 32},
            ],
            "differences": [["student", "teacher"], ["elsewhere", "teacher"]],
            "num_images": IMAGES,
            "images_per_prompt": NUMBER,
            "choosing_steps": 2,
            "lpips": "lpips_efflite0",
            "batch_size": 2,
            "draw_batch_size": 6,
            "figures": 2,
        }
    )


@pytest.fixture(scope="module")
def out(config: InversionConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inversion")
    measure_inversion(plan_inversion(config), folder)
    return folder


@pytest.fixture(scope="module")
def records(out: Path) -> dict[tuple[str, str], Record]:
    return {(record.kind, str(record.cell["name"])): record for record in read_records(out)}


def kept(out: Path, inverter: str) -> dict[str, str]:
    found = [json.loads(path.read_text()) for path in sorted((out / "inversions").glob(f"{inverter}-*/*.json"))]
    return {one["id"]: one["prompt"] for one in found}


def test_a_newer_key_of_the_protocol_changes_no_older_hash(
    records: dict[tuple[str, str], Record], config: InversionConfig
) -> None:
    protocol = records["system", "teacher"].protocol
    assert "guidance_scale" not in protocol
    assert records["system", "teacher"].protocol_hash == content_hash(hashed(protocol, NOT_HASHED))
    assert set(config.model_dump(mode="json")) - set(protocol) == {"guidance_scale"}
    assert set(protocol) - set(config.model_dump(mode="json")) == {"sampling"} <= NOT_HASHED


def test_every_system_inverter_and_difference_has_its_record(records: dict[tuple[str, str], Record]) -> None:
    assert set(records) == {
        ("system", "teacher"),
        ("system", "student"),
        ("difference", "student − teacher"),
        ("inverter", "ph2p"),
        ("inverter", "random"),
        ("inverter-difference", "ph2p − random"),
    }
    student = records["system", "student"]
    assert (student.cell["steps"], student.nfe, student.cell["paper"]) == (4, 4, "DDIL")
    assert list(student.metrics) == ["lpips_efflite0", "lpips_efflite0_to_reference", "clip_image_shapes"]
    assert [metric.direction for metric in student.metrics.values()] == ["higher", "lower", "higher"]
    assert all(metric.estimate.n == IMAGES for metric in student.metrics.values())
    assert student.metrics["lpips_efflite0"].network["name"] == "lpips_efflite0"  # type: ignore[index]
    assert student.metrics["clip_image_shapes"].network["weights"]  # type: ignore[index]
    assert (student.data["size"], student.data["pictures_per_prompt"]) == (64, NUMBER)
    assert {"recovered", "recovered_shapes", "recovered_relation"} <= set(records["inverter", "ph2p"].metrics)


def test_a_systems_numbers_are_those_of_its_images(
    records: dict[tuple[str, str], Record], out: Path, student: Path, config: InversionConfig
) -> None:
    """The images are drawn and measured here, prompt by prompt."""
    model, towers = load_model(str(student)), load_inversion_towers("shapes")
    distance = Extractors(["lpips_efflite0"], "cpu")
    references = next(open_data("shapes").images(IMAGES))
    scores = []
    for reference, (name, prompt) in zip(references, kept(out, "ph2p").items(), strict=True):
        samples = [Sample(name, number) for number in range(NUMBER)]
        pictures = sample_images(model, samples, [prompt] * NUMBER, resolve_sampling(model, 4), config.seed)
        pairs = [
            distance.groups(np.stack([a, b])[None], [""])["lpips_efflite0"]
            for a, b in itertools.combinations(pictures, 2)
        ]
        to = [distance.groups(np.stack([reference, one])[None], [""])["lpips_efflite0"] for one in pictures]
        alike = towers.similarity(pictures, np.stack([reference] * NUMBER))
        scores.append([np.mean(pairs), np.mean(to), alike.mean()])
    found = [metric.estimate.value for metric in records["system", "student"].metrics.values()]
    assert found == pytest.approx(np.mean(scores, axis=0).tolist(), rel=1e-3)


def test_a_difference_is_the_first_less_the_second(records: dict[tuple[str, str], Record]) -> None:
    for kind, one, other in (("system", "student", "teacher"), ("inverter", "ph2p", "random")):
        record = records["difference" if kind == "system" else "inverter-difference", f"{one} − {other}"]
        for name, metric in record.metrics.items():
            a, b = (records[kind, which].metrics[name].estimate.value for which in (one, other))
            assert metric.estimate.value == pytest.approx(a - b, abs=1e-9)
            assert metric.estimate.p_value is not None


def test_caption_recall_is_counted_in_the_kept_prompts(records: dict[tuple[str, str], Record], out: Path) -> None:
    captions = {prompt.id: prompt.text for prompt in open_data("shapes").prompts(IMAGES)}
    for name in ("ph2p", "random"):
        shares = [caption_recall(captions[one], prompt)["all"] for one, prompt in kept(out, name).items()]
        assert len(shares) == IMAGES
        assert records["inverter", name].metrics["recovered"].estimate.value == pytest.approx(np.mean(shares))


def test_there_is_a_figure_of_each_image_asked_for(out: Path) -> None:
    files = sorted(out.glob("prompt-inversion/*/inverted/*"))
    assert [file.stem for file in files] == ["0000-shapes-validation-00000", "0001-shapes-validation-00001"]
    with Image.open(files[0]) as picture:
        assert picture.width > 3 * 128


def test_the_report_finds_the_images_and_scores_of_each_image_asked_for(
    out: Path, records: dict[tuple[str, str], Record]
) -> None:
    (folder,) = out.glob("prompt-inversion/*/strips/inverted")
    strips = read_strips(folder)
    assert [strip.id for strip in strips] == ["shapes-validation-00000", "shapes-validation-00001"]
    assert {strip.prompt for strip in strips} <= set(kept(out, "ph2p").values())
    first, *drawn = strips[0].columns
    assert first == "reference" and all(("system", name) in records for name in drawn)
    scores = strips[0].scores["clip_image_shapes"]
    assert scores[0] is None and all(isinstance(score, float) for score in scores[1:])
    with Image.open(folder / strips[0].file) as strip:
        assert strip.width == strip.height * len(strips[0].columns)


def test_table_5_has_the_papers_numbers_and_names_missing_rows(
    records: dict[tuple[str, str], Record],
) -> None:
    tables = {table.name: table for table in build(records.values())}
    assert set(tables) == {"table5", "differences", "inverters", "inverter-differences"}
    table = tables["table5"]
    assert [(row[0], row[1], None if row[-1] is None else float(row[-1])) for row in table.rows] == [  # type: ignore[arg-type]
        ("teacher", 3, None),
        ("student", 4, 0.60),
        ("elsewhere", 32, 0.63),
    ]
    assert table.missing == ("elsewhere: no record",)
    assert [row[0] for row in tables["inverters"].rows] == ["ph2p", "random"]


def test_a_stopped_inversion_continues_at_the_next_image(
    config: InversionConfig, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, precisions = [], set[str]()

    def counted(problem: Any, chosen: Any, advance: Callable[[], None]) -> Any:
        if len(runs) == 1:
            raise KeyboardInterrupt
        runs.append(problem.ids)
        precisions.add(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
        return ph2p.ph2p(problem, chosen, advance)

    row = ph2p.PH2P
    stopped = replace(row, run=counted)
    with monkeypatch.context() as patch:
        others = [inverter for inverter in INVERTERS.values() if inverter.name != row.name]
        table = Registry("inverter", "ddil.inverters", Inverter, [stopped, *others])
        patch.setattr("ddil_core.inversion.inverters.INVERTERS", table)
        with pytest.raises(KeyboardInterrupt):
            measure_inversion(plan_inversion(config), tmp_path)
    assert precisions == {"ieee"}  # no TF32 on a GPU
    done = kept(tmp_path, "ph2p")
    assert len(done) == 2 and read_records(tmp_path) == []
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
    measure_inversion(plan_inversion(config), tmp_path)
    assert kept(tmp_path, "ph2p") == kept(out, "ph2p")
    assert {r.identity(): r.numbers() for r in read_records(tmp_path)} == {
        r.identity(): r.numbers() for r in read_records(out)
    }


def test_a_finished_run_adds_nothing_when_repeated(config: InversionConfig, out: Path) -> None:
    before = sorted(path for path in out.rglob("*") if path.suffix == ".json")
    other = out / "partial" / "other" / "000000.npz"  # of an analysis that was stopped in the same folder
    other.parent.mkdir(parents=True)
    other.touch()
    measure_inversion(plan_inversion(config), out)
    assert [path for path in (out / "partial").rglob("*") if path.is_file()] == [other]
    shutil.rmtree(out / "partial")
    assert sorted(path for path in out.rglob("*") if path.suffix == ".json") == before


def test_a_record_holds_the_defaults_of_its_settings(
    config: InversionConfig, out: Path, records: dict[tuple[str, str], Record], tmp_path: Path
) -> None:
    """A record of another default, or from before a setting existed, is then another measurement."""
    told = records["inverter", "ph2p"].protocol["inverters"]
    assert told["ph2p"] == PH2PSettings(**config.inverters["ph2p"]).model_dump()  # type: ignore[call-overload, index]
    assert told["ph2p"]["judging"] == 8  # type: ignore[call-overload, index]
    explicit = {name: settings | {"tokens": 6} for name, settings in config.inverters.items()}
    explicit["ph2p"] |= {"judging": 8}
    shutil.copytree(out / "inversions", tmp_path / "inversions")
    measure_inversion(
        plan_inversion(config.model_copy(update={"inverters": explicit, "systems": config.systems[:1]})), tmp_path
    )
    again = {(record.kind, str(record.cell["name"])): record for record in read_records(tmp_path)}
    assert again["inverter", "ph2p"].identity() == records["inverter", "ph2p"].identity()


def test_prompts_of_other_settings_are_not_read_back(config: InversionConfig, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "inversions", tmp_path / "inversions")
    other = {"ph2p": config.inverters["ph2p"] | {"judging": 3}}
    change = {"inverters": other, "systems": config.systems[:1], "differences": (), "num_images": 2, "figures": 0}
    measure_inversion(plan_inversion(config.model_copy(update=change)), tmp_path)
    assert len([one for one in (tmp_path / "inversions").iterdir() if one.name.startswith("ph2p-")]) == 2


def test_images_of_a_folder_need_no_captions(config: InversionConfig, tmp_path: Path) -> None:
    """Images of any size are cropped to their middle square and resized to the teacher's size."""
    (tmp_path / "in").mkdir()
    for number, image in enumerate(next(open_data("shapes").images(2))):
        Image.fromarray(image).resize((96, 80)).save(tmp_path / "in" / f"{number}.png")
    change = {
        "data": f"folder:{tmp_path / 'in'}",
        "towers": "shapes",
        "num_images": 2,
        "figures": 0,
        "systems": config.systems[:1],
    }
    change |= {"differences": (), "vocabulary": "words", "inverters": {"random": {"tokens": 4}}, "inverter": "random"}
    measure_inversion(plan_inversion(config.model_copy(update=change)), tmp_path / "out")
    found = {(r.kind, str(r.cell["name"])): r for r in read_records(tmp_path / "out")}
    assert set(found) == {("system", "teacher"), ("inverter", "random")}
    assert "recovered" not in found["inverter", "random"].metrics
    assert set(kept(tmp_path / "out", "random")) == {"0", "1"}


def test_the_mean_distance_to_one_more_image_follows_from_two_means() -> None:
    distances = np.random.default_rng(0).random((6, 6))
    distances = distances + distances.T
    together = np.mean([distances[a, b] for a, b in itertools.combinations(range(6), 2)])
    among = np.mean([distances[a, b] for a, b in itertools.combinations(range(1, 6), 2)])
    assert mean_to_first(together, among, 5) == pytest.approx(distances[0, 1:].mean())


CAPTION = "a small red circle left of a large red star on a grey background"


@pytest.mark.parametrize(
    ("prompt", "shares"),
    [
        (CAPTION, (1, 1, 1, 1, 1)),
        ("grey star red right", (0.5, 0.5, 0, 0, 1)),  # red is stated twice
        ("of large small left red moon red", (0, 1, 1, 1, 0)),
        ("a large red star right of a small red circle on a navy background", (1, 1, 1, 1, 0)),  # the other way round
        ("a small red circle right of a large red star on a navy background", (1, 1, 1, 0, 0)),
        ("large red star right of small red circle", (1, 1, 1, 0, 0)),  # no caption
        ("", (0, 0, 0, 0, 0)),
    ],
)
def test_recalled_words_count_as_often_as_the_caption_states_them(prompt: str, shares: tuple[float, ...]) -> None:
    found = caption_recall(CAPTION, prompt)
    names = ("shapes", "colours", "sizes", "relation", "background")
    assert tuple(found[name] for name in names) == shares
    assert found["all"] == pytest.approx(np.dot(shares, (2, 2, 2, 1, 1)) / 8)


# What is not here, and what is refused


def run(*arguments: object) -> Result:
    return CliRunner().invoke(ddil, [str(one) for one in arguments], catch_exceptions=False)


def test_the_papers_table_names_missing_parts_row_by_row(root: Path, tmp_path: Path) -> None:
    result = run("eval", "run", root / "protocols" / "paper" / "table5.yaml", "--out", tmp_path)
    assert result.exit_code == 1
    named = [line.split(": ")[1] for line in result.stderr.splitlines() if line.startswith("not here: ")]
    rows = read_yaml(root / "protocols" / "paper" / "table5.yaml")["systems"]
    assert named[:3] == ["teacher sd15", "data coco2017:data/coco", "CLIP"]
    assert named[-9:] == [row["name"] for row in rows]
    assert len(rows) == 9
    assert result.stderr.splitlines()[-1] == (
        "error: nothing can be measured: provide what is named above, and run the same command again"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("world", ["paper", "shapes"])
def test_the_shipped_protocols_hold_every_row_that_their_world_has(world: str, root: Path) -> None:
    path = root / "protocols" / world / "table5.yaml"
    config = validate(InversionConfig, read_yaml(path), str(path))
    rows = [(system.paper, system.steps) for system in config.systems]
    if world == "paper":
        with (root / "results" / "paper" / "table5.csv").open() as file:
            assert sorted(rows) == sorted(
                (name, int(steps)) for name, steps, _ in (line.split(",") for line in list(file)[1:])
            )
    else:
        students = ["pd", "ddil", "lcm", "lcm-ddil", "lcm-lora", "dmd2", "dmd2-ddil", "dmd2-1step"]
        assert [system.model for system in config.systems] == ["shapes"] * 2 + [
            f"runs/shapes-{run}" for run in students
        ]
        assert set(config.inverters) == {"ph2p", "pez", "random"}


def test_the_command_measures_the_models_named(teacher: Path, student: Path, tmp_path: Path) -> None:
    small = ["inverters={ph2p: {tokens: 30}}", "images_per_prompt=2", "figures=1", "batch_size=2"]
    sets = [part for one in small for part in ("--set", one)]
    result = run(
        "eval", "prompt-inversion", "--teacher", teacher, "--model", student, "--inverter", "random", "--num-images", 2,
        "--device", "cpu", "--out", tmp_path / "out", *sets, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    cells = [(row["cell"]["kind"], row["cell"]["name"]) for row in json.loads(result.stdout)]
    assert cells == [("system", str(student)), ("inverter", "random")]
    assert f"{teacher}: 32 steps of ddim, guidance 3\n" in result.stderr
    left_out = f"not here: inverter ph2p: the text encoder of '{teacher}' takes 18 words in a prompt, and the setting"
    assert left_out in result.stderr  # no model draws from its prompts


def test_random_words_need_no_clip_and_the_teachers_guidance_is_the_one_said(teacher: Path, tmp_path: Path) -> None:
    """The shipped protocol has inverters that need CLIP; they are named, and the others are measured."""
    (tmp_path / "in").mkdir()
    for number, image in enumerate(next(open_data("shapes").images(2))):
        Image.fromarray(image).save(tmp_path / "in" / f"{number}.png")
    small = ["inverters.random.tokens=4", "images_per_prompt=2", "figures=0", "choosing_steps=2", "vocabulary=tokens",
             "inverters.ph2p.exchange=null"]  # fmt: skip
    sets = [part for one in small for part in ("--set", one)]
    given = ("eval", "prompt-inversion", "--teacher", teacher, "--data", f"folder:{tmp_path / 'in'}", "--num-images", 2,
             "--device", "cpu", "--out", tmp_path / "out", *sets)  # fmt: skip
    refused = run(*given, "--model", teacher)
    assert refused.exit_code == 1  # by the protocol's own inverter
    assert "not here: inverter ph2p: CLIP's image tower for this text encoder is missing; put CLIP" in refused.stderr
    result = run(*given, "--model", teacher, "--inverter", "random", "--guidance", 1.5, "--json")
    assert result.exit_code == 0, result.stderr
    said = result.stderr.splitlines()
    assert [line.split(": ")[1] for line in said if line.startswith("not here: ")] == ["inverter ph2p", "inverter pez"]
    assert f"{teacher}, to choose prompts: 2 steps of ddim, guidance 1.5" in said
    assert f"{teacher}: 32 steps of ddim, guidance 1.5" in said
    records = [Record.model_validate(row) for row in json.loads(result.stdout)]
    assert {record.kind for record in records} == {"system", "inverter"}
    for record in records:
        assert (record.guidance_scale, record.protocol["guidance_scale"]) == (1.5, 1.5)
        assert record.protocol["sampling"] == {"teacher": {"steps": 2, "solver": "ddim", "guidance_scale": 1.5}}
        assert set(record.metrics) == {"lpips_efflite0", "lpips_efflite0_to_reference"}
        assert record.data["clip"] is None
    assert build(records)


def test_towers_that_are_named_must_be_there(config: InversionConfig, tmp_path: Path) -> None:
    change = {"inverters": {"random": {}}, "inverter": "random", "towers": str(tmp_path)}
    plan = plan_inversion(config.model_copy(update=change))
    assert not plan.possible and "holds no CLIP" in str(plan.absent["CLIP"])


def test_only_a_choice_needs_clip(config: InversionConfig) -> None:
    one = {"tokens": 6, "rounds": 2, "evaluations": 2, "candidates": 1}
    for inverters, needing in (
        ({"ph2p": one}, ()),
        ({"ph2p": one | {"searches": 2}}, ("ph2p",)),
        ({"ph2p": one, "pez": {}, "random": {}}, ("pez",)),
    ):
        assert config.model_copy(update={"inverters": inverters}).inverters_with_towers == needing


def test_unreadable_images_are_named_before_the_inversion(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, image in enumerate(next(open_data("shapes").images(2))):
        Image.fromarray(image).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "1.png").write_bytes(b"no picture")
    result = run(
        "eval", "prompt-inversion", "--teacher", teacher, "--data", f"folder:{tmp_path / 'in'}", "--towers", "shapes",
        "--num-images", 2, "--device", "cpu", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 1
    place = f"folder:{tmp_path / 'in'}"
    assert (
        f"not here: data {place}: 1 of 2 images of {place} are damaged: 1.png; fetch or make them again"
        in result.stderr
    )
    assert not (tmp_path / "out").exists()


def test_a_system_without_a_text_encoder_is_named(teacher: Path, config: InversionConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(save_pipeline(tmp_path, None, seed=1), tmp_path / "mute")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    system = config.systems[0].model_copy(update={"name": "mute", "model": str(folder)})
    found = plan_inversion(config.model_copy(update={"systems": (system, *config.systems[:1]), "differences": ()}))
    assert {name: str(error) for name, error in found.absent.items()} == {
        "mute": f"the model '{folder}' has no text encoder and cannot generate images from prompts; name another model"
    }
    assert [system.name for system in found.systems] == ["teacher"]


def test_too_many_tokens_for_the_encoder_are_refused(teacher: Path, tmp_path: Path) -> None:
    result = run(
        "eval", "prompt-inversion", "--teacher", teacher, "--device", "cpu", "--num-images", 2, "--out", tmp_path / "out",
        "--set", "inverters={ph2p: {tokens: 30}}",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"error: the inverter 'ph2p' does not fit: the text encoder of '{teacher}' takes 18 words in a prompt, and the "
        "setting 'tokens' is 30; set fewer tokens"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inverter": "pez"},
            "x.yaml has a value that does not fit: the inverter 'pez' is none of those to be run, ph2p",
        ),
        (
            {"differences": [["shapes", "nobody"]]},
            "x.yaml has a value that does not fit: the differences name 'nobody', which is none of the systems shapes",
        ),
        (
            {"systems": [{"name": "shapes", "model": "shapes", "steps": 3, "paper": "SD"}]},
            "x.yaml has a value that does not fit: the paper's Table 5 has no row 'SD' of 3 steps",
        ),
        ({"sytems": []}, "x.yaml has the unknown key 'sytems'; did you mean 'systems'?"),
    ],
)
def test_an_impossible_analysis_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongCommand) as error:
        validate(InversionConfig, {"systems": [{"name": "shapes", "model": "shapes"}]} | change, "x.yaml")
    assert str(error.value) == message
