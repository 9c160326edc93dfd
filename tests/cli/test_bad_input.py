"""A user's mistake gives one sentence that says what is wrong, where, and what to do, and no traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image

from ddil_core.support.resources import protocols
from ddil_eval.metrics import METRICS
from tests.shards import save_shards

Cli = Callable[..., Result]

MODEL_HINT = (
    "is not known: it may be a name that 'ddil models' lists, a folder in diffusers' pipeline layout, a run folder of "
    "'ddil distill', a single-file checkpoint (.safetensors), or a hub id, as in org/name or org/name@revision"
)
SHIFT = protocols() / "shapes" / "covariate-shift.yaml"
PD = protocols() / "shapes" / "pd.yaml"
TINY = [
    argument
    for setting in ("stages=[{steps: 4, updates: 2}]", "pool=8", "batch_size=8", "save_every=1", "ddil.capacity=256")
    for argument in ("--set", setting)
]


def refused(result: Result, sentence: str, status: int) -> None:
    """Check that stderr ends with this sentence, as the whole message, and that stdout is empty."""
    *before, last = result.stderr.splitlines()
    assert (last, result.exit_code, result.stdout) == (f"error: {sentence}", status, "")
    assert not any("error" in line.lower() or "Traceback" in line for line in before)


@pytest.fixture
def shift(cli: Cli, teacher: Path, student: Path, tmp_path: Path) -> Cli:
    """``eval covariate-shift`` of the tiny pair. A test may give any option again."""
    models = ("--teacher", teacher, "--student", student, "--device", "cpu", "--out", tmp_path / "out")
    quick = ("--set", "metrics=[drawn_right]", "--set", "num_prompts=4")
    return lambda *more: cli("eval", "covariate-shift", *models, *quick, *more)


@pytest.fixture
def distill(cli: Cli, teacher: Path, tmp_path: Path) -> Cli:
    return lambda *more: cli(
        "distill", "--teacher", teacher, "--out", tmp_path / "run", "--device", "cpu", *TINY, *more
    )


# Names


@pytest.mark.parametrize(
    ("name", "hint"), [("shapez", "; did you mean shapes or shapes-flow?"), ("sd-turbo", ""), ("a/b/c", "")]
)
def test_a_model_that_fits_nothing(name: str, hint: str, cli: Cli, shift: Cli, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "pictures", "--device", "cpu")
    for result in (
        cli("sample", "--model", name, "--prompt", "a", *out),
        cli("distill", "--teacher", name, *out),
        shift("--teacher", name),
        shift("--student", name),
    ):
        refused(result, f"the model {name!r} {MODEL_HINT}{hint}", 2)
    assert list(tmp_path.iterdir()) == []


def test_data_that_fits_nothing(distill: Cli, shift: Cli) -> None:
    kinds = "it may be one of 'shapes', 'gaussians', 'coco2014:DIR', 'coco2017:DIR', 'folder:DIR', 'webdataset:PATTERN'"
    refused(distill("--data", "shape"), f"the data set 'shape' is not known: {kinds}; did you mean 'shapes'?", 2)
    refused(
        shift("--data", "coco2015:x"),
        f"the data set 'coco2015:x' is not known: {kinds}; did you mean 'coco2017:DIR'?",
        2,
    )
    refused(
        shift("--data", "coco2017"), f"the data set 'coco2017' is not known: {kinds}; did you mean 'coco2017:DIR'?", 2
    )


def test_data_that_cannot_be_trained_on(distill: Cli, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for place in range(8):
        Image.new("RGB", (64, 64)).save(photos / f"{place}.png")
    shard = "webdataset:http://127.0.0.1:9/a.tar"
    without = "say --download, or fetch it by hand and name the file"
    for arguments, sentence, status in (
        ((f"folder:{photos}",), f"8 of 8 images of folder:{photos} have no caption: 0.png, 1.png, 2.png, 3.png, 4.png and 3 "
         "more; put a .txt beside each, or leave them out", 2),
        ((f"folder:{photos}", "--set", "pool=9"),
         f"folder:{photos} has 8 images to train on, fewer than the pool of 9; add others, or say --set pool=8", 2),
        (("webdataset:pipe:id",), "the shard 'pipe:id' is refused: name a file or a URL of http or https; "
         "commands are never run", 2),
        ((shard,), f"the shard {shard[11:]} is not here, and nothing is fetched without consent; {without}", 2),
        ((shard, "--download"), f"the shard {shard[11:]} could not be fetched ([Errno 111] Connection refused); check the URL "
         "and run the command again", 1),
    ):  # fmt: skip
        refused(distill("--data", *arguments), sentence, status)
    assert not (tmp_path / "run").exists()


def test_shards_are_for_training(cli: Cli, student: Path, tmp_path: Path) -> None:
    data = save_shards(tmp_path, 1, 4)
    quick = ("--recipe", "shapes", "--num-images", 4, "--set", "reference_images=4", "--metrics", "fd_efflite0")
    result = cli(
        "eval", "coco", "--model", student, "--data", data, *quick, "--device", "cpu", "--out", tmp_path / "out"
    )
    refused(result, f"the data set {data!r} is for training; unpack the shards and name folder:DIR", 2)


@pytest.mark.parametrize("command", ["sample", "distill", "teacher", "student"])
def test_a_folder_that_is_no_pipeline(command: str, cli: Cli, shift: Cli, distill: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    result = {
        "sample": lambda: cli("sample", "--model", folder, "--prompt", "a", "--out", tmp_path / "o", "--device", "cpu"),
        "distill": lambda: distill("--teacher", folder),
        "teacher": lambda: shift("--teacher", folder),
        "student": lambda: shift("--student", folder),
    }[command]()
    what = "is a folder but no pipeline, as it has no model_index.json; name one in diffusers' pipeline layout"
    refused(result, f"the model '{folder}' {what}", 2)


def test_a_pipeline_of_another_layout(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    result = cli("sample", "--model", tmp_path, "--prompt", "a", "--out", tmp_path / "o", "--device", "cpu")
    refused(
        result,
        f"the model '{tmp_path}' has the layout KandinskyPipeline; known here are StableDiffusionPipeline, "
        "StableDiffusionXLPipeline, LatentConsistencyModelPipeline, StableDiffusion3Pipeline, FluxPipeline, "
        "PixArtSigmaPipeline, SanaPipeline, GaussiansPipeline",
        1,
    )


def test_a_method_and_a_device_that_are_not_there(distill: Cli) -> None:
    unknown = "the method 'dmd3' is not known; it may be one of pd, lcm, tcd, dmd2; did you mean 'dmd2'?"
    refused(distill("--method", "dmd3"), unknown, 2)
    refused(distill("--device", "tpu"), "this machine has no device 'tpu'; leave out --device to take the best one", 2)


def test_a_metric_that_is_not_there(shift: Cli) -> None:
    known = ", ".join(METRICS)
    refused(
        shift("--set", "metrics=[fidd]"),
        f"the metric 'fidd' is not known; it may be one of {known}; did you mean 'fid'?",
        2,
    )


# Numbers


def test_a_step_count_that_does_not_nest(shift: Cli) -> None:
    refused(
        shift("--set", "teacher_steps=30"),
        "the grid of 4 steps does not nest in the grid of 30 steps: [749, 250] is not in the finer one; "
        "choose a number of steps that divides 30",
        2,
    )


def test_a_switch_time_off_the_grid(shift: Cli) -> None:
    refused(
        shift("--switch", "749,600"),
        "the switch time 600 is not on the student's grid, where one model can hand over to the other: "
        "it may be 749, 500, 250",
        2,
    )


@pytest.mark.parametrize(("given", "named"), [("0.5,1.2", "1.2"), ("-0.1", "-0.1"), ("nan", "nan")])
def test_a_rate_that_is_no_probability(given: str, named: str, shift: Cli) -> None:
    sentence = f"p_teacher is a probability, from 0 (student alone) to 1 (teacher alone), not {named}"
    refused(shift("--p-teacher", given), f"--p-teacher has a value that does not fit: {sentence}", 2)


def test_a_phases_rate_that_is_no_probability(distill: Cli) -> None:
    refused(
        distill("--set", "ddil.phases.0.p_teacher=1.5"),
        f"{PD} has a value that does not fit at 'ddil.phases.0.p_teacher': it takes a number from 0 to 1 or a mapping of "
        "the keys start and end, not 1.5",
        2,
    )


def test_numbers_that_are_none(shift: Cli) -> None:
    refused(shift("--p-teacher", "half"), "--p-teacher takes numbers with commas between them, not 'half'", 2)
    refused(shift("--switch", "749,x"), "--switch takes numbers with commas between them, not '749,x'", 2)


def test_stages_that_do_not_halve(distill: Cli) -> None:
    refused(
        distill("--set", "stages=[{steps: 8, updates: 1}, {steps: 3, updates: 1}]"),
        f"{PD} has a value that does not fit: each stage has half the steps of the one before, which [8, 3] do not",
        2,
    )


# Protocols


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("nmu_prompts=3", "has the unknown key 'nmu_prompts'; did you mean 'num_prompts'?"),
        ("num_prompts=3", "has a value that does not fit at 'num_prompts': it takes a whole number of at least 4 (or null), not 3"),
        ("experiment=coco", "has a value that does not fit at 'experiment': it takes 'covariate-shift', not 'coco'"),
    ],
)  # fmt: skip
def test_a_setting_that_the_protocol_does_not_take(setting: str, sentence: str, shift: Cli) -> None:
    refused(shift("--set", setting), f"{SHIFT} {sentence}", 2)


def test_an_unknown_key_deep_in_a_protocol(distill: Cli) -> None:
    refused(distill("--set", "ddil.use=2"), f"{PD} has the unknown key 'ddil.use'; did you mean 'ddil.uses'?", 2)


def test_settings_that_are_no_settings(shift: Cli) -> None:
    refused(shift("--set", "seed"), "--set takes KEY=VALUE, not 'seed'", 2)
    refused(shift("--set", "seed.deep=1"), "--set 'seed.deep=1' names no place in the protocol", 2)
    refused(shift("--set", "seed=[1"), "--set 'seed=[1' has a value that is not YAML", 2)


def test_protocol_files_that_are_none(shift: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    refused(shift("--protocol", path), f"there is no protocol file {path}", 2)
    path.write_text("- a\n- b\n")
    refused(shift("--protocol", path), f"the protocol {path} holds no mapping of keys to values", 2)
    path.write_text("a: [1")
    result = shift("--protocol", path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: the protocol {path} is not YAML: ") and result.stderr.count("\n") == 1


def test_ddil_without_its_section(cli: Cli, teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("stages: [{steps: 4, updates: 1}]\n")
    result = cli("distill", "--teacher", teacher, "--protocol", path, "--out", tmp_path / "run")
    refused(result, f"{path} has no 'ddil' section, which --ddil needs; add one, or use --no-ddil", 2)


# Folders that hold something else


def test_an_output_folder_that_holds_another_run(distill: Cli, tmp_path: Path) -> None:
    assert distill().exit_code == 0
    run = tmp_path / "run"
    refused(distill("--seed", 9), f"the folder {run} holds another run (seed is 0 there); choose another --out", 2)


def test_an_output_folder_that_holds_no_run(distill: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused(distill("--resume"), f"there is no run to resume in {run}: it has no run.yaml", 2)
    run.mkdir()
    (run / "letter.txt").write_text("keep me")
    refused(distill(), f"the folder {run} is not empty and holds no run; choose another --out", 2)
    assert [path.name for path in run.iterdir()] == ["letter.txt"]


def test_a_run_without_its_student(distill: Cli, cli: Cli, tmp_path: Path) -> None:
    assert distill().exit_code == 0
    run = tmp_path / "run"
    shutil.rmtree(run / "student")
    result = cli("sample", "--model", run, "--prompt", "a", "--out", tmp_path / "o", "--device", "cpu")
    refused(result, f"the model '{run}' is a run that has no student yet; finish it with 'ddil distill … --resume'", 2)


# Damage


@pytest.fixture
def damaged(teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "damaged"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("kept", [0, 100, -1000])
def test_a_damaged_weights_file(part: str, kept: int, damaged: Path, cli: Cli, tmp_path: Path) -> None:
    (file,) = (damaged / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:kept])
    result = cli("sample", "--model", damaged, "--prompt", "a", "--out", tmp_path / "o", "--device", "cpu")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: the weights {file} are cut short or damaged (")
    assert line.endswith("; fetch or make the model again")


@pytest.mark.parametrize("name", ["model_index.json", "ddil.json"])
@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_description(name: str, content: str, damaged: Path, cli: Cli, tmp_path: Path) -> None:
    (damaged / name).write_text(content)
    result = cli("sample", "--model", damaged, "--prompt", "a", "--out", tmp_path / "o", "--device", "cpu")
    refused(result, f"the file {damaged / name} of the model is damaged; fetch or make the model again", 1)


def test_a_damaged_record(shift: Cli, cli: Cli, tmp_path: Path) -> None:
    more = ("--set", "teacher_steps=4", "--set", "figure_prompts=0", "--p-teacher", "", "--switch", "500")
    assert shift(*more).exit_code == 0
    record = next((tmp_path / "out" / "records").glob("*teacher_then_student*.json"))
    whole = record.read_text()
    record.write_text(whole[: len(whole) // 2])
    for result, shown in ((cli("report", "--results", tmp_path / "out"), True), (shift(*more), False)):
        assert (result.exit_code, "Pure runs" in result.stdout) == (1, shown)
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"error: The record {record} is damaged (")
        assert last.endswith("): move it away and run its measurement again.")


MISMATCH = "does not match its checksum {}.sha256, so one of the two was damaged or changed after it was written; "


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "data.safetensors",
            "the file of the encoded data {} " + MISMATCH + "delete the file to encode the data again",
        ),
        (
            "stage-1-of-1.safetensors",
            "the file of the stage's weights {} " + MISMATCH + "delete it to train the stage again",
        ),
        ("stage-1-of-1.pt", "the checkpoint {} cannot be read ({}); delete it to start this stage again"),
    ],
)
def test_a_damaged_checkpoint(name: str, sentence: str, distill: Cli, tmp_path: Path) -> None:
    """Cut the files of a finished run in half, and delete its student."""
    assert distill().exit_code == 0
    run = tmp_path / "run"
    shutil.rmtree(run / "student")
    path = run / "checkpoints" / name
    if name.endswith(".pt"):
        path.with_suffix(".safetensors").rename(path)  # not a checkpoint at all
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = distill()
    kind = result.stderr.splitlines()[-1].split("(")[-1].split(")")[0]
    refused(result, sentence.format(path, kind if name.endswith(".pt") else name), 1)
    path.unlink()
    assert distill().exit_code == 0 and (run / "student" / "model_index.json").is_file()


def test_a_damaged_run_file(distill: Cli, tmp_path: Path) -> None:
    assert distill().exit_code == 0
    path = tmp_path / "run" / "run.yaml"
    path.write_text("")
    shutil.rmtree(tmp_path / "run" / "student")
    cure = "delete it and repeat the command that began the run, with --resume, which writes it again"
    refused(distill(), f"the file {path} is damaged (it does not say what the run is); {cure}", 1)
    path.unlink()
    assert distill("--resume").exit_code == 0 and path.is_file()
