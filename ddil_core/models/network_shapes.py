"""What is known of a model's network before its weights are loaded: enough to build it without memory, and to call it.

The network is built by its class and configuration. The shapes of its inputs follow from the configurations.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import NetworkDenoiser
from ddil_core.models import layouts
from ddil_core.models.known_sizes import PIXELS, architecture_of, known_geometry
from ddil_core.models.layouts import LAYOUTS
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand

TOKENS = 77
"""The number of tokens of CLIP's text encoders."""

Shapes = dict[str, tuple[int, ...]]
"""The shape of each input of a network, without the batch."""


def _unet(config: Mapping[str, Any], pipeline: Any | None) -> Shapes:
    shapes: Shapes = {"encoder_hidden_states": (_clip_tokens(pipeline), config["cross_attention_dim"])}
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        shapes |= {"text_embeds": (pooled,), "time_ids": (6,)}
    return shapes


def _sd3(config: Mapping[str, Any], pipeline: Any) -> Shapes:
    tokens = _clip_tokens(pipeline) + layouts.sd3_t5_tokens(pipeline)
    text = (tokens, config["joint_attention_dim"])
    return {"encoder_hidden_states": text, "pooled_projections": (config["pooled_projection_dim"],)}


def _flux(config: Mapping[str, Any], pipeline: Any) -> Shapes:
    text = (layouts.flux_tokens(pipeline)["tokenizer_2"], config["joint_attention_dim"])
    scale: Shapes = {"guidance": ()} if config["guidance_embeds"] else {}
    return {"encoder_hidden_states": text, "pooled_projections": (config["pooled_projection_dim"],)} | scale


def _captioned(config: Mapping[str, Any], pipeline: Any) -> Shapes:
    tokens = layouts.CAPTION_TOKENS
    return {"encoder_hidden_states": (tokens, config["caption_channels"]), "encoder_attention_mask": (tokens,)}


def _clip_tokens(pipeline: Any | None) -> int:
    return TOKENS if pipeline is None else int(pipeline.text_encoder.config.max_position_embeddings)


INPUTS: dict[str, Callable[[Mapping[str, Any], Any], Shapes]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _captioned,
    "SanaTransformer2DModel": _captioned,
}
"""The inputs of each class of networks, by its configuration and its pipeline, whose weights are not needed."""


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


def network_shape(model: Model) -> NetworkShape:
    """Return what is known of a model's network. The model may be without its weights (:func:`outline`).

    Raises:
        WrongCommand: the inputs of its class of networks are not known.
    """
    net, pipeline = model.denoiser.net, model.pipeline
    kind, config = type(net).__name__, model.denoiser.config
    if kind not in INPUTS:
        raise WrongCommand(
            f"the memory of distilling {model.reference!r} cannot be estimated: its network is a {kind}, and the "
            f"inputs are known of {', '.join(INPUTS)}; leave out --method"
        )
    autoencoder = sum(weight.numel() for weight in pipeline.vae.parameters())
    inputs = INPUTS[kind](config, pipeline)
    return NetworkShape(kind, config, model.layout.denoiser, model.latent_shape, inputs, autoencoder)


def known_shape(name: str, height: int | None = None, width: int | None = None) -> NetworkShape | None:
    """Return what is known of the network of a named system without its files; None where it is not known here.

    Args:
        name: The name of a row of ``systems.yaml``.
        height: The height of the images in pixels. None: the system's own.
        width: The width of the images in pixels. None: the system's own.

    Raises:
        WrongCommand: the system cannot draw images of this size.
    """
    known, geometry = architecture_of(name), known_geometry(name)
    if known is None or geometry is None:
        return None
    pipeline = "StableDiffusionXLPipeline" if "addition_embed_type" in known.unet else "StableDiffusionPipeline"
    rows, columns = geometry.size(height, width, name)
    latent = (4, rows // PIXELS, columns // PIXELS)
    config = {"in_channels": 4, "sample_size": geometry.own[0] // PIXELS, **known.unet}
    kind, autoencoder = "UNet2DConditionModel", known.parameters["vae"]
    return NetworkShape(kind, config, LAYOUTS[pipeline].denoiser, latent, INPUTS[kind](config, None), autoencoder)
