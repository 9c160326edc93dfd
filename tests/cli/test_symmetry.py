"""Commands that do the same have the same options, by every name."""

from __future__ import annotations

import click
import pytest

from ddil_eval.cli.evaluate import evaluate

COMMON = {"--seed", "--out", "--set", "--device", "--json"}
"""Options of every experiment."""
MEASURING = {"--recipe", "--metrics", "--reference-images", "--reference-pictures", "--num-images", "--protocol"}
"""Options of every experiment that measures images by a recipe."""


def names(command: str) -> set[str]:
    return {name for parameter in evaluate.commands[command].params for name in parameter.opts}


def test_all_experiments_have_the_common_options() -> None:
    for command in evaluate.commands:
        assert names(command) >= COMMON, command


@pytest.mark.parametrize("command", ["covariate-shift", "systems", "score"])
def test_all_that_measures_by_a_recipe_takes_the_same_options(command: str) -> None:
    assert names(command) >= MEASURING


def test_the_number_of_images_has_both_names_where_a_prompt_gives_one() -> None:
    for command in ("covariate-shift", "systems"):
        assert {"--num-images", "--num-prompts"} <= names(command)


SEVERAL = {
    "--num-images": {"num_images", "num_prompts"},
    "--model": {"models"},
    "--student": {"student", "students"},
}
"""Options that fill keys of several names: an image is a prompt where each prompt gives one; a command takes one or many."""


def test_no_option_has_two_meanings() -> None:
    """One name is one parameter in all commands."""
    meaning: dict[str, str] = {}
    for command in evaluate.commands.values():
        for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
            for name in option.opts:
                expected = SEVERAL.get(name)
                known = meaning.setdefault(name, str(option.name))
                assert option.name in (expected or {known}), f"{name} is {option.name} and {known}"
