"""``ddil sample``: images depend only on the prompt, the number and the seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from ddil_core.data.base import Prompt
from ddil_core.data.datasets import open_data
from ddil_core.data.folder import ImageFiles
from ddil_core.models.generate import sample as draw
from ddil_core.models.model import load_model
from ddil_core.support import image_grids
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_eval.experiments import image_sources
from ddil_eval.experiments.image_sources import ImageOrigin, write_sample

PROMPTS = (
    "a small red circle left of a large blue star on a grey background",
    "a large purple ring on a navy background",
    "a small green moon above a small cyan cross on a white background",
)


@pytest.fixture
def sample(cli: Callable[..., Result], student: Path) -> Callable[..., Result]:
    def run(out: Path, *prompts: str, more: tuple[object, ...] = ()) -> Result:
        named = [argument for prompt in prompts for argument in ("--prompt", prompt)]
        return cli("sample", "--model", student, *named, "--out", out, "--device", "cpu", *more)

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_it_writes_a_picture_each_and_a_grid_of_all(sample: Callable[..., Result], tmp_path: Path) -> None:
    result = sample(tmp_path / "out", *PROMPTS, more=("--num-images", 2))
    assert result.exit_code == 0
    assert result.stdout == f"6 images and {tmp_path / 'out' / 'grid.png'}\n"
    pictures = [f"{row:03d}-{number:02d}.png" for row in range(3) for number in range(2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *pictures,
        "grid.png",
        "index.jsonl",
        "made.json",
        "sha256.json",
    ]
    shown = [pixels(tmp_path / "out" / name) for name in pictures]
    assert {picture.shape for picture in shown} == {(64, 64, 3)}
    assert len({picture.tobytes() for picture in shown}) == 6


def test_json_names_the_files(sample: Callable[..., Result], tmp_path: Path) -> None:
    result = sample(tmp_path / "out", PROMPTS[0], more=("--json",))
    document = json.loads(result.stdout)
    assert document == {
        "images": [str(tmp_path / "out" / "000-00.png")],
        "grid": str(tmp_path / "out" / "grid.png"),
        "sampling": {"steps": 4, "solver": "ddim", "guidance_scale": 1.0},
        "index": str(tmp_path / "out" / "index.jsonl"),
    }
    assert all(Path(path).is_file() for path in (*document["images"], document["grid"], document["index"]))


def test_the_folder_is_a_data_set_without_the_grid(
    sample: Callable[..., Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(tmp_path / "out", *PROMPTS, more=("--num-images", 2, "--seed", 7)).exit_code == 0
    data = open_data(f"folder:{tmp_path / 'out'}")
    assert isinstance(data, ImageFiles)
    assert [(file.id, file.name, file.caption) for file in data.files] == [
        (f"{row:03d}-{number}", f"{row:03d}-{number:02d}.png", prompt)
        for row, prompt in enumerate(PROMPTS)
        for number in range(2)
    ]
    assert capsys.readouterr().err == ""  # no warning of an image that the index does not name


def test_the_folder_can_be_scored_and_says_how_it_was_made(
    sample: Callable[..., Result], cli: Callable[..., Result], student: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("\n".join([*PROMPTS, "a large blue square on a white background"]) + "\n")
    made = sample(tmp_path / "out", more=("--prompts", tmp_path / "mine.txt", "--guidance", 2, "--seed", 7))
    assert made.exit_code == 0, made.stderr
    result = cli("eval", "score", tmp_path / "out", "--reference", "shapes", "--metrics", "drawn_right", "--device",
                 "cpu", "--out", tmp_path / "scored", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (record,) = json.loads(result.stdout)
    assert (record["n_done"], record["guidance_scale"], record["solver"], record["seeds"]) == (4, 2.0, "ddim", [7])
    assert record["nfe"] == 8 and [model["reference"] for model in record["systems"].values()] == [str(student)]


def test_a_list_gives_the_images_of_its_prompts(sample: Callable[..., Result], tmp_path: Path) -> None:
    rows = [{"id": f"p{place}", "prompt": prompt} for place, prompt in enumerate(PROMPTS)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sample(tmp_path / "list", more=("--prompts", tmp_path / "mine.jsonl")).exit_code == 0
    assert sample(tmp_path / "options", *PROMPTS).exit_code == 0
    index = [json.loads(line) for line in (tmp_path / "list" / "index.jsonl").read_text().splitlines()]
    assert index == [
        {"id": f"p{place}", "file": f"{place:03d}-00.png", "prompt": prompt, "seed": 0}
        for place, prompt in enumerate(PROMPTS)
    ]
    for row in index:
        assert (tmp_path / "list" / row["file"]).read_bytes() == (tmp_path / "options" / row["file"]).read_bytes()


def test_prompts_come_from_one_place(sample: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a cat\n")
    sentence = "error: the command needs prompts; give each with --prompt, or a list of them with --prompts FILE\n"
    for result in (
        sample(tmp_path / "out"),
        sample(tmp_path / "out", PROMPTS[0], more=("--prompts", tmp_path / "mine.txt")),
    ):
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", sentence)
    missing = sample(tmp_path / "out", more=("--prompts", tmp_path / "none.txt"))
    assert (missing.exit_code, missing.stderr) == (2, f"error: there is no list of prompts {tmp_path / 'none.txt'}\n")
    assert not (tmp_path / "out").exists()


def test_names_of_many_images_sort_as_their_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand and one prompts need four digits. The grid shows the first images, and the caller hears how many."""
    monkeypatch.setattr(image_grids, "MOST_IMAGES", 4)
    images = np.zeros((1001, 1, 4, 4, 3), np.uint8)
    paths, shown = write_sample(images, [Prompt(str(n), "") for n in range(1001)], ImageOrigin("a"), tmp_path)
    assert shown == 4 and sorted(paths) == paths and paths[-1].name == "1000-00.png"


def test_a_disk_that_fails_at_the_last_files_leaves_nothing(
    sample: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise DdilError(f"{path} could not be written")

    monkeypatch.setattr(image_sources, "write_text", full)
    result = sample(tmp_path / "out", PROMPTS[0])
    assert (result.exit_code, result.stdout) == (1, "")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert sample(tmp_path / "out", PROMPTS[0]).exit_code == 0


def test_the_same_seed_gives_the_same_bytes(sample: Callable[..., Result], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second", "other")]
    for folder, seed in zip(folders, (4, 4, 5), strict=True):
        assert sample(folder, *PROMPTS[:2], more=("--seed", seed)).exit_code == 0
    first, second, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert all(first[name] != other[name] for name in first)


def test_a_picture_does_not_depend_on_the_others(sample: Callable[..., Result], tmp_path: Path) -> None:
    """The prompt alone, last of three, and as the first of two numbers: to the rounding of a level."""
    assert sample(tmp_path / "alone", PROMPTS[0]).exit_code == 0
    assert sample(tmp_path / "among", *PROMPTS[::-1]).exit_code == 0
    assert sample(tmp_path / "twice", PROMPTS[0], more=("--num-images", 2)).exit_code == 0
    alone = pixels(tmp_path / "alone" / "000-00.png")
    for other in (tmp_path / "among" / "002-00.png", tmp_path / "twice" / "000-00.png"):
        difference = np.abs(pixels(other) - alone)
        assert difference.max() <= 1 and difference.mean() < 1e-3
    assert np.abs(pixels(tmp_path / "twice" / "000-01.png") - alone).max() > 1


def test_settings_change_the_picture(sample: Callable[..., Result], tmp_path: Path) -> None:
    """The student's own are four DDIM steps without guidance."""
    variants: dict[str, tuple[object, ...]] = {
        "own": (),
        "said": ("--steps", 4, "--solver", "ddim", "--guidance", 1.0),
        "steps": ("--steps", 8),
        "dpmpp": ("--solver", "dpmpp_2m"),
        "lcm": ("--solver", "lcm"),
        "guidance": ("--guidance", 4.0),
    }
    for name, more in variants.items():
        assert sample(tmp_path / name, PROMPTS[0], more=more).exit_code == 0
    found = {name: pixels(tmp_path / name / "000-00.png").tobytes() for name in variants}
    assert found["own"] == found["said"]
    assert len(set(found.values())) == len(variants) - 1


def test_what_a_student_was_not_made_for_and_what_is_cut_is_said(sample: Callable[..., Result], tmp_path: Path) -> None:
    assert "warning" not in sample(tmp_path / "own", PROMPTS[0]).stderr
    result = sample(tmp_path / "other", PROMPTS[0], "red " * 60, more=("--solver", "dpmpp_2m", "--steps", 8))
    assert result.exit_code == 0
    said = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [line.split("' ", 1)[-1] for line in said[:2]] == [
        "was made for the solver 'ddim', not 'dpmpp_2m': say --solver ddim",
        "was made for 4 steps, not 8: say --steps 4",
    ]
    assert said[2:] == ["warning: 1 of 2 prompts are longer than the text encoder takes; the rest of each is not read"]


def test_one_image_is_singular(sample: Callable[..., Result], tmp_path: Path) -> None:
    assert sample(tmp_path / "out", PROMPTS[0]).stdout == f"1 image and {tmp_path / 'out' / 'grid.png'}\n"


def test_pictures_are_not_overwritten(sample: Callable[..., Result], tmp_path: Path) -> None:
    assert sample(tmp_path, PROMPTS[0]).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = sample(tmp_path, PROMPTS[1])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: the folder {tmp_path} holds images already (grid.png); choose another --out\n"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", 0), "Invalid value for '--steps': 0 is not in the range x>=1."),
        (("--num-images", 0), "Invalid value for '--num-images': 0 is not in the range x>=1."),
        (("--steps", 1000), "error: a grid has from 1 to 999 steps, not 1000"),
        (
            ("--solver", "eular"),
            "error: the solver 'eular' is not known; it may be one of ddim, dpmpp_2m, lcm, tcd, euler, flow_euler, heun; "
            "did you mean 'euler'?",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    more: tuple[object, ...], message: str, sample: Callable[..., Result], tmp_path: Path
) -> None:
    result = sample(tmp_path / "out", PROMPTS[0], more=more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].removeprefix("Error: ") == message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("a \udcff cat", "U+DCFF, half of a surrogate pair,"),
        ("a \ud83d cat", "U+D83D, half of a surrogate pair,"),
        ("a \0", "a NUL,"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_no_text_is_refused(
    prompt: str, what: str, sample: Callable[..., Result], student: Path, tmp_path: Path
) -> None:
    """A byte of a command line that is not UTF-8 becomes half of a surrogate pair, which no command takes in any argument."""
    sentence = f"the prompt {prompt!r} holds {what} which is no character of a text; write it again in UTF-8"
    argument = f"the argument {prompt!r} is not text in utf-8; rename the file, or write the text in UTF-8"
    result = sample(tmp_path / "out", PROMPTS[0], prompt)
    said = sentence if "\0" in prompt else argument
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {said}\n")
    assert not (tmp_path / "out").exists()
    with pytest.raises(WrongCommand) as error:
        draw(load_model(str(student)), [prompt])
    assert str(error.value) == sentence


def test_unusual_prompts_are_drawn_as_they_are(sample: Callable[..., Result], tmp_path: Path) -> None:
    prompts = ("", "a \U0001f600 cat", "a $\\frac$ of $5", "a\u2028cat")
    assert sample(tmp_path / "out", *prompts).exit_code == 0


def test_reflection_needs_the_bounds_that_a_student_brings(
    sample: Callable[..., Result], student: Path, tmp_path: Path
) -> None:
    told = json.loads((student / "ddil.json").read_text())
    refused = sample(tmp_path / "out", PROMPTS[0], more=("--reflection", "clamp"))
    assert refused.exit_code == 2
    assert refused.stderr.endswith("as the students of 'ddil distill' do; leave reflection out\n")
    bounds = {"centre": [0.0] * 8, "bound": [0.5] * 8, "quantile": 0.9995}
    (student / "ddil.json").write_text(json.dumps(told | {"bounds": bounds}))
    try:
        for mode in ("none", "clamp"):
            assert sample(tmp_path / mode, PROMPTS[0], more=("--reflection", mode)).exit_code == 0
    finally:
        (student / "ddil.json").write_text(json.dumps(told))
    assert sample(tmp_path / "own", PROMPTS[0]).exit_code == 0
    own, none, clamp = (pixels(tmp_path / name / "000-00.png") for name in ("own", "none", "clamp"))
    assert (own == none).all()
    assert np.abs(own - clamp).max() > 1


def test_a_size_is_asked_for_or_refused(sample: Callable[..., Result], student: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide"
    assert sample(out, PROMPTS[0], more=("--height", 32, "--width", 96)).exit_code == 0
    assert pixels(out / "000-00.png").shape == (32, 96, 3)
    assert json.loads((out / "made.json").read_text())["size"] == [32, 96]
    result = sample(tmp_path / "no", PROMPTS[0], more=("--width", 100))
    assert result.exit_code == 2 and result.stderr.endswith(
        f"the model {str(student)!r} cannot draw images of a width of 100: its autoencoder takes sides in multiples of "
        "8 pixels; say 96 or 104\n"
    )
    assert not list((tmp_path / "no").glob("*.png"))
