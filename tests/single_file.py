"""Stable Diffusion's single-file layout: a tiny pipeline's weights under the names that its first authors gave them.

Written from the layout itself, so that reading such a file is tested against something other than the reader.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def single_file(pipeline: Any, version: str = "1") -> dict[str, Tensor]:
    """All weights of a Stable Diffusion pipeline of version 1, 2 or xl, named as in a single file."""
    layers = pipeline.unet.config.layers_per_block
    levels = len(pipeline.vae.config.block_out_channels)
    crossing = [kind.startswith("CrossAttn") for kind in pipeline.unet.config.up_block_types]
    named = {}
    for name, weight in pipeline.unet.state_dict().items():
        named["model.diffusion_model." + _of_unet(name, layers, crossing)] = weight
    for name, weight in pipeline.vae.state_dict().items():
        place = _of_autoencoder(name, levels)
        is_attention = "attn_1" in place and place.endswith("weight") and weight.ndim == 2
        named["first_stage_model." + place] = weight[:, :, None, None] if is_attention else weight
    first = pipeline.text_encoder.state_dict()
    if version == "2":
        named |= {f"cond_stage_model.model.{name}": weight for name, weight in _open_clip(first).items()}
    else:
        place = "cond_stage_model" if version == "1" else "conditioner.embedders.0"
        for name, weight in first.items():
            named[f"{place}.transformer.text_model." + name.removeprefix("text_model.")] = weight
    if version == "xl":
        second = _open_clip(pipeline.text_encoder_2.state_dict())
        named |= {f"conditioner.embedders.1.model.{name}": weight for name, weight in second.items()}
    return {name: weight.clone().contiguous() for name, weight in named.items()}


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder of transformers with the names of ``open_clip``, which joins query, key and value."""
    named = {}
    for long_name, weight in state.items():
        name = long_name.removeprefix("text_model.")
        if name == "text_projection.weight":
            named["text_projection"] = weight.T
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, part, end = f"transformer.resblocks.{match[1]}", match[2], match[3]
            if part == "self_attn.q_proj":
                three = [state[long_name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
                named[f"{layer}.attn.in_proj_{end}"] = torch.cat(three)
            elif part in _LAYER:
                named[f"{layer}.{_LAYER[part]}.{end}"] = weight
        else:
            named[_OPEN_CLIP[name]] = weight
    return named


def _of_unet(name: str, layers: int, crossing: list[bool]) -> str:
    for ours, theirs in _UNET.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        place = {"resnets0": 0, "attentions0": 1, "resnets1": 2}[match[1] + match[2]]
        return f"middle_block.{place}.{_inside(match[1], match[3])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    assert match is not None, name
    side, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * level + layers}.{2 if crossing[level] else 1}.{rest}"
    block = (layers + 1) * level + index
    place = f"input_blocks.{block + 1}" if side == "down" else f"output_blocks.{block}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    part, _, end = rest.rpartition(".")
    return f"{_RESNET[part]}.{end}"


def _of_autoencoder(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
        return f"{match[1]}.mid.attn_1.{_ATTENTION[match[2]]}.{match[3]}"
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda match: f"up.{levels - 1 - int(match[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", name)
