"""Configuration: options over a file, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import Strict, content_hash, override, read_yaml, renamed, validate

STAGES = [{"steps": 8, "updates": 10}, {"steps": 4, "updates": 10}]
PHASES = [{"until": 0.6, "aggregated": 0.25, "p_teacher": 0.85}, {"until": 1.0, "aggregated": 0.5, "p_teacher": 0.2}]
CONTENT: dict[str, Any] = {"stages": STAGES, "ddil": {"uses": 1, "phases": PHASES}}


def refused(content: dict[str, Any]) -> str:
    with pytest.raises(WrongCommand) as error:
        validate(ProgressiveConfig, content, "pd.yaml")
    return str(error.value)


def test_settings_go_over_a_protocol_without_changing_it() -> None:
    changed = override(CONTENT, ["ddil.uses=2", "stages.1.updates=99", "learning_rate=1e-5", "reflection.mode=fold"])
    config = validate(ProgressiveConfig, changed, "pd.yaml")
    assert config.ddil is not None
    assert (config.ddil.uses, config.stages[1].updates, config.learning_rate) == (2, 99, 1e-5)
    assert config.reflection.mode == "fold"
    assert CONTENT["ddil"]["uses"] == 1
    assert validate(ProgressiveConfig, override(CONTENT, ["ddil=null"]), "pd.yaml").ddil is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rate", "--set takes KEY=VALUE, not 'learning_rate'"),
        ("=3", "--set takes KEY=VALUE, not '=3'"),
        ("stages.7.updates=1", "--set 'stages.7.updates=1' names no place in the protocol"),
        ("stages.first.updates=1", "--set 'stages.first.updates=1' names no place in the protocol"),
        ("ddil.uses.more=1", "--set 'ddil.uses.more=1' names no place in the protocol"),
        ("seed=[1", "--set 'seed=[1' has a value that is not YAML"),
    ],
)
def test_settings_that_cannot_be_meant(setting: str, message: str) -> None:
    with pytest.raises(WrongCommand) as error:
        override(CONTENT, [setting])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lerning_rate=1", "pd.yaml has the unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ("ddil.use=2", "pd.yaml has the unknown key 'ddil.use'; did you mean 'ddil.uses'?"),
        (
            "ddil.phases.0.p_techer=1",
            "pd.yaml has the unknown key 'ddil.phases.0.p_techer'; did you mean 'ddil.phases.0.p_teacher'?",
        ),
        (
            "ddil.phases.1.p_teacher=1.2",
            "pd.yaml has a value that does not fit at 'ddil.phases.1.p_teacher': "
            "it takes a number from 0 to 1 or a mapping of the keys start and end, not 1.2",
        ),
        (
            "reflection.mode=bounce",
            "pd.yaml has a value that does not fit at 'reflection.mode': "
            "it takes 'none', 'clamp', 'dynamic' or 'fold', not 'bounce'",
        ),
        (
            "stages.1.steps=3",
            "pd.yaml has a value that does not fit: each stage has half the steps of the one before, "
            "which [8, 3] do not",
        ),
        (
            "ddil.phases.1.until=0.5",
            "pd.yaml has a value that does not fit at 'ddil.phases': the 'until' of the phases must rise and end at 1",
        ),
    ],
)
def test_values_that_cannot_be_meant(setting: str, message: str) -> None:
    assert refused(override(CONTENT, [setting])) == message


def test_an_unknown_key_that_is_near_nothing_lists_what_is_known() -> None:
    message = refused({**CONTENT, "zzz": 1})
    assert message.startswith("pd.yaml has the unknown key 'zzz'; known keys are batch_size, betas, ")


def test_a_key_in_a_wrong_section_is_offered_with_its_own() -> None:
    assert refused({**CONTENT, "p_teacher": 0.5}).endswith("did you mean 'ddil.phases.0.p_teacher'?")
    assert refused({**CONTENT, "updates": 1}) == (
        "pd.yaml has the unknown key 'updates'; did you mean 'stages.0.updates', 'student.updates' or 'convert.updates'?"
    )


def test_the_nearest_key_is_one_of_the_same_section() -> None:
    for key, nearest in (("uss", "; did you mean 'ddil.uses'?"), ("zz", "; known keys are capacity, collect_every")):
        assert f"the unknown key 'ddil.{key}'{nearest}" in refused({**CONTENT, "ddil": {**CONTENT["ddil"], key: 2}})


def test_a_missing_key_is_named() -> None:
    assert refused({}) == "pd.yaml lacks the key 'stages'"
    assert refused({"stages": [{"steps": 4}]}) == "pd.yaml lacks the key 'stages.0.updates'"


def test_files_that_are_no_protocol(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    for text, message in (
        (None, f"there is no protocol file {path}"),
        ("a: [1", f"the protocol {path} is not YAML: "),
        ("- 1\n", f"the protocol {path} holds no mapping of keys to values"),
        ("", f"the protocol {path} holds no mapping of keys to values"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(WrongCommand) as error:
            read_yaml(path)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


def test_the_shipped_protocols_are_valid(root: Path) -> None:
    config = validate(ProgressiveConfig, read_yaml(root / "protocols" / "shapes" / "pd.yaml"), "pd.yaml")
    assert config.stages[-1].steps == 4
    assert config.ddil is not None
    assert [(p.aggregated, round(1 - p.p_teacher, 2)) for p in config.ddil.phases] == [(0.25, 0.15), (0.5, 0.8)]


def test_the_hash_of_a_content_does_not_depend_on_the_order_of_its_keys() -> None:
    assert (
        content_hash({"a": 1, "b": [1, 2]})
        == content_hash({"b": [1, 2], "a": 1})
        != content_hash({"a": 1, "b": [2, 1]})
    )


class Renamed(Strict):
    images_per_prompt: int = renamed("images_per_prompt", default=1, ge=1)


def test_a_renamed_key_is_read_by_both_names_and_hashed_by_the_former() -> None:
    old, new = (validate(Renamed, {key: 4}, "it") for key in ("pictures_per_prompt", "images_per_prompt"))
    assert old == new and old.images_per_prompt == 4
    assert new.model_dump(mode="json") == {"pictures_per_prompt": 4}


@pytest.mark.parametrize("key", ["pictures_per_prompt", "images_per_prompt"])
@pytest.mark.parametrize("setting", ["pictures_per_prompt=5", "images_per_prompt=5"])
def test_a_setting_replaces_a_renamed_key_by_either_name(key: str, setting: str) -> None:
    assert override({key: 4}, [setting]) == {"images_per_prompt": 5}


def test_a_renamed_key_by_both_names_is_refused() -> None:
    with pytest.raises(WrongCommand) as error:
        override({"pictures_per_prompt": 4, "images_per_prompt": 5}, [])
    assert str(error.value) == (
        "the protocol has the key 'images_per_prompt' and its former name 'pictures_per_prompt'; "
        "remove 'pictures_per_prompt'"
    )


def test_messages_name_the_present_key() -> None:
    with pytest.raises(WrongCommand, match="does not fit at 'images_per_prompt'"):
        validate(Renamed, {"images_per_prompt": 0}, "it")
