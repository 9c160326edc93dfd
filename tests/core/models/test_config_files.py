"""A model's configuration may not ask the libraries for code, kernels, weights or files from elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddil_core.models.config_files import require_plain_configs
from ddil_core.models.fit import check_sizes
from ddil_core.models.loading import load_pipeline
from ddil_core.models.memory import block_channels, latent_size
from ddil_core.models.sampling import Sampling
from ddil_core.models.system_specs import Files
from ddil_core.models.weights import components, pipeline_files
from ddil_core.support.errors import DdilError, WrongCommand


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that changes keys of a JSON file of a copy of the tiny pipeline."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))

    def change(file: str, **keys: Any) -> Path:
        path = copy / file
        path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | keys))
        return copy

    return change


FROM_ELSEWHERE = [
    ("text_encoder/config.json", {"_attn_implementation": "kernels-community/flash-attn3"}),
    ("text_encoder/config.json", {"attn_implementation": {"": "someone/kernel"}}),
    ("text_encoder/config.json", {"text_config": {"_attn_implementation_internal": "flash_attention_2"}}),
    ("text_encoder/config.json", {"experts_implementation": "x/y"}),
    ("text_encoder/config.json", {"auto_map": {"AutoConfig": "code.Config"}}),
    ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}),
    ("unet/config.json", {"quantization_config": {"quant_method": "mine"}}),
    ("vae/config.json", {"trust_remote_code": True}),
]


@pytest.mark.parametrize(("file", "keys"), FROM_ELSEWHERE)
def test_what_asks_for_something_from_elsewhere(file: str, keys: dict[str, Any], changed: Callable[..., Path]) -> None:
    copy = changed(file, **keys)
    with pytest.raises(DdilError) as error:
        load_pipeline(Files(copy), "mine", "StableDiffusionPipeline", None)  # type: ignore[arg-type]  # before any weight
    assert str(error.value).startswith(f"the file {copy / file} of the model has the key '")
    assert "; nothing was run or fetched: remove the key, or fetch or make the model again" in str(error.value)


@pytest.mark.parametrize("value", [None, "eager", "sdpa", {"text_config": "sdpa"}])
def test_own_kernels_are_taken(value: object, changed: Callable[..., Path]) -> None:
    require_plain_configs(changed("text_encoder/config.json", _attn_implementation=value, auto_map={}), "mine")


def test_an_adapter_beside_a_text_encoder(changed: Callable[..., Path]) -> None:
    copy = changed("text_encoder/adapter_config.json", base_model_name_or_path="/elsewhere")
    with pytest.raises(
        DdilError, match=r"has the file .*adapter_config\.json, by which libraries load weights from another"
    ):
        require_plain_configs(copy, "mine")


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
        ("unet/config.json", {"layers_per_block": [1, 10**9]}),
        ("unet/config.json", {"block_out_channels": [16] * 5000}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
    ],
)
def test_a_network_without_end_is_not_built(file: str, keys: dict[str, Any], changed: Callable[..., Path]) -> None:
    copy = changed(file, **keys)
    with pytest.raises(
        DdilError, match=rf"^the file {copy / file} of the model has a number or a list at '.*' that no model"
    ):
        require_plain_configs(copy, "mine")


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("text_encoder/config.json", {"hidden_size": "16"}),
        ("text_encoder/config.json", {"vocab_size": [1]}),
        ("unet/config.json", {"in_channels": {}}),
        ("vae/config.json", {"latent_channels": 8.0}),
        ("tokenizer/tokenizer.json", {"model": 3}),
        ("tokenizer/tokenizer.json", {"model": {"vocab": 3}}),
    ],
)
def test_sizes_of_wrong_types(file: str, keys: dict[str, Any], changed: Callable[..., Path]) -> None:
    with pytest.raises(DdilError, match=r"; fetch or make the model again$"):
        check_sizes(changed(file, **keys), "mine")


def test_numbers_of_wrong_types() -> None:
    for value in ("64", [], [0], [64] * 99, 64, None):
        with pytest.raises(DdilError, match=r"^the autoencoder of the model 'mine' has the block_out_channels "):
            block_channels({"block_out_channels": value}, "mine")
        with pytest.raises(DdilError, match=r"^the network of the model 'mine' has the sample_size "):
            latent_size({"sample_size": 10**9 if value == 64 else value}, "mine")


@pytest.mark.parametrize(
    "index",
    [{"../unet": ["diffusers", "X"]}, {"unet": ["diffusers", 3]}, {"unet": ["diffusers", True]}, {"a/b": ["a", "b"]}],
)
def test_components_that_lead_out_of_the_folder(index: dict[str, Any]) -> None:
    with pytest.raises(DdilError, match=r"^the file model_index\.json of the model has the damaged component "):
        components(index)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "weights.bin", 3, None])
def test_an_index_of_shards_that_leads_out_of_the_folder(shard: object, changed: Callable[..., Path]) -> None:
    stem = "unet/diffusion_pytorch_model.safetensors"
    copy = changed(f"{stem}.index.json", weight_map={"a": shard})
    (copy / stem).unlink()
    with pytest.raises(DdilError, match=r"index\.json of the model names .*, which is no shard beside it; "):
        pipeline_files(copy, "mine")


def test_a_student_of_a_newer_ddil() -> None:
    with pytest.raises(WrongCommand) as error:
        Sampling.from_file({"schema_version": 2, "more": 1})
    assert str(error.value) == (
        "ddil.json was made by a newer ddil: it has schema 2, and this ddil reads schema 1; update ddil to read it"
    )
    assert Sampling.from_file({"schema_version": 1}) == Sampling()
