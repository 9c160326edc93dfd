"""The references of commands and of protocols are generated from the code, and up to date."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from ddil_eval.cli import COMMANDS, protocol_reference
from ddil_eval.cli.command_reference import _command, reference, render


@pytest.mark.parametrize("page", [reference, protocol_reference.reference], ids=["commands", "protocols"])
def test_the_committed_reference_is_current(cli: Callable[..., Result], page: click.Command) -> None:
    result = cli("--check", command=page)
    assert (result.exit_code, result.stderr) == (0, "")


def test_the_reference_of_protocols_has_every_key_once_in_its_section() -> None:
    from ddil_core.distillation.methods import METHODS
    from ddil_eval.experiments.experiments import EXPERIMENTS

    text = protocol_reference.render()
    for rows in (METHODS, EXPERIMENTS):
        for row in rows.values():
            assert all(f"\n- `{name}` (" in text for name in row.config.model_fields)
    for key in (
        "ddil.phases.0.until",
        "stages.0.updates",
        "watch.every",
        "lora.rank",
        "systems.0.model",
        "clip.prefix",
    ):
        assert f"\n- `{key}` (" in text
    assert "\n- `learning_rate` (default `0.0003`): " in text
    assert max(map(len, text.splitlines())) <= 120


def test_every_command_has_a_section() -> None:
    headings = [line for line in render().splitlines() if line.startswith("## ")]
    assert "## `ddil`" in headings
    assert all(f"## `ddil {name}`" in headings for name in COMMANDS)
    assert "## `ddil eval covariate-shift`" in headings


def test_every_option_says_what_it_is() -> None:
    heading, silent = "", []
    for line in render().splitlines():
        heading = line if line.startswith("## ") else heading
        silent += [f"{heading}: {line}"] if line.startswith("- `") and line.endswith(":") else []
    assert silent == []


def test_a_stale_reference_is_one_sentence_and_exit_status_1(cli: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "commands.md"
    file.write_text("old")
    result = cli("--check", "--file", file, command=reference)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {file} is out of date: run `make docs` and commit it.\n"
    assert file.read_text() == "old"
    assert cli("--file", file, command=reference).exit_code == 0
    assert cli("--check", "--file", file, command=reference).exit_code == 0


def test_a_missing_folder_is_one_sentence(cli: Callable[..., Result], tmp_path: Path) -> None:
    result = cli("--file", tmp_path / "none" / "commands.md", command=reference)
    assert result.exit_code == 1
    assert "is not a folder" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "row"),
    [
        (click.Option(["--steps"], type=int, default=4, help="Steps."), "- `--steps N` (default `4`): Steps.\n"),
        (click.Option(["--out"], type=click.Path(), required=True), "- `--out PATH` (required):\n"),
        (
            click.Option(["--ddil/--no-ddil"], default=True, help="Or | not."),
            "- `--ddil`, `--no-ddil` (default `--ddil`): Or | not.\n",
        ),
        (click.Option(["--json"], is_flag=True, help="Print JSON."), "- `--json`: Print JSON.\n"),
        (
            click.Option(["--set"], metavar="KEY=VALUE", multiple=True, help="Set."),
            "- `--set KEY=VALUE`: Set. May be given several times.\n",
        ),
        (click.Option(["--solver"], type=click.Choice(["ddim", "lcm"])), "- `--solver ddim | lcm`:\n"),
        (click.Option(["--hidden"], hidden=True), ""),
    ],
)
def test_an_option_is_one_row(option: click.Option, row: str) -> None:
    command = click.Command("try", params=[option])
    lines = "".join(_command(command, click.Context(command, info_name="try"))).splitlines(keepends=True)
    assert "".join(line for line in lines if line.startswith("- `")) == row
