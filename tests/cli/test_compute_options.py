"""--dtype, --tf32 and --compile: which commands have them, what they refuse, and what records say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from ddil_core.support.environment import is_deterministic
from ddil_eval.report.records import Record, RecordedCompute, read_records
from tests.records import p_teacher, system

Cli = Callable[..., Result]


@pytest.mark.parametrize("change", [{"dtype": "bf16"}, {"tf32": True}, {"compile": True}])
def test_another_computation_is_another_measurement_and_the_default_is_that_of_old_records(change: object) -> None:
    old = p_teacher(0.8)
    assert p_teacher(0.8, compute=RecordedCompute()).identity() == old.identity()
    assert p_teacher(0.8, compute=change).identity() != old.identity()
    assert Record.model_validate_json(old.model_dump_json(exclude={"compute"})) == old


def test_a_table_says_how_its_models_computed() -> None:
    from ddil_eval.report.records import computed_words

    low = RecordedCompute(dtype="bf16", compile=True)
    assert computed_words([system("PD", 4), system("LCM", 4)]) == []
    assert computed_words([system("PD", 4, compute=low), system("LCM", 4, compute=low)]) == [
        "computed in bf16, compiled"
    ]
    assert computed_words([system("PD", 4), system("LCM", 4, compute=low)]) == ["LCM computed in bf16, compiled"]


@pytest.mark.parametrize("command", ["sample", "eval systems", "eval covariate-shift"])
def test_tf32_on_a_cpu_is_refused_before_anything_is_drawn(
    cli: Cli, student: Path, tmp_path: Path, command: str
) -> None:
    model = ("--student" if "shift" in command else "--model", student)
    more = {
        "sample": ("--prompt", "a ring"),
        "eval systems": ("--data", "shapes", "--num-images", 4, "--set", "reference_images=4"),
        "eval covariate-shift": ("--teacher", student, "--data", "shapes", "--num-prompts", 4),
    }[command]
    result = cli(*command.split(), *model, *more, "--tf32", "--device", "cpu", "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    expected = "error: TF32 is arithmetic of NVIDIA's GPUs, and the device is cpu; leave out --tf32"
    assert result.stderr.splitlines()[-1] == expected


def test_an_experiment_that_draws_nothing_has_no_dtype(cli: Cli, tmp_path: Path) -> None:
    protocol = tmp_path / "score.yaml"
    protocol.write_text("experiment: score\nfolders: [images]\nreference: shapes\n")
    result = cli("eval", "run", protocol, "--dtype", "bf16", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: the experiment 'score' has no dtype; leave out --dtype"


def test_distillation_offers_no_float16(cli: Cli, tmp_path: Path) -> None:
    result = cli("distill", "--dtype", "fp16", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "'fp16' is not one of 'fp32', 'bf16'" in result.stderr


@pytest.mark.parametrize("command", ["distill", "eval covariate-shift"])
def test_a_dtype_that_changes_no_network_is_refused(cli: Cli, student: Path, tmp_path: Path, command: str) -> None:
    """A printed protocol names every key, and so the dtypes of both networks."""
    needs = ("--student", student) if command.startswith("eval") else ()
    printed = tmp_path / "mine.yaml"
    printed.write_text(cli(*command.split(), *needs, "--print-protocol").stdout)
    mine = (*command.split(), *needs, "--protocol", printed, "--dtype", "bf16", "--out", tmp_path / "out")
    result = cli(*mine)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == (
        "error: --dtype bf16 leaves both networks as they are, because the protocol gives them a teacher_dtype and a "
        "student_dtype; take the two keys out of it, or set them with --set"
    )
    one = cli(*mine, "--set", "teacher_dtype=bfloat16", "--print-protocol")
    assert one.exit_code == 0, one.stderr


def test_a_comparison_records_the_dtype_of_each_row(cli: Cli, student: Path, tmp_path: Path) -> None:
    command = ("eval", "systems", "--model", student, "--data", "shapes", "--num-images", 4, "--steps", 1)
    small = ("--set", "reference_images=4", "--metrics", "drawn_right", "--device", "cpu", "--out", tmp_path)
    for dtype in ("fp32", "bf16"):
        assert cli(*command, *small, "--dtype", dtype).exit_code == 0
    records = [record for record in read_records(tmp_path) if record.kind == "system"]
    assert {record.compute.dtype for record in records if record.compute} == {"fp32", "bf16"}
    assert len({record.protocol_hash for record in records}) == 1  # the record itself names the dtype
    assert len({json.dumps(record.cell) for record in records}) == 1


def test_a_deterministic_command_says_so_and_changes_no_number_on_a_cpu(
    cli: Cli, student: Path, tmp_path: Path
) -> None:
    words = ("eval", "systems", "--model", student, "--data", "shapes", "--num-images", 4, "--device", "cpu",
             "--set", "metrics=[drawn_right]", "--set", "batch_size=4")  # fmt: skip
    assert cli(*words, "--out", tmp_path / "plain").exit_code == 0
    assert cli(*words, "--deterministic", "--out", tmp_path / "exact").exit_code == 0
    assert not is_deterministic()
    (plain,), (exact,) = (read_records(tmp_path / name) for name in ("plain", "exact"))
    assert exact.metrics == plain.metrics and exact.identity() == plain.identity()
    assert (plain.compute, exact.compute) == (RecordedCompute(), RecordedCompute(deterministic=True))
