"""A folder that holds another run: the sentence names what differs, and is not as long as a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ddil_core.distillation.config import MethodConfig, ProgressiveConfig
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.run_folder import open_run, read_run, require_same_run
from ddil_core.support.errors import DdilError, WrongCommand

PD = ProgressiveConfig.model_validate({"stages": [{"steps": 4, "updates": 1}]})


def identity(config: MethodConfig) -> dict[str, Any]:
    return {"teacher": "t", "teacher_sha256": "0", "data": "d", "config": config.model_dump(mode="json")}


def refused(folder: Path, config: MethodConfig) -> str:
    (folder / "run.yaml").write_text(yaml.safe_dump(identity(PD)))
    with pytest.raises(WrongCommand) as error:
        require_same_run(folder, identity(config), type(config), 3.0)
    return str(error.value)


def test_keys_are_named_with_their_places_and_values_as_yaml_writes_them(tmp_path: Path) -> None:
    other = PD.model_copy(update={"learning_rate_decay": False, "seed": 3, "guidance_scale": 2.0})
    there = "learning_rate_decay is true there, seed is 0 there, guidance_scale is 3.0 there"
    assert refused(tmp_path, other) == f"the folder {tmp_path} holds another run ({there}); choose another --out"


def test_of_many_keys_the_first_are_named(tmp_path: Path) -> None:
    message = refused(tmp_path, ConsistencyConfig(updates=1))
    assert message.startswith(f"the folder {tmp_path} holds another run (")
    assert message.count(" there") == 5 and "method is 'pd' there" in message
    assert message.endswith(" more keys); choose another --out")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("schema_version: 2\nversions: {ddil: '9.1'}\nruns: []",
         "the run in HERE was made by a newer ddil (9.1): it has schema 2, and this ddil reads schema 1; update ddil to read it"),
        ("a: 1\na: 2", "the file HERE/run.yaml is damaged (it holds the key 'a' twice in line 2; leave one out); "),
        ("[" * 5000, "the file HERE/run.yaml is damaged (it is nested more than 32 levels deep in line 1); "),
        ("a: !!python/name:os.system x", "the file HERE/run.yaml is damaged (it holds a value of the kind "),
    ],
    ids=["newer", "twice", "deep", "a tag"],
)  # fmt: skip
def test_a_run_file_that_is_newer_or_not_plain(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(DdilError) as error:
        read_run(tmp_path / "run.yaml")
    assert str(error.value).replace(str(tmp_path), "HERE").startswith(sentence)


def test_a_run_says_whether_it_is_deterministic_and_goes_on_either_way(tmp_path: Path) -> None:
    """The bits of a GPU depend on it, and nothing on a CPU does. So it is no part of the identity of a run."""

    def go_on(**provenance: bool) -> dict[str, Any]:
        open_run(tmp_path, identity(PD.with_guidance(3.0)), provenance, type(PD), 3.0)
        return read_run(tmp_path / "run.yaml")

    assert go_on().get("deterministic") is None  # of an earlier version
    assert "changes" not in go_on(deterministic=False)
    assert go_on(deterministic=True)["deterministic"] is True
    assert [change["deterministic"] for change in go_on(deterministic=False)["changes"]] == [True, False]
