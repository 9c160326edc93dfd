"""What is known of a model's network before its weights are loaded: enough to build it without memory, and to call it.

The network is built by its class and configuration. The shapes of its inputs follow from the configuration.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import NetworkDenoiser
from ddil_core.models.catalogue import parameters
from ddil_core.models.known_sizes import architecture_of
from ddil_core.models.layouts import LAYOUTS
from ddil_core.models.memory import latent_size
from ddil_core.models.references import resolve
from ddil_core.models.system_specs import load_systems
from ddil_core.models.weights import components, read_index, read_json
from ddil_core.support.errors import WrongCommand

TOKENS = 77
"""The number of tokens of CLIP's text encoders."""

PIXELS = 8
"""The pixels of a side that one latent of Stable Diffusion stands for."""

T5_TOKENS = 256
"""The number of tokens that SD3's pipeline gives T5."""

Shapes = dict[str, tuple[int, ...]]
"""The shape of each input of a network, without the batch."""


def _unet(config: Mapping[str, Any], tokens: int) -> Shapes:
    shapes: Shapes = {"encoder_hidden_states": (tokens, config["cross_attention_dim"])}
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        shapes |= {"text_embeds": (pooled,), "time_ids": (6,)}
    return shapes


def _sd3(config: Mapping[str, Any], tokens: int) -> Shapes:
    text = (tokens + T5_TOKENS, config["joint_attention_dim"])
    return {"encoder_hidden_states": text, "pooled_projections": (config["pooled_projection_dim"],)}


INPUTS: dict[str, Callable[[Mapping[str, Any], int], Shapes]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
}
"""The inputs of each class of networks, by its configuration and the number of CLIP's tokens."""


@dataclass(frozen=True)
class NetworkShape:
    """A network without its weights.

    Attributes:
        kind: The class of the network, in diffusers.
        config: Its configuration.
        denoiser: The class that calls it.
        latent: The shape (C, H, W) of its latents.
        inputs: The shapes of its other inputs.
        autoencoder: The number of parameters of the model's autoencoder.
    """

    kind: str
    config: Mapping[str, Any]
    denoiser: type[NetworkDenoiser]
    latent: tuple[int, int, int]
    inputs: Shapes
    autoencoder: int

    def build(self) -> nn.Module:
        """Return a network with random weights, float32. In a context of fake tensors it takes no memory."""
        network: nn.Module = getattr(importlib.import_module("diffusers"), self.kind).from_config(dict(self.config))
        return network

    def conditions(self, rows: int) -> dict[str, Tensor]:
        """Return inputs of zeros, float32, for a batch of ``rows``."""
        return {name: torch.zeros(rows, *shape) for name, shape in self.inputs.items()}


def network_shape(reference: str, variant: str | None = None) -> NetworkShape:
    """Return what is known of a model's network, from its files, or where they are not here from its name.

    Raises:
        WrongCommand: the files are not here and the architecture is not known, or the class of the network is not.
        DdilError: the files are damaged.
    """
    try:
        resolve(reference)
    except WrongCommand:
        known = architecture_of(reference)
        if known is None:
            raise
        pipeline = "StableDiffusionXLPipeline" if "addition_embed_type" in known.unet else "StableDiffusionPipeline"
        resolution = load_systems()[reference].resolution or PIXELS * 64
        config = {"in_channels": 4, "sample_size": resolution // PIXELS, **known.unet}
        return _shape(reference, pipeline, "UNet2DConditionModel", config, TOKENS, known.parameters["vae"])
    folder, counts = parameters(reference, variant)
    index = read_index(folder)
    kinds, pipeline = components(index), str(index["_class_name"])
    name = LAYOUTS[pipeline].network if pipeline in LAYOUTS else "unet"
    config = read_json(folder / name / "config.json")
    return _shape(reference, pipeline, kinds[name][1], config, _tokens(folder), counts.get("vae", 0))


def _tokens(folder: Path) -> int:
    config = folder / "text_encoder" / "config.json"
    return int(read_json(config).get("max_position_embeddings", TOKENS)) if config.is_file() else TOKENS


def _shape(
    reference: str, pipeline: str, kind: str, config: Mapping[str, Any], tokens: int, autoencoder: int
) -> NetworkShape:
    if pipeline not in LAYOUTS or kind not in INPUTS:
        raise WrongCommand(
            f"the memory of distilling {reference!r} cannot be estimated: its network is a {kind} of a {pipeline}, and "
            f"the inputs are known of {', '.join(INPUTS)}; leave out --method"
        )
    latent = (int(config["in_channels"]), *latent_size(config, reference))
    return NetworkShape(kind, config, LAYOUTS[pipeline].denoiser, latent, INPUTS[kind](config, tokens), autoencoder)
