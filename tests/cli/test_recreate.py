"""``ddil recreate``: all commands of a protocol, in their order, each once, also after a stop or a failure."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from click.testing import Result

from ddil_core.support.errors import WrongCommand
from ddil_core.support.progress import ProgressLines
from ddil_core.support.protocol import read_yaml, validate
from ddil_core.support.resources import protocols
from ddil_eval.cli import recreating, speed
from ddil_eval.cli.forecast import LATE, Forecast
from ddil_eval.cli.recreating import describe
from ddil_eval.cli.recreation import RecreationConfig, commands_of, left
from ddil_eval.cli.speed import measure_speed

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


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of this machine is known: other tests measure it."""
    monkeypatch.setattr(speed, "this_machine", lambda cores: speed.Machine("cpu", 100.0, cores))


def write(*commands: dict[str, Any]) -> Path:
    Path("all.yaml").write_text(yaml.safe_dump(content(*commands)))
    return Path("all.yaml")


def stop(*_: object) -> bool:
    raise KeyboardInterrupt


def test_all_commands_run_once(folder: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = write(
        {"run": f"{DISTILL} --no-ddil --seed {{training_seed}} --out runs/pd-{{training_seed}}",
         "training_seeds": 2, "core_minutes": 0.1},
        {"run": f"{DRIFT} --out {{out}}", "core_minutes": 0.1},
        {"run": "report --results {out} --csv", "core_minutes": 0.1},
    )  # fmt: skip
    result = cli("recreate", protocol, "--out", "results", "--jobs", 2)
    assert result.exit_code == 0, result.output
    first, *others = result.stdout.splitlines()
    assert first.startswith(
        "two students: 4 of 4 commands are left. On one core of the speed 1000 they take 0:00:24; here, on "
    )
    assert others == ["Logs are in work/logs", "All is in results; tables with: ddil report --results results"]
    said = [re.sub(r"took \d:\d\d:\d\d$", "took a time", line) for line in result.stderr.splitlines()]
    measuring, *ended = [line for line in said if not line.startswith("commands: ")]
    assert measuring == "measuring the speed of this machine"
    assert sorted(ended[:2]) == [f"distill runs/pd-{seed} took a time" for seed in range(2)]
    assert ended[2:] == ["eval drift took a time", "report took a time"]
    assert list(Path("results/report").rglob("*.csv"))
    students = [Path(f"runs/pd-{seed}/student").stat() for seed in range(2)]
    assert sorted(file.name for file in Path("work/logs").iterdir()) == [
        "000-distill.log", "001-distill.log", "002-eval.log", "003-report.log"
    ]  # fmt: skip
    again, listed = (cli("recreate", protocol, "--out", "results", *dry) for dry in ((), ("--dry-run",)))
    assert (again.stdout.splitlines(), again.stderr) == (
        ["two students: all 4 commands are done", "All is in results; tables with: ddil report --results results"],
        "",
    )
    assert listed.stdout.splitlines()[-2:] == [
        "ddil report --results results --csv  # done",
        *again.stdout.splitlines()[:1],
    ]
    assert [Path(f"runs/pd-{seed}/student").stat() for seed in range(2)] == students
    config = validate(RecreationConfig, read_yaml(protocol), "p")
    others = commands_of(config, Path("others"))
    assert left(others) == others[2:]  # another results folder has no results yet
    commands = commands_of(config, Path("results"))
    record = next(Path("results/records").iterdir()).rename("record.json")
    assert left(commands) == commands[2:]  # one record is gone
    record.rename(Path("results/records") / "again.json")
    assert left(commands) == commands[2:]
    shutil.rmtree("runs/pd-1/student")
    commands = commands_of(config, Path("results"))
    assert left(commands) == commands[1:]  # what is gone is made again, and what follows from it
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(recreating._Processes, "begin", stop)
        recreating.recreate(commands, Forecast(1, 1, 1.0))
    cli(*commands[1].words)
    commands[1].finish(set())
    assert left(commands) == commands[2:]  # stopped before they began: they are still of the former student


def test_a_damaged_record_is_refused_before_anything_runs(folder: Path, cli: Callable[..., Result]) -> None:
    protocol = write({"run": "eval score nowhere --reference shapes --out {out}", "core_minutes": 0.1})
    record = Path("results/records/score.json")
    record.parent.mkdir(parents=True)
    record.write_text("{")
    result = cli("recreate", protocol, "--out", "results")
    assert result.exit_code == 1 and not Path("work/logs").exists()
    assert result.stderr.startswith(f"error: The record {record.resolve()} is damaged (it is no JSON: ")
    assert result.stderr.endswith(": move it away and run its measurement again.\n")


def test_a_command_is_run_again_where_its_protocol_has_changed(folder: Path) -> None:
    Path("mine.yaml").write_text("method: pd\n")
    config = content({"run": "distill --protocol mine.yaml --out runs/pd", "core_minutes": 1})
    (before,) = commands_of(validate(RecreationConfig, config, "p"), Path("results"))
    Path("mine.yaml").write_text("method: lcm\n")
    (after,) = commands_of(validate(RecreationConfig, config, "p"), Path("results"))
    assert before.done != after.done and before.log == after.log


@pytest.mark.usefixtures("measured")
def test_a_measurement_that_lacks_a_model_is_no_success(folder: Path, cli: Callable[..., Result]) -> None:
    rows = [{"name": "here", "model": "shapes", "steps": 1}, {"name": "gone", "model": "nobody/gone"}]
    few = {"num_prompts": 4, "reference_images": 4, "metrics": ["clip_score_shapes"]}
    Path("systems.yaml").write_text(yaml.safe_dump({"experiment": "systems", "systems": rows} | few))
    protocol = write({"run": "eval run systems.yaml --out {out}", "core_minutes": 0.1})
    result = cli("recreate", protocol, "--out", "results")
    assert result.exit_code == 1
    assert "error: eval run systems.yaml could not measure everything (not here: gone: " in result.stderr
    assert not Path("work/done").exists() and list(Path("results/records").iterdir())


@pytest.mark.usefixtures("measured")
def test_a_failed_command_stops_those_after_it(folder: Path, cli: Callable[..., Result]) -> None:
    protocol = write(
        {"run": "eval score nowhere --reference shapes --out {out}", "core_minutes": 0.1},
        {"run": "report --results {out}", "core_minutes": 0.1},
    )
    result = cli("recreate", protocol, "--out", "results", "--quiet")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: eval score nowhere failed with exit status 2 (there is no folder nowhere with images to score); its "
        "log is work/logs/000-eval.log. Mend the cause and run the same command again to go on\n"
    )
    assert Path("work/logs/000-eval.log").read_text() == (
        "$ ddil eval score nowhere --reference shapes --out results\n"
        "error: there is no folder nowhere with images to score\n"
    )
    assert not Path("work/logs/001-report.log").exists() and not Path("work/done").exists()


LONG = 600.0
"""Seconds that a process may take on a machine that is busy with other work."""


def wait(until: Callable[[], bool]) -> None:
    last = time.monotonic() + LONG
    while not until():
        assert time.monotonic() < last
        time.sleep(0.1)


@contextmanager
def begun(protocol: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A recreation as a process, once its student in ``runs/long`` trains. It ends with the block."""
    command = [sys.executable, "-m", "ddil_eval.cli", "recreate", str(protocol), "--out", "results", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait(lambda: Path("runs/long/log.jsonl").is_file() or process.poll() is not None)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_recreation_stops_its_commands(folder: Path, number: signal.Signals) -> None:
    protocol = write(
        {
            "run": f"{DISTILL} --set 'stages=[{{steps: 2, updates: 100000}}]' --no-ddil --out runs/long",
            "core_minutes": 1,
        }
    )
    with begun(protocol, "--quiet") as process:
        process.send_signal(number)
        _, err = process.communicate(timeout=LONG)
    wait(lambda: not Path("runs/long/.ddil.lock").exists())  # a killed recreation does not wait for its commands
    log = Path("work/logs/000-distill.log").read_text()
    assert "stopped by SIGTERM" in log  # the distillation saved its checkpoint before it ended
    assert not Path("work/done").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert err == "stopped by SIGTERM: what was finished is kept; run the same command again to go on\n"


def test_a_command_that_is_killed_stops_those_after_it_alone(folder: Path) -> None:
    """What runs beside it is finished, and its work is kept: the same command makes the rest."""
    long = DISTILL.replace("steps: 2, updates: 2", "steps: 2, updates: 100000")
    protocol = write(
        {"run": f"{long} --no-ddil --out runs/long", "core_minutes": 1},
        {"run": f"{DISTILL} --no-ddil --seed 1 --out runs/short", "core_minutes": 1},
        {"run": "report --results {out}", "core_minutes": 1},
    )
    with begun(protocol, "--jobs", "2") as process:
        (killed,) = (child for child in psutil.Process(process.pid).children() if child.cmdline()[-1] == "runs/long")
        killed.kill()
        _, err = process.communicate(timeout=LONG)
    assert process.returncode == 1
    assert err.splitlines()[-1] == (
        "error: distill runs/long was ended by another program with SIGKILL, as a machine does that lacks memory; its "
        "log is work/logs/000-distill.log. Mend the cause and run the same command again to go on"
    )
    todo = left(commands_of(validate(RecreationConfig, read_yaml(protocol), "p"), Path("results")))
    assert [command.name for command in todo] == ["distill runs/long", "report"]
    assert not Path("work/logs/002-report.log").exists()


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("eval run nowhere.yaml --out {out}", "there is no protocol nowhere.yaml"),
        ("distill --protocol=nowhere.yaml --out runs/b", "there is no protocol nowhere.yaml"),
        ("report --results {out} --zebra", "No such option"),
        ("eval drifts --out {out}", "there is no command 'drifts'"),
        ("eval", "there is no command ''"),
    ],
)
def test_a_command_that_cannot_run_is_refused_before_the_first_one_runs(
    last: str, message: str, folder: Path, cli: Callable[..., Result]
) -> None:
    protocol = write({"run": f"{DISTILL} --out runs/a", "core_minutes": 1}, {"run": last, "core_minutes": 1})
    result = cli("recreate", protocol, "--out", "results")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: ddil {last.replace('{out}', 'results')} cannot run: {message}")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["all.yaml"]


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
    assert describe(config, commands, Forecast(jobs=2, cores=4, slowness=2.0)) == (
        "two students: 5 of 5 commands are left. On one core of the speed 1000 they take 1:00:00; here, on 4 cores of "
        "the speed 500.0, they take about 0:50:00"  # twice 40 / 2 + 20 / 4 minutes
    )
    assert measure_speed("cpu", 0.1) > 1


def test_the_longest_of_the_distillations_begin_first(folder: Path) -> None:
    rows = [
        ("distill --out a", 1),
        ("distill --out b", 3),
        ("distill --out c", 3),
        ("eval a", 9),
        ("distill --out d", 5),
    ]
    config = validate(RecreationConfig, content(*({"run": run, "core_minutes": m} for run, m in rows)), "all.yaml")
    names = [command.name for command in left(commands_of(config, Path("results")))]
    assert names == ["distill b", "distill c", "distill a", "eval a", "distill d"]


def test_a_forecast_follows_the_commands_that_ended(folder: Path) -> None:
    """Three distillations of 10 minutes, a measurement of 12 and a report of 2, on two cores."""
    distillations = {"run": "distill --seed {training_seed} --out runs/{training_seed}", "training_seeds": 3}
    others = [
        {"run": f"{words} --out results", "core_minutes": minutes} for words, minutes in (("eval a", 12), ("eval b", 2))
    ]
    config = validate(RecreationConfig, content(distillations | {"core_minutes": 10}, *others), "all.yaml")
    first, _, third, measurement, report = commands = commands_of(config, Path("results"))
    forecast = Forecast(jobs=2, cores=2, slowness=1.0)

    def minutes(waiting: int, **running: float) -> float:
        began = {commands[int(number[1:])]: 60 * since for number, since in running.items()}
        return forecast.left(commands[waiting:], began) / 60

    assert minutes(0) == 20 + 6 + 1  # the third waits for a job
    assert minutes(2, _0=4, _1=9) == pytest.approx(1 + 10 + 6 + 1)
    assert minutes(4, _3=2) == pytest.approx(4 + 1)
    assert minutes(5, _4=3) == pytest.approx(3 / LATE)  # later than expected
    forecast.learn(first, 60 * 15)
    assert minutes(2, _1=5) == pytest.approx(15 + 9 + 1.5)  # measurements too, until one has ended
    forecast.learn(measurement, 60 * 12)
    assert (
        minutes(4) == pytest.approx(2) and minutes(3) == pytest.approx(12 + 2) and minutes(2) == pytest.approx(15 + 14)
    )
    crowded = Forecast(jobs=4, cores=2, slowness=1.0)
    assert crowded.expected(third) == 60 * 20 and crowded.expected(report) == 60


def test_a_line_names_what_runs_and_says_how_much_is_left() -> None:
    lines = ProgressLines(
        "commands", 12, 2, 60.0, print, lambda: 0.0, note="distill runs/a and 1 more", left=lambda: 754.6
    )
    assert lines.line(65.0) == "commands: 2 of 12 (17%), 0:01:05 so far, 0:12:35 left, distill runs/a and 1 more"


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
