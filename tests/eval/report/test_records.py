"""Records are written whole or not at all, never overwritten, and refused if damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ddil_core.support.errors import DdilError
from ddil_core.support.files import replacing
from ddil_eval import statistics
from ddil_eval.report import records as store
from tests.records import measured, p_teacher, record

DIE_BEFORE_RENAME = """
import os, signal, sys
os.replace = os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from ddil_eval.report import records as store
from tests.records import p_teacher
store.save_record(p_teacher(0.8), sys.argv[1])
"""


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = p_teacher(0.8, fd=0.1 + 0.2, nfe=1 / 3)
    path = store.save_record(kept, tmp_path)
    assert path.parent == tmp_path / "records"
    assert path.name == f"covariate-shift-p_teacher-0.8-{kept.identity()[:12]}.json"
    assert store.read_records(tmp_path) == [kept]


def test_records_are_found_at_any_depth_and_nothing_else_is(tmp_path: Path) -> None:
    store.save_record(p_teacher(0.8), tmp_path / "a" / "b")
    store.save_record(p_teacher(0.6), tmp_path)
    (tmp_path / "other.json").write_text("not a record")
    assert [r.cell["p_teacher"] for r in store.read_records(tmp_path)] == [0.8, 0.6]
    assert len(store.read_records(tmp_path / "records")) == 1
    assert store.read_records(tmp_path / "nowhere") == []


def test_a_process_killed_before_the_rename_leaves_no_record(tmp_path: Path, root: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", DIE_BEFORE_RENAME, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    assert killed.returncode == -9, killed.stderr
    left = list((tmp_path / "records").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".")  # what it had written, under the temporary name
    assert store.read_records(tmp_path) == []
    store.save_record(p_teacher(0.8), tmp_path)
    assert store.read_records(tmp_path) == [p_teacher(0.8)]


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    target.write_text("before")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("table.csv", "before")]


def test_a_save_that_fails_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "records").write_text("a file where the folder should be")
    with pytest.raises(
        DdilError, match=r"could not be written \(.+ MiB are free there\): make room or name another place"
    ):
        store.save_record(p_teacher(0.8), tmp_path)


def test_the_same_result_is_kept_once(tmp_path: Path) -> None:
    first = store.save_record(p_teacher(0.8), tmp_path)
    before = first.read_bytes()
    later = p_teacher(0.8, created="2027-01-01T00:00:00+00:00", wall_time_s=99.0)
    assert store.save_record(later, tmp_path) == first
    assert first.read_bytes() == before and len(store.read_records(tmp_path)) == 1


def test_a_changed_number_is_found_and_a_record_without_a_checksum_is_read(tmp_path: Path) -> None:
    """Shipped records are older than the checksum. Neither it nor a deterministic run changes an identity."""
    record = p_teacher(0.8, compute=store.RecordedCompute(dtype="bf16"))
    path = store.save_record(record, tmp_path)
    text = path.read_text()
    assert store.read_records(tmp_path) == [record] and record.identity()[:12] in path.stem
    path.write_text(text.replace("12.5", "12.4", 1))
    with pytest.raises(DdilError, match="is damaged .it does not match its content_sha256, so it was damaged or ch"):
        store.read_records(tmp_path)
    path.write_text(json.dumps({key: value for key, value in json.loads(text).items() if key != "content_sha256"}))
    assert store.read_records(tmp_path) == [record]
    exact = store.RecordedCompute(dtype="bf16", deterministic=True)
    assert record.model_copy(update={"compute": exact}).identity() == record.identity()
    plain = p_teacher(0.8, compute=store.RecordedCompute(deterministic=True))
    assert plain.identity() == p_teacher(0.8).identity() and exact.words() == "computed in bf16, deterministic"


def test_another_result_of_the_same_measurement_is_kept_beside_it(tmp_path: Path) -> None:
    old, new = p_teacher(0.8), p_teacher(0.8, fd=11.0, created="2027-01-01T00:00:00+00:00")
    first = store.save_record(old, tmp_path)
    second = store.save_record(new, tmp_path)
    assert second.name == first.stem + "-2.json"
    assert store.save_record(new, tmp_path) == second
    assert store.latest_records(store.read_records(tmp_path)) == ([new], [old])


@pytest.mark.parametrize(
    "change",
    [
        {"protocol_hash": "1" * 64},
        {"seeds": [1]},
        {"recipe": "gigagan"},
        {"solver": "dpm"},
        {"n_asked": 512},
        {"guidance_scale": None},
        {"reflection": "none"},
        {"grid": [999, 500]},
        {"data": {"reference": "coco2017:there"}},
        {"systems": {"teacher": {"reference": "shapes", "weights_sha256": "f" * 64}}},
        {"compute": {"dtype": "bf16"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_identity_follows_everything_that_a_number_depends_on(change: dict[str, Any]) -> None:
    assert p_teacher(0.8, **change).identity() != p_teacher(0.8).identity()


def test_identity_ignores_numbers_machine_and_time() -> None:
    other = p_teacher(0.8, fd=1.0, device="cuda", wall_time_s=1.0, commit="abc", created="2027-01-01T00:00:00+00:00")
    assert other.identity() == p_teacher(0.8).identity()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:100], "it is no JSON: Expecting property name enclosed in double quotes: line 6 column 4 (char 100)"),
        (lambda text: text.replace('"n_done": 256', '"n_done": "many"'),
         "n_done: Input should be a valid integer, unable to parse string as an integer"),
        (lambda text: text.replace('"recipe"', '"recipes"'), "recipe: Field required"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 0'), "schema_version: Input should be 1"),
        (lambda text: text.replace('"recipe"', '"solver": "x", "recipe"'), "it has an object with the key 'solver' twice"),
        (lambda text: text.replace('"n_done": 256', f'"n_done": {"9" * 5000}'), "it holds a number of 5,000 digits"),
        (lambda text: text + " " * store.LARGEST, "it is larger than 4 MB"),
    ],
    ids=["cut off", "not a number", "unknown key", "no version", "a key twice", "a long number", "too large"],
)  # fmt: skip
def test_a_damaged_record_is_named_in_one_sentence(tmp_path: Path, damage: Any, reason: str) -> None:
    path = store.save_record(p_teacher(0.8), tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(DdilError) as error:
        store.read_records(tmp_path)
    assert str(error.value) == f"The record {path} is damaged ({reason}): move it away and run its measurement again."


def test_a_record_of_a_newer_ddil_is_no_damage(tmp_path: Path) -> None:
    path = store.save_record(p_teacher(0.8, versions={"ddil": "9.1"}), tmp_path)
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2, "more": 1'))
    with pytest.raises(DdilError) as error:
        store.read_records(tmp_path)
    assert str(error.value) == (
        f"The record {path} was made by a newer ddil (9.1): it has schema 2, and this ddil reads schema 1; "
        "update ddil to read it"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"created": "2026-01-02T03:04:05"},
        {"cell": {"p_teacher": 0.8}},
        {"experiment": "../elsewhere"},
        {"nfe": float("nan")},
        {"note": "unknown"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_record_that_says_too_little_or_too_much_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        record(**({"cell": {"kind": "pure", "model": "teacher"}} | change))


def test_an_interval_contains_its_point() -> None:
    with pytest.raises(ValidationError, match=r"does not contain its value 3\.0"):
        store.RecordedEstimate(value=3.0, low=1.0, high=2.0, n=10)


def test_estimates_of_statistics_are_taken_as_they_are() -> None:
    result = store.RecordedMetric.model_validate(
        {"estimate": statistics.Estimate(2.0, 1.0, 3.0, 10), "direction": "lower", "kind": "set"}
    )
    assert result == measured(2.0, 1.0, "lower", "set", n=10)


def test_degrees_of_freedom_change_no_identity_and_are_left_out_where_there_are_none(tmp_path: Path) -> None:
    metric = measured(2.0, 1.0)
    told = metric.model_copy(update={"estimate": metric.estimate.model_copy(update={"degrees": 7.5})})
    before, after = (
        p_teacher(0.8, metrics={"clip": one}, created=f"2026-01-0{day}T00:00:00+00:00")
        for day, one in ((1, metric), (2, told))
    )
    files = [store.save_record(one, tmp_path) for one in (before, after)]  # an earlier ddil did not record them
    assert before.identity() == after.identity()
    held = [json.loads(file.read_text())["metrics"]["clip"]["estimate"] for file in files]
    assert "degrees" not in held[0] and held[1] == held[0] | {"degrees": 7.5}
    assert store.latest_records(store.read_records(tmp_path)) == ([after], [before])


def test_the_file_is_json_that_people_can_read(tmp_path: Path) -> None:
    text = store.save_record(p_teacher(0.8), tmp_path).read_text()
    assert json.loads(text)["metrics"]["fd_efflite0"]["estimate"] == {
        "value": 12.5,
        "low": 12.0,
        "high": 13.0,
        "n": 256,
        "p_value": None,
        "note": None,
    }
    assert text.startswith('{\n  "schema_version": 1,') and text.endswith("}\n")
