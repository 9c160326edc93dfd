"""``ddil report --against``: the tables, the exit status, the messages, and pairing by the scores that runs keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from ddil_eval.report.records import RecordedModel, save_record
from tests.records import measured, system

Cli = Callable[..., Result]
NETWORK = {"name": "clip", "version": 1}


def save(folder: Path, scores: np.ndarray, name: str = "PD") -> None:
    """Save a record, and the scores beside it as runs keep them."""
    mean, n = float(scores.mean()), len(scores)
    value = measured(mean, 0.15, n=n).model_copy(update={"network": NETWORK})
    model = {name: RecordedModel(reference="runs/pd", weights_sha256="f" * 64)}
    save_record(system(name, 4, metrics={"clip": value}, systems=model), folder)
    place = folder / "features" / name
    place.mkdir(parents=True)
    np.save(place / "clip.npy", scores[:, None].astype(np.float64))
    made = {"weights_sha256": "f" * 64, "solver": "ddim", "grid": [999, 749, 500, 250], "guidance_scale": 3.0,
            "seed": 0, "pictures_sha256": None, "reflection": "clamp"}  # fmt: skip
    (place / "key.json").write_text(json.dumps({"made": made, "prompts": {"prompt_ids_sha256": "c" * 64}}))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A new and an old folder: PD is worse on nearly every prompt, which the two intervals alone do not show."""
    generator = np.random.default_rng(0)
    old = generator.uniform(size=200)
    save(tmp_path / "old", old)
    save(tmp_path / "new", old - generator.normal(0.05, 0.01, size=200))
    save(tmp_path / "new", old, "LCM")
    return tmp_path / "new", tmp_path / "old"


def test_a_regression_fails_only_where_asked(cli: Cli, folders: tuple[Path, Path]) -> None:
    new, old = folders
    result = cli("report", "--results", new, "--against", old, "--csv", "--latex")
    assert result.exit_code == 0, result.output
    assert "Values in both: 0 better, 1 worse, 0 not significant, 0 not compared." in result.stdout
    assert "The test is paired by prompt: PD." in result.stdout
    assert result.stderr.splitlines()[0] == "Cells in the new results only: LCM."
    row = dict(zip(*(line.split(",") for line in (new / "report/against/systems-clip.csv").read_text().splitlines()),
                   strict=True))  # fmt: skip
    assert (row["cell"], row["result"], row["test"]) == ("PD", "worse", "paired by prompt")
    assert r"\label{tab:against-systems-clip}" in (new / "report/against/systems-clip.tex").read_text()
    failed = cli("report", "--results", new, "--against", old, "--json", "--fail-on-regression")
    assert failed.exit_code == 1
    assert failed.stderr.splitlines()[-1].startswith("error: PD is significantly worse in clip: 0.5")
    assert json.loads(failed.stdout)["worst"]["metric"] == "clip"
    said = cli("report", "--results", new, "--against", old, "--fail-on-regression")
    assert said.stdout.count("is significantly worse") + said.stderr.count("is significantly worse") == 1
    assert cli("report", "--results", old, "--against", new, "--fail-on-regression").exit_code == 0


@pytest.mark.parametrize("damage", ["other scores", "a damaged file", "a damaged key", "another grid"])
def test_scores_that_are_not_the_records_are_not_taken(cli: Cli, folders: tuple[Path, Path], damage: str) -> None:
    new, old = folders
    kept, key = old / "features/PD/clip.npy", old / "features/PD/key.json"
    if damage == "other scores":
        np.save(kept, np.full((200, 1), 0.25))
    elif damage == "a damaged file":
        kept.write_bytes(b"\x93NUMPY")
    else:
        key.write_text("[" if damage == "a damaged key" else key.read_text().replace("[999, 749, 500, 250]", "999"))
    document = json.loads(cli("report", "--results", new, "--against", old, "--json").stdout)
    assert document["tables"][0]["rows"][0]["test"] == "independent" and document["worse"] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--results", "new", "--against", "new"), 2, "--against names the folder of --results, new; name the results"),
        (("--results", ".", "--against", "old"), 2, "one lies inside the other"),
        (("--results", "new", "--against", "absent"), 1, "There are no records in absent"),
        (("--results", "new", "--fail-on-regression"), 2, "name them with --against DIR"),
        (
            ("--results", "new", "--against", "old", "--figures"),
            2,
            "--against makes tables alone; leave out --figures and --html",
        ),
        (("--results", "new", "--against", "other"), 1, "No value of new can be compared with one of other"),
    ],
)
def test_bad_input_is_one_sentence(
    cli: Cli, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], status: int,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folders[0].parent)
    save(Path("other"), np.linspace(0, 1, 20), "DMD2")
    result = cli("report", *arguments)
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == status and last.startswith("error: ") and message in last
