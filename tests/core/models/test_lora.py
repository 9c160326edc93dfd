"""LoRA files of every format: a merged weight is W + alpha / rank · up @ down, or the file is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddil_core.models.loading import load_pipeline
from ddil_core.models.lora import merge_lora, read_lora
from ddil_core.models.system_specs import Files
from ddil_core.support.errors import DdilError
from tests.pipelines import build
from tests.single_file import _of_unet

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
Name = Callable[[str, str, Any], tuple[str, str, str]]
"""For each format: from a component, a layer and the pipeline to the names of down, up and alpha in a file."""


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A pipeline of random weights of each layout, and its folder."""
    made = {}
    for layout in (SD, SDXL):
        folder = tmp_path_factory.mktemp(layout)
        made[layout] = folder / "pipeline", build(layout, folder / "words")
        made[layout][1].save_pretrained(folder / "pipeline")
    return made


def loaded(folder: Path, layout: str, path: Path, **more: Any) -> Any:
    return load_pipeline(Files(folder, lora=path), "base", layout, more.pop("dtype", torch.float32), **more)


def refused(base: Any, path: Path) -> str:
    with pytest.raises(DdilError) as error:
        merge_lora(copy.deepcopy(base), read_lora(base, path, "base"), path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"the LoRA {path} ")
    return message.removeprefix(f"the LoRA {path} ")


def layers(pipeline: Any) -> Iterator[tuple[str, str, nn.Module]]:
    """Every linear layer and convolution of the networks that a LoRA can adapt."""
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for name, layer in getattr(pipeline, component, nn.Module()).named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                yield component, name, layer


def kohya(component: str, layer: str, pipeline: Any) -> tuple[str, str, str]:
    """Of Stable Diffusion 1 with diffusers' names, of SDXL with the first authors'."""
    if component == "unet":
        if "text_encoder_2" in pipeline.components:
            levels = [kind.startswith("CrossAttn") for kind in pipeline.unet.config.up_block_types]
            layer = _of_unet(layer + ".weight", 1, levels).removesuffix(".weight")
        stem = "lora_unet_" + layer.replace(".", "_")
    else:
        two = "text_encoder_2" in pipeline.components
        number = "" if not two else "2" if component == "text_encoder_2" else "1"
        bare = layer.removeprefix("text_model.")
        name = bare if bare == "text_projection" else f"text_model.{bare}"
        stem = f"lora_te{number}_" + name.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def peft(component: str, layer: str, pipeline: Any) -> tuple[str, str, str]:
    stem = f"{component}.{layer}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", f"{stem}.alpha"


def old(component: str, layer: str, pipeline: Any) -> tuple[str, str, str]:
    """The names that diffusers used for attention processors and text encoders before PEFT."""
    stem = f"{component}.{layer}"
    if component == "unet":
        if match := re.fullmatch(r"(.+)\.(to_q|to_k|to_v|to_out)(\.0)?", stem):
            stem = f"{match[1]}.processor.{match[2]}_lora"
        else:
            stem += ".lora"
    elif match := re.fullmatch(r"(.+self_attn)\.(q|k|v|out)_proj", stem):
        stem = f"{match[1]}.to_{match[2]}_lora"
    else:
        stem += ".lora_linear_layer"
    return f"{stem}.down.weight", f"{stem}.up.weight", ""


FORMATS: dict[str, Name] = {"kohya": kohya, "peft": peft, "old": old}


def random_file(
    pipeline: Any, name: Name, alphas: bool, wanted: Callable[[str, str], bool] = lambda component, layer: True
) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
    """A file's tensors with another rank and alpha for every layer, and what each layer's weight should become."""
    torch.manual_seed(5)
    state, after = {}, {}
    for i, (component, layer, module) in enumerate(layers(pipeline)):
        if not wanted(component, layer):
            continue
        weight: Any = module.weight
        rank, alpha = 1 + i % 4, (2.0, 3.0, 0.5)[i % 3] if alphas else float(1 + i % 4)
        down = 0.1 * torch.randn(rank, *weight.shape[1:])
        up = 0.1 * torch.randn(len(weight), rank, *([1, 1] if weight.ndim == 4 else []))
        a, b, c = name(component, layer, pipeline)
        state |= {a: down, b: up}
        if alphas:
            state[c] = torch.tensor(alpha)
        change = torch.einsum("or,r...->o...", up.double().reshape(len(weight), rank), down.double())
        after[component, layer] = weight.detach().double() + alpha / rank * change
    return state, after


def assert_changed(made: Any, base: Any, after: dict[tuple[str, str], Tensor], tolerance: float = 1e-6) -> None:
    """Check that each adapted weight has the expected value and every other weight the old value."""
    compared = set()
    for component in ("unet", "text_encoder", "text_encoder_2", "vae"):
        if component not in base.components:
            continue
        ours, theirs = getattr(made, component).state_dict(), getattr(base, component).state_dict()
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            place = component, name.removesuffix(".weight")
            if place in after:
                compared.add(place)
                assert float((weight.double() - after[place]).abs().max()) < tolerance, place
            else:
                assert torch.equal(weight, theirs[name]), place
    assert compared == set(after) and len(compared) > 10


@pytest.mark.parametrize(
    ("kind", "alphas"), [("kohya", True), ("kohya", False), ("peft", True), ("peft", False), ("old", False)]
)
@pytest.mark.parametrize("layout", [SD, SDXL])
def test_every_layer_is_changed_by_its_own_alpha_and_rank(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path, layout: str, kind: str, alphas: bool
) -> None:
    folder, base = pipelines[layout]
    state, after = random_file(base, FORMATS[kind], alphas)
    save_file(state, tmp_path / "lora.safetensors")
    assert_changed(loaded(folder, layout, tmp_path / "lora.safetensors"), base, after)


def test_a_lora_of_a_text_encoder_alone(pipelines: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, base = pipelines[SDXL]
    state, after = random_file(base, kohya, True, lambda component, layer: component != "unet")
    save_file(state, tmp_path / "lora.safetensors")
    assert_changed(loaded(folder, SDXL, tmp_path / "lora.safetensors"), base, after)


def test_attention_processors_without_the_name_of_the_unet(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, base = pipelines[SD]
    state, after = random_file(base, old, False, lambda component, layer: "attn" in layer and component == "unet")
    save_file({key.removeprefix("unet."): tensor for key, tensor in state.items()}, tmp_path / "lora.safetensors")
    assert_changed(loaded(folder, SD, tmp_path / "lora.safetensors"), base, after)


@pytest.mark.parametrize("layout", [SD, SDXL])
def test_a_convolution_of_one_pixel_is_a_linear_layer(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path, layout: str
) -> None:
    """proj_in is a convolution in one layout and linear in the other; a file may keep it as either."""
    folder, base = pipelines[layout]
    state, after = random_file(base, kohya, True)
    turned = {}
    for key, tensor in state.items():
        if key.endswith(".alpha"):
            turned[key] = tensor
        elif tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            turned[key] = tensor[:, :, 0, 0].contiguous()  # also the up of a convolution of 3 by 3
        else:
            turned[key] = tensor if tensor.ndim == 4 else tensor[:, :, None, None]
    save_file(turned, tmp_path / "lora.safetensors")
    assert_changed(loaded(folder, layout, tmp_path / "lora.safetensors"), base, after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_file_is_merged_in_float32(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder, base = pipelines[SD]
    state, _ = random_file(base, kohya, True)
    half = {key: tensor.to(dtype) for key, tensor in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    save_file({key: tensor.float() for key, tensor in half.items()}, tmp_path / "whole.safetensors")
    made, wanted = (
        loaded(folder, SD, tmp_path / f"{name}.safetensors").unet.state_dict() for name in ("half", "whole")
    )
    assert all(torch.equal(weight, wanted[name]) for name, weight in made.items())
    lower = loaded(folder, SD, tmp_path / "half.safetensors", dtype=torch.bfloat16).unet.state_dict()
    before = base.unet.state_dict()
    for component, layer, _module in layers(base):
        if component == "unet":
            a, b, c = kohya(component, layer, base)
            change = torch.einsum("or,r...->o...", half[b].float().flatten(1), half[a].float())
            weight = before[f"{layer}.weight"].bfloat16().float() + float(half[c]) / len(half[a]) * change
            # one rounding, at the end
            torch.testing.assert_close(lower[f"{layer}.weight"].float(), weight, rtol=2**-8, atol=1e-6)


# PEFT's own settings


@pytest.mark.parametrize("rslora", [False, True])
def test_the_settings_of_peft_give_the_scales_that_peft_gives(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path, rslora: bool
) -> None:
    folder, _ = pipelines[SD]
    trained = build(SD, tmp_path / "words")
    torch.manual_seed(7)
    patterns = {"rank_pattern": {"attn1.to_q": 5}, "alpha_pattern": {"mid_block.*to_v": 9, "attn1.to_q": 1}}
    trained.unet.add_adapter(
        LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=["to_q", "to_v", "conv1"],
            init_lora_weights=False,
            use_rslora=rslora,
            **patterns,
        )
    )
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    inject_adapter_in_model(config, trained.text_encoder)

    type(trained).save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(trained.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(trained.text_encoder),
        unet_lora_adapter_metadata=trained.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=trained.text_encoder.peft_config["default"].to_dict(),
    )
    made = loaded(folder, SD, tmp_path / "pytorch_lora_weights.safetensors")
    for component in ("unet", "text_encoder"):
        changed = 0
        for name, module in getattr(trained, component).named_modules():
            if hasattr(module, "get_delta_weight"):
                wanted = module.base_layer.weight + module.get_delta_weight("default")
                torch.testing.assert_close(
                    getattr(made, component).get_submodule(name).weight, wanted, rtol=0, atol=1e-6, check_stride=False
                )
                changed += 1
        assert changed > 1


def metadata(**settings: Any) -> dict[str, str]:
    values = {"r": 2, "lora_alpha": 2} | settings
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in values.items()})}


def test_settings_that_are_not_read_are_refused(pipelines: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, base = pipelines[SD]
    path = tmp_path / "lora.safetensors"
    query = f"unet.{QUERY}"
    state = {f"{query}.lora_A.weight": torch.randn(2, 16), f"{query}.lora_B.weight": torch.randn(16, 2)}
    for settings, sentence in (
        ({"use_dora": True}, "was trained with use_dora = True for its unet, which is not supported"),
        ({"init_lora_weights": "pissa"}, "was trained with init_lora_weights = 'pissa' for its unet"),
        ({"bias": "lora_only"}, "was trained with bias = 'lora_only' for its unet"),
        ({"option_of_tomorrow": 1}, "was trained with option_of_tomorrow = 1 for its unet"),
        (
            {"r": 4},
            "has the rank 4 for unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q in its settings and 2 in",
        ),
        ({"lora_alpha": 0}, "has the alpha 0.0 for the layer unet.mid_block"),
        ({"lora_alpha": float("nan")}, "has the alpha nan for the layer unet.mid_block"),
        ({"alpha_pattern": {"attn9.to_q": 8}}, "has a setting for unet.attn9.to_q, which it does not adapt"),
        ({"r": None}, "has damaged settings in its metadata"),
        ({"alpha_pattern": {"(": 8}}, "has damaged settings in its metadata"),
    ):
        save_file(state, path, metadata=metadata(**settings))
        assert refused(base, path).startswith(sentence)
    save_file(state | {f"{query}.alpha": torch.tensor(1.0)}, path, metadata=metadata())
    assert refused(base, path).startswith("has alphas by layer and in its settings for unet")
    save_file(state, path, metadata=metadata(init_lora_weights="gaussian", lora_dropout=0.1, target_modules=["to_q"]))
    after = base.unet.get_submodule(query.removeprefix("unet.")).weight + torch.matmul(*reversed(list(state.values())))
    torch.testing.assert_close(loaded(folder, SD, path).unet.get_submodule(query.removeprefix("unet.")).weight, after)


def test_settings_without_a_component_are_those_of_the_network(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """``save_lora_adapter`` of diffusers names neither tensors nor settings after a component."""
    folder, base = pipelines[SD]
    trained = build(SD, tmp_path / "words").unet
    trained.add_adapter(LoraConfig(r=2, lora_alpha=7, target_modules=["to_q"], init_lora_weights=False), "x")
    trained.save_lora_adapter(tmp_path, adapter_name="x", weight_name="lora.safetensors")
    down, up = (trained.get_submodule(f"{QUERY}.lora_{part}.x").weight for part in "AB")
    made = loaded(folder, SD, tmp_path / "lora.safetensors").unet.get_submodule(QUERY).weight
    torch.testing.assert_close(made, base.unet.get_submodule(QUERY).weight + 7 / 2 * up @ down)


def test_an_alpha_that_is_only_in_the_metadata_is_refused(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    base, path = pipelines[SD][1], tmp_path / "lora.safetensors"
    state = {f"unet.{QUERY}.lora_A.weight": torch.randn(2, 16), f"unet.{QUERY}.lora_B.weight": torch.randn(16, 2)}
    for name, value in (("ss_network_alpha", "1"), ("network_alphas", '{"unet": 8}'), ("lora_alpha", "4.0")):
        save_file(state, path, {name: value})
        assert refused(base, path).startswith(f"has the {name} {value} in its metadata, and no alpha with the layer")
        save_file(state | {f"unet.{QUERY}.alpha": torch.tensor(1.0)}, path, {name: value})
        assert len(read_lora(base, path, "base")) == 1
    save_file(state, path, {"ss_network_alpha": "2.0"})  # as without an alpha
    assert len(read_lora(base, path, "base")) == 1
    save_file(state, path, {"lora_adapter_metadata": json.dumps({"text_encoder.r": 2, "text_encoder.lora_alpha": 4})})
    assert refused(base, path).startswith("has settings for text_encoder, which it does not adapt")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_matrices_of_no_real_numbers_are_refused(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(whole() | {f"{STEM}.lora_down.weight": torch.ones(2, 16, dtype=dtype)}, path)
    assert refused(pipelines[SD][1], path) == f"holds {STEM}.lora_down.weight in {dtype}, which is no matrix; {ANOTHER}"


# What is refused

ANOTHER = "take another copy of it"
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def whole(value: float = 0.1) -> dict[str, Tensor]:
    """A correct file for one layer."""
    down, up = torch.full((2, 16), value), torch.full((16, 2), value)
    return {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up, f"{STEM}.alpha": torch.tensor(2.0)}


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        (f"{STEM}.dora_scale", "DoRA's magnitudes"),
        (f"{STEM}.lora_magnitude_vector", "DoRA's magnitudes"),
        (f"{STEM}.lora_mid.weight", "a Tucker decomposition"),
        (f"{STEM}.hada_w1_a", "LoHa"),
        (f"{STEM}.lokr_w1", "LoKr"),
        (f"{STEM}.oft_blocks", "OFT"),
        (f"{STEM}.a1.weight", "GLoRA"),
        (f"{STEM}.on_input", "IA3"),
        (f"{STEM}.diff", "whole differences of weights"),
        (f"{STEM}.diff_b", "whole differences of weights"),
        ("lora_unet_mid_block_resnets_0_norm1.w_norm", "norm layers"),
        (f"{STEM}.lora_up.bias", "biases"),
        (f"{STEM}.scalar", "LyCORIS's scalars"),
        ("unet.conv_in.lora_B.bias", "biases"),
        ("bundle_emb.word.string_to_param.*", "a textual inversion"),
        ("text_encoder.embeddings.token_embedding.lora_embedding_A", "embeddings of words"),
        ("method_of_tomorrow", None),
    ],
)
def test_what_is_not_read_is_named(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path, extra: str, kind: str | None
) -> None:
    base = pipelines[SD][1]
    path = tmp_path / "lora.safetensors"
    save_file(whole() | {extra: torch.ones(16)}, path)
    named = extra if kind is None else f"{extra} ({kind})"
    assert refused(base, path) == (
        f"holds {named}, which is not supported; without such tensors the LoRA would give another model; "
        "name a LoRA of only up and down matrices"
    )
    save_file({extra: torch.ones(16)}, path)
    assert refused(base, path) == (f"adapts nothing of a unet; it holds {named}; name a LoRA of up and down matrices")


ORIGINAL = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
ENCODER = "lora_te_text_model_encoder_layers_0_mlp_fc1"
ABSENT = ENCODER.replace("layers_0", "layers_7")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        # layers that are not there
        ({f"{ABSENT}.alpha": torch.ones(())}, f"the base has no layer {ABSENT} of 2"),
        ({"lora_te2_text_projection.alpha": torch.ones(())}, "the base has no layer lora_te2_text_projection of 2"),
        (
            {"text_encoder_2.text_projection.lora_A.weight": torch.ones(1, 16)},
            "the base has no layer text_encoder_2.text_projection",
        ),
        (
            {"lora_unet_input_blocks_9_0_op.alpha": torch.ones(())},
            "the base has no layer lora_unet_input_blocks_9_0_op of 2",
        ),
        (
            {"lora_unet_mid_block_resnets_0_norm1.alpha": torch.ones(())},
            "the base has no layer lora_unet_mid_block_resnets_0_norm1",
        ),
        # layers without a part
        ({f"{STEM}.lora_up.weight": None}, f"has for the layer unet.{QUERY} alpha and down without up"),
        ({f"{STEM}.lora_down.weight": None, f"{STEM}.lora_up.weight": None}, "to_q alpha without down"),
        ({f"{ENCODER}.lora_up.weight": torch.ones(32, 1)}, "mlp.fc1 up without down"),
        ({f"{ENCODER}.alpha": torch.ones(())}, "mlp.fc1 alpha without down"),
        # one layer twice, under two names
        (
            {f"{ORIGINAL}.lora_up.weight": torch.ones(16, 2)},
            "holds the up of unet.mid_block",
        ),
        (
            {f"unet.{QUERY}.lora_A.weight": torch.ones(2, 16)},
            "holds the down of",
        ),
        # shapes
        ({f"{STEM}.lora_down.weight": torch.ones(2, 17)}, f"its layer {QUERY} has another width"),
        (
            {f"{STEM}.lora_up.weight": torch.ones(17, 2)},
            "with down [2, 16] and up [17, 2] for unet's weight [16, 16]",
        ),
        ({f"{STEM}.lora_up.weight": torch.ones(16, 3)}, "has another width"),
        ({f"{STEM}.lora_down.weight": torch.ones(2, 16, 3, 3)}, "has another width"),
        ({f"{STEM}.lora_up.weight": torch.ones(16)}, "has another width"),
        (
            {f"{STEM}.lora_down.weight": torch.ones(0, 16), f"{STEM}.lora_up.weight": torch.ones(16, 0)},
            "has another width",
        ),
        # numbers
        (
            {f"{STEM}.lora_up.weight": torch.full((16, 2), torch.nan)},
            f"has for the layer unet.{QUERY} numbers that are not finite",
        ),
        ({f"{STEM}.alpha": torch.tensor(torch.inf)}, "numbers that are not finite"),
        ({f"{STEM}.alpha": torch.tensor(0.0)}, "has the alpha 0.0 for the layer unet.mid_block"),
        ({f"{STEM}.alpha": torch.ones(2)}, "has the alpha [1.0, 1.0] for the layer unet.mid_block"),
        (
            {
                f"{STEM}.lora_up.weight": torch.full((16, 2), 3e38),
                f"{STEM}.lora_down.weight": torch.full((2, 16), 3e38),
            },
            "overflow or not finite in torch.float32",
        ),
    ],
)
def test_a_file_that_does_not_fit(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path, changes: dict[str, Tensor | None], sentence: str
) -> None:
    base = pipelines[SD][1]
    path = tmp_path / "lora.safetensors"
    state = {key: tensor for key, tensor in (whole() | changes).items() if tensor is not None}
    save_file(state, path)
    assert sentence in refused(base, path)


def test_a_lora_for_another_base(pipelines: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    for layout, other in ((SD, SDXL), (SDXL, SD)):
        save_file(random_file(pipelines[other][1], kohya, True)[0], tmp_path / "lora.safetensors")
        sentence = refused(pipelines[layout][1], tmp_path / "lora.safetensors")
        assert sentence.startswith("was made for another base than 'base': ")
        assert sentence.endswith("take the base that the LoRA's page names")


def test_a_file_that_is_cut_short_or_empty(pipelines: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({}, path)
    assert refused(pipelines[SD][1], path) == "adapts nothing of a unet; name a LoRA of up and down matrices"
    save_file(whole(), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DdilError, match=f"^the weights {path} are cut short or damaged"):
        loaded(pipelines[SD][0], SD, path)


def test_a_sum_that_overflows_in_half_is_refused(pipelines: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(whole(1.0) | {f"{STEM}.alpha": torch.tensor(1e6)}, path)
    loaded(pipelines[SD][0], SD, path)
    with pytest.raises(DdilError) as error:
        loaded(pipelines[SD][0], SD, path, dtype=torch.float16)
    sentence = "attn1.to_q overflow or not finite in torch.float16; take another dtype or LoRA"
    assert str(error.value).endswith(sentence)


# Kept beside the weights


@pytest.mark.parametrize("layout", [SD, SDXL])
def test_adapters_beside_the_weights_add_what_the_file_says(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path, layout: str
) -> None:
    folder, base = pipelines[layout]
    state, after = random_file(base, kohya, True)
    save_file(state, tmp_path / "lora.safetensors")
    made = loaded(folder, layout, tmp_path / "lora.safetensors", fuse_lora=False)
    for (component, layer), wanted in after.items():
        module = getattr(made, component).get_submodule(layer)
        total = (module.base_layer.weight + module.get_delta_weight("default_0")).detach()
        assert float((total.double() - wanted).abs().max()) < 1e-6, (component, layer)


def test_the_adapters_that_the_libraries_save_load_as_they_merge(
    pipelines: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """Compare the helper of the other tests with this reader."""
    from tests.pipelines import save_lora

    folder, base = pipelines[SD]
    path = save_lora(tmp_path, build(SD, tmp_path / "words"))
    after = {}
    state = load_file(path)
    for key in state:
        if key.endswith("lora_A.weight"):
            place = key.removesuffix(".lora_A.weight")
            component, _, layer = place.partition(".")
            change = state[f"{place}.lora_B.weight"].double() @ state[key].double()
            after[component, layer] = getattr(base, component).get_submodule(layer).weight.detach().double() + change
    assert_changed(loaded(folder, SD, path), base, after)
