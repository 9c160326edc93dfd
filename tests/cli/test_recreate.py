"""``ddil recreate``: all commands of a protocol, in their order, each once, also after a stop or a failure."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import read_yaml, validate
from ddil_core.support.resources import protocols
from ddil_eval.cli.recreation import RecreationConfig, commands_of, describe, left, measure_speed

TINY = "--set student.updates=2 --set student.width=8 --set batch_size=8 --set pool=64 --set warmup=0"
DISTILL = f"distill --teacher gaussians --data gaussians --method pd {TINY} --set 'stages=[{{steps: 2, updates: 2}}]'"
DRIFT = "eval drift --teacher gaussians --student runs/pd-0 --data gaussians --num-prompts 16 --set teacher_steps=4"


def content(*commands: dict[str, Any]) -> dict[str, Any]:
    return {"title": "two students", "work": "work", "speed": 1000.0, "commands": list(commands)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*commands: dict[str, Any]) -> Path:
    Path("all.yaml").write_text(yaml.safe_dump(content(*commands)))
    return Path("all.yaml")


def test_all_commands_run_once(folder: Path, cli: Callable[..., Result]) -> None:
    protocol = write(
        {"run": f"{DISTILL} --no-ddil --seed {{training_seed}} --out runs/pd-{{training_seed}}",
         "training_seeds": 2, "core_minutes": 0.1},
        {"run": f"{DRIFT} --out {{out}}", "core_minutes": 0.1},
        {"run": "report --results {out} --csv", "core_minutes": 0.1},
    )  # fmt: skip
    result = cli("recreate", protocol, "--out", "results", "--jobs", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("two students: 4 of 4 commands are left, of 0 minutes on one core")
    assert list(Path("results/report").rglob("*.csv"))
    students = [Path(f"runs/pd-{seed}/student").stat() for seed in range(2)]
    assert sorted(file.name for file in Path("work/logs").iterdir()) == [
        "000-distill.log", "001-distill.log", "002-eval.log", "003-report.log"
    ]  # fmt: skip
    again = cli("recreate", protocol, "--out", "results")
    assert again.stdout.startswith("two students: 0 of 4 commands are left, ")
    assert [Path(f"runs/pd-{seed}/student").stat() for seed in range(2)] == students
    config = validate(RecreationConfig, read_yaml(protocol), "p")
    others = commands_of(config, Path("others"))
    assert left(others) == others[2:]  # another results folder has no results yet
    shutil.rmtree("runs/pd-1/student")
    commands = commands_of(config, Path("results"))
    assert left(commands) == commands[1:]  # what is gone is made again, and what follows from it


def test_a_command_is_run_again_where_its_protocol_has_changed(folder: Path) -> None:
    Path("mine.yaml").write_text("method: pd\n")
    config = content({"run": "distill --protocol mine.yaml --out runs/pd", "core_minutes": 1})
    (before,) = commands_of(validate(RecreationConfig, config, "p"), Path("results"))
    Path("mine.yaml").write_text("method: lcm\n")
    (after,) = commands_of(validate(RecreationConfig, config, "p"), Path("results"))
    assert before.done != after.done and before.log == after.log


def test_a_measurement_that_lacks_a_model_is_no_success(folder: Path, cli: Callable[..., Result]) -> None:
    rows = [{"name": "here", "model": "shapes", "steps": 1}, {"name": "gone", "model": "nobody/gone"}]
    few = {"num_prompts": 4, "reference_images": 4, "metrics": ["clip_score_shapes"]}
    Path("systems.yaml").write_text(yaml.safe_dump({"experiment": "systems", "systems": rows} | few))
    protocol = write({"run": "eval run systems.yaml --out {out}", "core_minutes": 0.1})
    result = cli("recreate", protocol, "--out", "results")
    assert result.exit_code == 1
    assert "could not measure everything (not here: gone: " in result.stderr
    assert not Path("work/done").exists() and list(Path("results/records").iterdir())


def test_a_failed_command_stops_those_after_it(folder: Path, cli: Callable[..., Result]) -> None:
    protocol = write(
        {"run": "eval score nowhere --reference shapes --out {out}", "core_minutes": 0.1},
        {"run": "report --results {out}", "core_minutes": 0.1},
    )
    result = cli("recreate", protocol, "--out", "results", "--quiet")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: ddil eval score nowhere --reference shapes --out results failed with exit status 2 (its log is "
        "work/logs/000-eval.log); mend the cause and run the same command again to go on\n"
    )
    assert "nowhere" in Path("work/logs/000-eval.log").read_text()
    assert not Path("work/logs/001-report.log").exists() and not Path("work/done").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_recreation_stops_its_commands(folder: Path, number: signal.Signals) -> None:
    protocol = write(
        {
            "run": f"{DISTILL} --set 'stages=[{{steps: 2, updates: 100000}}]' --no-ddil --out runs/long",
            "core_minutes": 1,
        }
    )
    command = [sys.executable, "-m", "ddil_eval.cli", "recreate", str(protocol), "--out", "results"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        log, until = Path("work/logs/000-distill.log"), time.monotonic() + 120
        while not Path("runs/long/log.jsonl").is_file():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    while Path("runs/long/.ddil.lock").exists():  # a killed recreation does not wait for its commands
        assert time.monotonic() < until + 60
        time.sleep(0.1)
    assert "stopped by SIGTERM" in log.read_text()  # the distillation saved its checkpoint before it ended
    assert not Path("work/done").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert err.splitlines()[-1] == (
            "stopped by SIGTERM: what was finished is kept; run the same command again to go on"
        )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            {"run": "sample --model shapes"},
            "the command 'sample --model shapes' is none of ddil's distill, eval, report",
        ),
        ({"run": "rm -rf /"}, "the command 'rm -rf /' is none of ddil's distill, eval, report"),
        ({"run": "distill 'open"}, 'the command "distill \'open" cannot be split into words: No closing quotation'),
        (
            {"run": "distill --seed {training_seed}"},
            "the command 'distill --seed {training_seed}' holds {training_seed}, and nothing says how many seeds there "
            "are: say training_seeds",
        ),
        (
            {"run": "distill --seed 0", "training_seeds": 2},
            "the command 'distill --seed 0' has 2 training_seeds and no place for them: write {training_seed} where "
            "the seed stands, or leave training_seeds out",
        ),
    ],
)
def test_a_command_that_is_not_ddils_is_refused(command: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongCommand) as caught:
        validate(RecreationConfig, content(command | {"core_minutes": 1}), "all.yaml")
    assert message in str(caught.value)


def test_the_time_depends_on_the_machine_and_its_cores(folder: Path) -> None:
    distillation = {"run": "distill --seed {training_seed} --out runs/{training_seed}", "training_seeds": 4}
    report = {"run": "report --results {out}", "core_minutes": 20}
    config = validate(RecreationConfig, content(distillation | {"core_minutes": 10}, report), "all.yaml")
    commands = commands_of(config, Path("results"))
    assert describe(config, commands, 2, 4, 500.0) == (
        "two students: 5 of 5 commands are left, of 60 minutes on one core whose speed is 1000. The speed here is "
        "500.0, with 4 cores, so that they take about 0:50:00"  # twice 40 / 2 + 20 / 4 minutes
    )
    assert measure_speed("cpu", 0.1) > 1


def test_the_shipped_recreation_makes_all_students_that_its_measurements_name(cli: Callable[..., Result]) -> None:
    """Every command can be parsed, and every model of the tables comes from one of the commands."""
    path = protocols() / "shapes" / "tables" / "all.yaml"
    config = validate(RecreationConfig, read_yaml(path), str(path))
    made, named = set(), set[str]()
    for command in commands_of(config, Path("results/mine")):
        if command.words[0] != "report":
            shown = cli(*command.words, "--print-protocol")
            assert shown.exit_code == 0, shown.output
            text = shown.stdout
        if command.words[0] == "distill":
            made.add(command.words[command.words.index("--out") + 1])
        elif command.words[0] == "eval":
            for seed in range(5 if "training_seed" in text else 1):
                named |= {word.strip("\"',]") for word in text.replace("{training_seed}", str(seed)).split()}
    students = {"/".join(word.split("/")[:3]) for word in named if word.startswith("runs/tables/")}
    # rows of three seeds are among those for which the loop above tries five
    assert {one for one in students if int(one[-1]) < 3} == {one for one in made if int(one[-1]) < 3}
    assert {one for one in made if int(one[-1]) >= 3} <= students
