"""Every command on a page of the documentation is run at a small size, or parsed where it needs more than a test has.

``commands.yaml`` says which; a command without a row fails. The commands of all pages share one folder, in the order of
the site's navigation, so that a later command finds what an earlier one made. ``python -m tests.docs`` lists them.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from click.testing import CliRunner

from ddil_core.support.errors import DdilError
from ddil_eval.cli import ddil
from tests.docs.desk import furnish
from tests.docs.pages import ROOT, Command, commands, pages, table

PAGES = [page for page in pages() if commands(page)]
ROWS, STRAY = table()

SHOW = "--show"
"""Commands with this option run in what looks like a terminal of Kitty's protocol."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder of all commands."""
    folder, hub = tmp_path_factory.mktemp("desk"), tmp_path_factory.mktemp("hub")
    furnish(folder, hub)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
        patch.chdir(folder)
        yield folder
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)  # other modules of tests made theirs when they were imported


def test_every_command_has_a_row_and_every_row_a_command() -> None:
    found = {command for page in PAGES for command in commands(page)}
    assert sorted(map(str, found - ROWS.keys())) == [], "python -m tests.docs --missing prints the rows"
    assert STRAY == []


def test_every_command_that_is_skipped_says_why() -> None:
    assert all(row.note for row in ROWS.values() if row.mode == "skip")


@pytest.mark.docs
@pytest.mark.weights
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page: str, desk: Path, request: pytest.FixtureRequest) -> None:
    all_of_them = "docs" in request.config.option.markexpr
    wrong = []
    for command in commands(page):
        row = ROWS[command]
        started = time.process_time()
        if row.mode == "parse" or (row.mode == "long" and not all_of_them):
            problem = parsed(command)
        elif row.mode in ("run", "long"):
            problem = ran(command, row.note)
        else:
            continue
        print(f"{time.process_time() - started:5.1f} s  {command.text}")
        if problem:
            wrong.append(f"{command.text}\n    {problem}")
    assert not wrong, "\n".join(wrong)


def ran(command: Command, small: str) -> str:
    """Run a command with small arguments appended. Return what went wrong, or nothing."""
    text, _, file = command.text.partition(" > ")
    called = found(f"{text} {small}")
    assert called is not None, f"{command.text}: a test cannot run this; parse or skip it"
    AcceleratorState._reset_state(reset_partial_state=True)  # one process runs all commands, in different precisions
    with pytest.MonkeyPatch.context() as patch:
        if SHOW in called[1]:
            patch.setenv("DDIL_SHOW", "kitty")
            patch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True)
        result = CliRunner().invoke(*called)
    if SHOW in called[1] and "\x1b_G" not in result.stdout:
        return f"it shows no picture: {result.stderr.strip()[-1500:]}"
    if file:
        Path(file).write_text(result.stdout, encoding="utf-8")
    if result.exit_code == 0:
        return ""
    return f"exit status {result.exit_code}: {result.stderr.strip()[-1500:]} {result.exception or ''}"


def parsed(command: Command) -> str:
    """Parse a command, and print the protocol that it would use where it can. Return what went wrong, or nothing."""
    text = command.text.partition(" > ")[0]
    called = found(text)
    if called is None:
        target = text.split()[1]
        return "" if re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) else "no such target"
    program, words = called
    last, rest = innermost(program, list(words))
    try:
        last.make_context(last.name, list(rest)).close()
    except (click.UsageError, DdilError) as error:
        return str(error)
    if any("--print-protocol" in option.opts for option in last.params):
        result = CliRunner().invoke(program, [*(word for word in words if word != SHOW), "--print-protocol"])
        return "" if result.exit_code == 0 else result.stderr.strip()
    return ""


def found(text: str) -> tuple[click.Command, list[str]] | None:
    """Return the click command of a line and its arguments; None for a target of make.

    ``torchrun`` and ``accelerate launch`` are taken as one process.
    """
    words = shlex.split(text)
    if words[0] == "make":
        return None
    if words[0] == "ddil":
        return ddil, words[1:]
    if "-m" in words:
        place = words.index("-m") + 1
        return _main(words[place]), words[place + 1 :]
    specification = importlib.util.spec_from_file_location("script", ROOT / words[1])
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script.main, words[2:]


def _main(module: str) -> click.Command:
    """Return the click command of ``python -m module``."""
    if module == "ddil_eval.cli":
        return ddil
    imported = importlib.import_module(module)
    if hasattr(imported, "__path__"):
        imported = importlib.import_module(f"{module}.__main__")
    main = next((value for value in vars(imported).values() if isinstance(value, click.Command)), None)
    assert main is not None, f"{module} has no command of click"
    return main


def innermost(command: click.Command, words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the sub-command that a line ends in, and its arguments."""
    while isinstance(command, click.Group) and words:
        inner = command.get_command(click.Context(command), words[0])
        if inner is None:
            break
        command, words = inner, words[1:]
    return command, words
