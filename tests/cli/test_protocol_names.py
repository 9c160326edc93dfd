"""A shipped protocol is found by its name from any folder, by each command and function that takes a protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result

from ddil_core.distillation.methods import read_config
from ddil_core.support.resources import find_protocol, protocols
from ddil_eval.cli import COMMANDS, ddil

NEEDED: dict[str, tuple[str, ...]] = {
    "distill": ("--out", "out"),
    "eval covariate-shift": ("--student", "shapes", "--out", "out"),
    "eval drift": ("--student", "shapes", "--out", "out"),
    "eval systems": ("--model", "shapes", "--data", "shapes", "--out", "out"),
    "eval run": ("--out", "out"),
    "eval score": (".", "--reference", "shapes", "--out", "out"),
    "eval prompt-inversion": ("--out", "out"),
    "study": ("--out", "out"),
    "recreate": ("--out", "out"),
    "doctor": ("--model", "shapes", "--method", "lcm"),
}
"""What each command that takes a protocol needs beside it."""


def with_a_protocol(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the names of the commands that take a protocol."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from with_a_protocol(command.get_command(context, name), (*words, name))  # type: ignore[arg-type]
    elif any(parameter.name == "protocol" for parameter in command.params):
        yield " ".join(words)


def test_these_commands_take_a_protocol() -> None:
    assert set(COMMANDS) >= {"distill", "eval"}
    assert set(with_a_protocol(ddil)) == set(NEEDED)


@pytest.mark.parametrize("named", ["protocols/shapes/lcm.yaml", "shapes/lcm.yaml"])
@pytest.mark.parametrize("command", NEEDED)
def test_each_command_finds_a_shipped_protocol(
    command: str, named: str, cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands refuse what the file holds, so they have read the protocol that their message names."""
    monkeypatch.chdir(tmp_path)
    where = [named] if command in ("eval run", "study", "recreate") else ["--protocol", named]
    result = cli(*command.split(), *NEEDED[command], *where, "--set", "no_such_key=1")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {protocols() / 'shapes' / 'lcm.yaml'} ")
    assert "the unknown key" in result.stderr or "lacks the key" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_python_finds_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_config("protocols/shapes/lcm.yaml").method == "lcm"


def test_a_file_of_the_user_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = Path("shapes/pd.yaml")
    mine.parent.mkdir()
    assert find_protocol(mine) == protocols() / "shapes" / "pd.yaml"
    mine.write_text("method: lcm\n")
    assert find_protocol(mine) == mine
    for other in (
        Path("shapes/none.yaml"),
        Path("protocols"),
        Path("protocols/../pyproject.toml"),
        tmp_path / "a.yaml",
    ):
        assert find_protocol(other) == other
