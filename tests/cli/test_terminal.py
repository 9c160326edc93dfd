"""What commands send to a terminal: nothing with --quiet, pictures with --show, and no control character of a name."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from rich.console import Console

from ddil_core.support import progress as progress_module
from ddil_core.support.progress import note, progress, quiet, transfer, warn
from ddil_eval.cli import options
from ddil_eval.report.records import RecordedModel, save_record
from tests.records import p_teacher, system

Cli = Callable[..., Result]
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b1A\u202e=HYPERLINK(1)\r"


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.weights
def test_quiet_shows_results_alone(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIL_PROGRESS_EVERY", "0.001")
    result = cli("sample", "--prompt", "a small red circle", "--steps", 1, "--out", tmp_path / "a", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"1 image and {tmp_path / 'a' / 'grid.png'}\n"
    assert not progress_module.console.quiet  # the next command is not quiet


def test_quiet_leaves_warnings_and_errors(cli: Cli, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with quiet():
        note("a note")
        warn("a warning")
        with progress("stage", 2) as advance, transfer("fetch", 2) as received:
            advance(), received(2)
    assert capsys.readouterr().err == "warning: a warning\n"
    failed = cli("sample", "--prompt", "x", "--model", "absent", "--out", tmp_path / "a", "--quiet")
    assert failed.exit_code != 0 and failed.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "command",
    [
        ("sample", "--prompt", "x"),
        ("eval", "covariate-shift", "--student", "shapes"),
        ("eval", "prompt-inversion"),
    ],
    ids=" ".join,
)
def test_show_is_refused_before_any_work_where_it_cannot(cli: Cli, command: tuple[str, ...], tmp_path: Path) -> None:
    piped = cli(*command, "--out", tmp_path / "out", "--show")
    assert (piped.exit_code, piped.stderr.count("\n")) == (2, 1) and "stdout is a file or a pipe" in piped.stderr
    both = cli(*command, "--out", tmp_path / "out", "--show", "--json")
    assert both.exit_code == 2 and "leave out --show or --json" in both.stderr
    assert not (tmp_path / "out").exists() and "\x1b" not in piped.output + both.output


def test_pictures_are_shown_below_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (16, 8), (1, 2, 3))
    image.save(tmp_path / "a.png")
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    options.show_pictures([tmp_path / "a.png"], None)
    assert terminal.getvalue() == ""
    options.show_pictures([tmp_path / "a.png"], "kitty")
    match = re.fullmatch(r"(.*)\n\x1b_Gf=100,[^;]*;([^\x1b]*)\x1b\\\n", terminal.getvalue())
    assert match is not None and match[1] == str(tmp_path / "a.png")
    with Image.open(io.BytesIO(base64.b64decode(match[2]))) as shown:
        assert shown.tobytes() == image.tobytes()


def test_no_record_steers_the_terminal_or_a_spreadsheet(cli: Cli, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    named = {HOSTILE: RecordedModel(reference=HOSTILE, weights_sha256=None)}
    save_record(system("=1+1", 4, recipe=HOSTILE, systems=named), new)
    save_record(p_teacher(0.8, systems={"teacher": named[HOSTILE], "student": named[HOSTILE]}), new)
    save_record(system("=1+1", 4, recipe=HOSTILE, systems=named, versions={HOSTILE: "1"}), old)
    save_record(system(HOSTILE, 4, recipe=HOSTILE), old)
    for arguments in ((), ("--json",), ("--against", old, "--csv"), ("--against", old, "--json"), ("--csv",)):
        result = cli("report", "--results", new, *arguments)
        assert result.exit_code == 0 and harmless(result.stdout + result.stderr), arguments
        if arguments == ("--json",):  # a program reads the names as they are
            assert HOSTILE in json.loads(result.stdout)["tables"][0]["caption"]
    files = list((new / "report").rglob("*.csv"))
    assert len(files) > 3
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert harmless(text) and not re.search(r'(^|,)"?[=+@]', text, re.MULTILINE)


def test_no_argument_and_no_file_name_steers_the_terminal(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / HOSTILE).mkdir()
    (tmp_path / HOSTILE / "a.png").write_bytes(b"no image")
    for arguments in (
        (HOSTILE,), ("eval", HOSTILE), ("report", f"--{HOSTILE}"), ("report", "--results", tmp_path / HOSTILE),
        ("eval", "score", tmp_path / HOSTILE, "--reference", tmp_path / HOSTILE, "--out", tmp_path / "out"),
        ("eval", "run", tmp_path / HOSTILE / "a.png"),
    ):  # fmt: skip
        result = cli(*arguments)
        assert result.exit_code in (1, 2) and result.stderr and harmless(result.output), arguments


@pytest.mark.parametrize("terminal", [False, True])
def test_no_title_steers_the_terminal_or_is_read_as_markup(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=200, color_system=None, _environ={"TERM": "xterm"})
    monkeypatch.setattr(progress_module, "console", console)
    monkeypatch.setenv("DDIL_PROGRESS_EVERY", "0.01")
    title = f"[/red]{HOSTILE}"
    with progress(title, 1) as advance, transfer(title, 1) as received:
        progress_module.time.sleep(0 if terminal else 0.1)
        advance(1, note=HOSTILE), received(1)
    note(title), warn(title)
    text = screen.getvalue() + capsys.readouterr().err
    assert r"[/red]\x1b]0;owned\x07" in text
    assert "\x1b]0;" not in text and "\x07" not in text and "\u202e" not in text and "\x9b" not in text
