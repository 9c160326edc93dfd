"""A data set of another package in every command that takes ``--data``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.toy_data import install


def test_every_command_takes_a_data_set_of_another_package(
    cli: Callable[..., Result], teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path)
    assert "toy:NUMBER" in cli("data", "--json").stdout
    toy = ("--data", "toy:5", "--device", "cpu")
    pair = ("--teacher", teacher, "--student", student)
    few = ("--set", "recipe=shapes", "--set", "metrics=[fd_efflite0]", "--set", "reference_images=4")
    commands = (
        ("distill", "--teacher", teacher, *toy, "--set", "stages=[{steps: 4, updates: 1}]", "--set", "pool=16",
         "--set", "batch_size=8"),
        ("eval", "coco", "--model", student, *toy, "--num-images", 4, "--steps", 1, *few),
        ("eval", "covariate-shift", *pair, *toy, "--num-prompts", 4, *few, "--p-teacher", "0.5", "--switch",
         "500", "--set", "figure_prompts=1"),
        ("eval", "prompt-inversion", "--teacher", teacher, "--model", student, *toy, "--num-images", 2, "--inverter",
         "random", "--set", "towers=shapes", "--set", "images_per_prompt=2", "--set",
         "inverters={random: {tokens: 4}}"),
    )  # fmt: skip
    for number, command in enumerate(commands):
        result = cli(*command, "--out", tmp_path / str(number))
        assert result.exit_code == 0, (command[:2], result.stderr)
