"""The names that LoRA files give to tensors and to the layers of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from ddil_core.models.layouts import TEXT_ENCODERS
from ddil_core.models.original import unet_layer
from ddil_core.support.errors import DdilError

_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
"""Ending of a tensor's name, and the part of the layer's change that the tensor holds."""

_OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA's magnitudes",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.(oft_|boft_)|oft_blocks|oft_diag": "OFT",
    r"\.on_input$|\.ia3_": "IA3",
    r"\.[abc][12]?\.weight$|\.bm\.weight$": "GLoRA",
    r"lora_mid|\.lora_cp": "a Tucker decomposition",
    r"\.diff(_b)?$|\.set_weight$": "whole differences of weights",
    r"\.[wb]_norm$": "norm layers",
    r"\.bias(_\w+)?$": "biases",
    r"\.scalar$": "LyCORIS's scalars",
    r"lora_embedding_": "embeddings of words",
    r"^bundle_emb|string_to_param|emb_params": "a textual inversion",
    r"^base_model\.model\.": "a PEFT adapter, which has its alpha in another file",
}
"""Patterns of tensor names of methods other than LoRA, and the words for them in messages."""

_KOHYA = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",), "text_encoder_3": ("lora_te3_",)}
_TO_TODAY = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def split_name(key: str) -> tuple[str, str | None]:
    """Split a tensor's name into the layer and the part: down, up, alpha, or None for another ending."""
    for ending, part in _ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), part
    return key, None


def describe_tensors(keys: list[str]) -> str:
    """Name the first tensor and its method, and count the others."""
    kind = next((f" ({kind})" for pattern, kind in _OTHER_KINDS.items() if re.search(pattern, keys[0])), "")
    return f"{keys[0]}{kind}" + (f" and {len(keys) - 1} more of the like" if len(keys) > 1 else "")


def network_name(pipeline: Any) -> str:
    """Return the name of the denoising network in a pipeline."""
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def layer_names(pipeline: Any) -> dict[str, tuple[str, str]]:
    """Return all names that LoRA files use for the layers of a pipeline, with (component, layer) for each."""
    names: dict[str, tuple[str, str]] = {}
    for component in (network_name(pipeline), *TEXT_ENCODERS):
        module = getattr(pipeline, component, None)
        if module is None:
            continue
        for layer, part in module.named_modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                for name in _names_of(component, layer, getattr(module, "config", {})):
                    if names.setdefault(name, (component, layer)) != (component, layer):
                        raise DdilError(f"two layers of the {component} have the name {name} in LoRA files")
    return names


def _names_of(component: str, layer: str, config: Any) -> Iterator[str]:
    if component in TEXT_ENCODERS:
        bare = layer.removeprefix("text_model.")
        for name in dict.fromkeys((layer, bare, f"text_model.{bare}")):
            yield f"{component}.{name}"
            for prefix in _KOHYA[component]:
                yield prefix + name.replace(".", "_")
            stem, _, last = name.rpartition(".")
            if last in _TO_TODAY:
                yield f"{component}.{stem}.{_TO_TODAY[last]}"
        return
    original = unet_layer(layer, config) if component == "unet" else None
    for name in (layer, re.sub(r"\.(to_q|to_k|to_v|to_out)(\.0)?$", r".processor.\1", layer)):
        yield f"{component}.{name}"
        yield name  # the older attention processors were saved so
    yield "lora_unet_" + layer.replace(".", "_")
    if original is not None:
        yield "lora_unet_" + original.replace(".", "_")
