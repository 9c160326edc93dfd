"""The original names of layers in Stable Diffusion's networks, before diffusers and transformers renamed the layers.

Single-file checkpoints use the original names with dots. kohya's LoRA files for SDXL use them with underscores.
"""

from __future__ import annotations

import re
from typing import Any

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_AUTOENCODER = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    ".group_norm": ".norm",
    ".to_q": ".q",
    ".to_k": ".k",
    ".to_v": ".v",
    ".to_out.0": ".proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
    "down_blocks": "down",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "final_layer_norm": "ln_final",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def unet_layer(name: str, config: Any) -> str | None:
    """Return the original name of a U-Net's layer.

    Args:
        name: diffusers' name of the layer, such as ``down_blocks.0.resnets.1.conv1``.
        config: The U-Net's configuration, with ``layers_per_block`` and ``up_block_types``.

    Returns:
        The name, such as ``input_blocks.2.0.in_layers.2``. None: the original network has no such layer.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        return None
    if match := re.fullmatch(r"mid_block\.(\w+\.\d+)\.(.+)", name):
        place = _MIDDLE.get(match[1])
        return None if place is None else _inside(f"middle_block.{place}", match[1], match[2])
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        return None
    side, level, kind, rest = match[1], int(match[2]), match[3], match[5]
    first = (layers + 1) * level + int(match[4])  # a level has layers_per_block + 1 blocks
    if kind in ("resnets", "attentions"):
        block = f"input_blocks.{first + 1}" if side == "down" else f"output_blocks.{first}"
        return _inside(f"{block}.{0 if kind == 'resnets' else 1}", kind, rest)
    if kind == "downsamplers" and rest == "conv":
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.op"
    if kind == "upsamplers" and rest == "conv":
        after = 2 if "CrossAttn" in config["up_block_types"][level] else 1
        return f"output_blocks.{first + layers}.{after}.conv"
    return None


def _inside(block: str, kind: str, rest: str) -> str | None:
    inner = _RESNET.get(rest) if kind.startswith("resnets") else rest
    return None if inner is None else f"{block}.{inner}"


def autoencoder_weight(name: str, levels: int) -> str:
    """Return the original name of an autoencoder's weight. The autoencoder has ``levels`` resolutions."""
    for today, original in _AUTOENCODER.items():
        name = name.replace(today, original)
    # The original names count the decoder's levels from the image, and diffusers counts them from the latent.
    return re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)


def open_clip_weight(name: str) -> str:
    """Return ``open_clip``'s name of a text encoder's weight. Query, key and value share one name there."""
    for today, original in _OPEN_CLIP.items():
        name = name.replace(today, original)
    return re.sub(r"self_attn\.[qkv]_proj\.", "attn.in_proj_", name)
