"""Progress without a terminal: a line now and then, in a time that the test sets, and from a stage of a real command."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import Result

from ddil_core.support.errors import WrongCommand
from ddil_core.support.progress import EVERY, INTERVAL, ProgressLines, interval, progress, rate, transfer


@dataclass
class Stage:
    """Lines of a stage whose clock stands until the test moves it."""

    total: int = 256
    done: int = 0
    every: float = 60.0
    now: float = 1000.0
    written: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lines = ProgressLines(
            "rollouts", self.total, self.done, self.every, lambda line: self.written.append(line), lambda: self.now
        )

    def after(self, seconds: float, steps: int = 0) -> list[str]:
        """Let time pass, finish steps, and return the lines that this gave."""
        self.now += seconds
        self.lines.done += steps
        self.lines.tick()
        found, self.written[:] = list(self.written), []
        return found


def without_memory(line: str) -> str:
    return re.sub(r", \d+\.\d GiB.*", "", line)


def test_the_first_line_comes_after_ten_seconds_and_then_one_each_minute() -> None:
    stage = Stage()
    assert stage.after(9.9) == []
    (first,) = stage.after(0.1, steps=20)
    assert without_memory(first) == "rollouts: 20 of 256 (8%), 2.0/s, 0:00:10 so far, 0:01:58 left"
    assert re.search(r", \d+\.\d GiB$", first)
    assert stage.after(59.9) == []
    assert stage.lines.wait() == pytest.approx(0.1)
    (second,) = stage.after(0.1)
    assert without_memory(second) == "rollouts: 20 of 256 (8%), 3.5 s each, 0:01:10 so far, 0:13:46 left"


def test_a_stage_that_goes_on_counts_its_own_steps_for_the_rate() -> None:
    (line,) = Stage(done=200).after(10.0, steps=14)
    assert without_memory(line) == "rollouts: 214 of 256 (84%), 1.4/s, 0:00:10 so far, 0:00:30 left"


def test_nothing_is_promised_before_the_first_step() -> None:
    (line,) = Stage().after(10.0)
    assert without_memory(line) == "rollouts: 0 of 256 (0%), –, 0:00:10 so far, time left not known yet"


def test_a_long_step_is_told_in_one_line_and_the_next_is_a_whole_interval_later() -> None:
    stage = Stage()
    assert len(stage.after(5000.0)) == 1
    assert stage.lines.wait() == 60.0


def test_the_end_is_told_where_lines_were_written_and_only_there() -> None:
    short, long = Stage(), Stage()
    short.after(9.0, steps=256)
    short.lines.finish()
    assert short.written == []
    long.after(10.0)
    long.after(6.0, steps=256)
    long.lines.note = "loss 0.1"
    long.lines.finish()
    (line,) = long.written
    assert without_memory(line) == "rollouts: 256 of 256 (100%), 16.0/s, 0:00:16 so far" and line.endswith(", loss 0.1")


def test_a_short_interval_holds_for_the_first_line_too() -> None:
    assert Stage(every=5.0).lines.wait() == 5.0


@pytest.mark.parametrize(("speed", "text"), [(None, "–"), (0.0, "–"), (2.0, "2.0/s"), (0.01, "100.0 s each")])
def test_rate(speed: float | None, text: str) -> None:
    assert rate(speed) == text


def test_the_interval_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(INTERVAL, raising=False)
    assert interval() == EVERY == 60.0
    for text, seconds in (("", 60.0), ("5", 5.0), ("0.5", 0.5), ("0", 0.0)):
        monkeypatch.setenv(INTERVAL, text)
        assert interval() == seconds
    for text in ("often", "-1", "nan", "inf"):
        monkeypatch.setenv(INTERVAL, text)
        with pytest.raises(WrongCommand) as error:
            interval()
        assert str(error.value) == (
            f"the environment variable DDIL_PROGRESS_EVERY holds {text!r}, and it takes the seconds between two lines "
            "of progress, such as 60; 0 prints none"
        )


def test_a_command_refuses_a_wrong_interval_before_any_work(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(INTERVAL, "often")
    result = cli("sample", "--prompt", "a", "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: the environment variable DDIL_PROGRESS_EVERY holds 'often', ")
    assert not (tmp_path / "out").exists()


def test_lines_come_while_one_step_lasts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The thread writes them: ``advance`` is called once, at the end."""
    monkeypatch.setenv(INTERVAL, "0.02")
    found = ""
    with progress("one step", total=1) as advance:
        deadline = time.monotonic() + 20
        while found.count("one step: 0 of 1 (0%), –") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
            found += capsys.readouterr().err
        advance()
    found += capsys.readouterr().err
    assert found.count("one step: 0 of 1 (0%), –") >= 2
    assert without_memory(found.splitlines()[-1]).startswith("one step: 1 of 1 (100%), ")


def test_zero_prints_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(INTERVAL, "0")
    with progress("quiet", total=1) as advance:
        time.sleep(0.05)
        advance()
    assert capsys.readouterr().err == ""


def test_a_download_is_told_in_mebibytes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(INTERVAL, "0.02")
    found = ""
    with transfer("weights", total=8 * 2**20) as advance:
        advance(2 * 2**20)
        deadline = time.monotonic() + 20
        while "2.0 MiB of" not in found and time.monotonic() < deadline:
            time.sleep(0.01)
            found += capsys.readouterr().err
    assert re.search(r"weights: 2\.0 MiB of 8\.0 MiB \(25%\), [\d,.]+ MiB/s, 0:00:0\d so far, 0:0\d:\d\d left, ", found)


def test_an_error_ends_the_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(INTERVAL, "0.02")
    with pytest.raises(ZeroDivisionError), progress("broken", total=2):
        math.log(1 // 0)
    capsys.readouterr()
    time.sleep(0.06)
    assert capsys.readouterr().err == ""
