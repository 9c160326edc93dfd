"""Keys of all configurations: what messages, the page and printed protocols say of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ddil_core.distillation.methods import METHODS, method_of
from ddil_core.inversion.inverters import INVERTERS
from ddil_core.models.sampling import SystemFile
from ddil_core.models.system_specs import SystemSpec
from ddil_core.support.commented import commented
from ddil_core.support.errors import WrongCommand
from ddil_core.support.keys import keys
from ddil_core.support.misfits import value_text
from ddil_core.support.plain_yaml import load_plain
from ddil_core.support.protocol import read_yaml, validate
from ddil_eval.experiments.experiments import EXPERIMENTS, find_experiment
from ddil_eval.features.recipes import Recipe
from ddil_eval.study.config import StudyConfig

CONFIGURATIONS: tuple[type[BaseModel], ...] = (
    *(method.config for method in METHODS.values()),
    *(experiment.config for experiment in EXPERIMENTS.values()),
    *(inverter.settings for inverter in INVERTERS.values()),
    Recipe,
    SystemSpec,
    SystemFile,
)


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for key in keys(model):
        if key.section is not None:
            yield from sections(key.section)


ALL = list(dict.fromkeys(section for model in CONFIGURATIONS for section in sections(model)))
WRONG: tuple[Any, ...] = (None, True, "x", "", [], ["x"], [1, 2, 3], [[1]], {}, {"zz": 1}, -5, 0, 0.5, 1e9, math.nan)


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.__name__)
def test_every_key_has_a_meaning_and_says_what_it_takes(model: type[BaseModel]) -> None:
    for key in keys(model):
        assert re.fullmatch(r".{8,}[.)]", key.meaning), (key.name, key.meaning)
        assert key.takes != "a value" or model is SystemFile, key.name


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.__name__)
def test_a_value_of_the_wrong_kind_is_one_clear_sentence(model: type[BaseModel]) -> None:
    """Not in pydantic's words, but with the key, what it takes, and the value."""
    refused = 0
    for key in keys(model):
        for value in WRONG:
            try:
                validate(model, {key.name: value}, "p.yaml")
            except WrongCommand as error:
                message = str(error)
                where = re.match(
                    rf"p\.yaml has a value that does not fit at '({key.name}[.\w]*)': it takes (.*)", message
                )
                assert "\n" not in message
                assert not re.search(r"Input should|[Tt]uple|dictionary|instance|validation|unable|NoneType", message)
                if where is not None and where[1] == key.name:
                    wanted = re.sub("^a number", "a finite number", key.takes) if value is math.nan else key.takes
                    assert where[2].partition("; write")[0] == f"{wanted}, not {value_text(value)}"
                    refused += 1
    assert refused > len(model.model_fields) / 2


CASES: dict[str, tuple[type[BaseModel], dict[str, Any], str]] = {
    "list": (
        EXPERIMENTS["systems"].config,
        {"systems": [{"name": "a", "model": "b"}], "metrics": "x"},
        "at 'metrics': it takes a list of at least 1 item, each a text (or null), not 'x'; write [x]",
    ),
    "pair": (
        METHODS["lcm"].config,
        {"updates": 1, "guidance_range": [2]},
        "at 'guidance_range': it takes a list of 2 values, each a number from 0 to 1000, not [2]",
    ),
    "choice": (
        METHODS["pd"].config,
        {"optimizer": "sgd"},
        "at 'optimizer': it takes 'fused', 'adamw' or '8bit', not 'sgd'",
    ),
    "section": (
        METHODS["pd"].config,
        {"reflection": 3},
        "at 'reflection': it takes a mapping of the keys mode and quantile, not 3",
    ),
    "dtype": (METHODS["pd"].config, {"dtype": [1]}, "at 'dtype': it takes 'fp32', 'bf16' or 'fp16', not [1]"),
    "switch": (
        METHODS["pd"].config,
        {"learning_rate_decay": 3},
        "at 'learning_rate_decay': it takes true or false, not 3",
    ),
    "whole number": (
        METHODS["pd"].config,
        {"pool": 0.5},
        "at 'pool': it takes a whole number of at least 1 or 'all', not 0.5",
    ),
    "number": (
        METHODS["pd"].config,
        {"learning_rate": "fast"},
        "at 'learning_rate': it takes a number above 0 and at most 1, not 'fast'",
    ),
    "true": (
        METHODS["pd"].config,
        {"pool": True},
        "at 'pool': it takes a whole number of at least 1 or 'all', not true",
    ),
    "null": (METHODS["pd"].config, {"seed": None}, "at 'seed': it takes a whole number of at least 0, not null"),
    "inside": (
        METHODS["dmd2"].config,
        {"updates": 1, "timesteps": [999, "x"]},
        "at 'timesteps.1': it takes a whole number, not 'x'",
    ),
    "deep": (
        METHODS["lcm"].config,
        {"updates": 1, "ddil": {"phases": [{"until": 1, "aggregated": 2, "p_teacher": 0}]}},
        "at 'ddil.phases.0.aggregated': it takes a number from 0 to 1 or a mapping of the keys start and end, not 2",
    ),
    "either": (EXPERIMENTS["covariate-shift"].config, {"switch": ["x"]}, "at 'switch.0': it takes a number, not 'x'"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sentence_on_a_misfit(case: str) -> None:
    model, content, sentence = CASES[case]
    with pytest.raises(WrongCommand) as error:
        validate(model, content, "p.yaml")
    assert str(error.value) == f"p.yaml has a value that does not fit {sentence}"


def shipped(root: Path) -> Iterator[tuple[Path, BaseModel]]:
    for path in sorted((root / "protocols").glob("*/*.yaml")):
        content = read_yaml(path)
        if path.name == "demo.yaml":
            continue
        if "sources" in content:
            model: type[BaseModel] = StudyConfig
        elif "method" in content:
            model = method_of(content, str(path)).config
            content = {"updates": 1} | content if "updates" in model.model_fields else content
        else:
            model = find_experiment(content.get("experiment", "systems")).config
        yield path, validate(model, content, str(path))


def test_a_printed_protocol_gives_the_same_configuration(root: Path) -> None:
    found = list(shipped(root))
    assert len(found) > 12
    for path, config in found:
        text = commented(config, f"Made from {path}.")
        assert type(config).model_validate(load_plain(text)) == config, path
        assert text.startswith("# Made from ")
        assert set(load_plain(text)) == set(type(config).model_fields)


def test_a_printed_protocol_explains_each_key() -> None:
    text = commented(METHODS["lcm"].config.model_validate({"updates": 7, "lora": {}}))
    assert "# The rank of the adapters. It takes a whole number of at least 1.\n  rank: 64\n" in text
    assert "\n# The number of updates. It takes a whole number of at least 1.\nupdates: 7\n" in text


def test_dtypes_are_listed_by_the_names_that_protocols_use() -> None:
    takes = {key.name: key.takes for key in keys(EXPERIMENTS["covariate-shift"].config)}
    assert takes["dtype"] == "'fp32', 'bf16' or 'fp16'"
    assert takes["teacher_dtype"] == takes["student_dtype"] == "'float32', 'bfloat16' or 'float16'"


def test_ddil_alone_has_the_phases_of_the_paper(root: Path) -> None:
    """Algorithm 2: the student acts with probability 0.15 in 6,000 updates, and with 0.80 in the next 4,000."""
    for name, more in (
        ("pd", {"stages": [{"steps": 4, "updates": 1}]}),
        ("lcm", {"updates": 1}),
        ("dmd2", {"updates": 1}),
    ):
        config = METHODS[name].config.model_validate({**more, "ddil": {}})
        assert config.ddil is not None
        phases = [(phase.until, phase.aggregated, round(1 - phase.p_teacher, 2)) for phase in config.ddil.phases]
        assert phases == [(0.6, 0.25, 0.15), (1.0, 0.5, 0.8)]
        printed = validate(METHODS["pd"].config, read_yaml(root / "protocols" / "paper" / "pd.yaml"), "pd.yaml")
        assert config.ddil.phases == printed.ddil.phases


def test_a_lora_needs_no_word_on_the_embedding() -> None:
    lcm = METHODS["lcm"].config
    assert lcm.model_validate({"updates": 1, "lora": {}}).w_embedding is None
    assert lcm.model_validate({"updates": 1}).w_embedding == 256
    with pytest.raises(WrongCommand, match="a LoRA has no embedding of its guidance; set w_embedding to null"):
        validate(lcm, {"updates": 1, "lora": {}, "w_embedding": 256}, "p.yaml")


def test_a_recipe_names_only_what_it_uses() -> None:
    short = {"name": "mine", "images": 8, "reference": {"data": "folder", "images": 8}, "metrics": ["fd_efflite0"]}
    unused = dict.fromkeys(("size", "filter", "jpeg", "jpeg_generated", "fid_input", "patch", "clip"))
    assert Recipe.model_validate(short) == Recipe.model_validate(short | unused | {"crop": "none", "source": "ours"})
