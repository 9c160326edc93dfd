"""The layouts of diffusers' pipelines: how prompts become a condition, and which denoiser wraps the network.

To add a layout, write one function and one row of ``LAYOUTS``. The functions call diffusers' pipelines, which encode
the text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_core.diffusion.denoiser import NetworkDenoiser, TransformerDenoiser, UNetDenoiser
from ddil_core.diffusion.transformers import CaptionedDenoiser, FluxDenoiser
from ddil_core.gaussians.denoiser import PointDenoiser
from ddil_core.models.image_format import LEVELS, POINTS, ImageFormat
from ddil_core.support.errors import DdilError
from ddil_core.support.misfits import value_text
from ddil_core.support.registry import Registry

Tensors = dict[str, Tensor]
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
UNLIMITED = 10**9
"""Smaller than the ``model_max_length`` that transformers gives a tokenizer without a limit."""


@dataclass(frozen=True)
class Layout:
    """A row of the table of layouts.

    Attributes:
        pipeline: The name of diffusers' pipeline class.
        network: The name of the denoising network in the pipeline.
        denoiser: The class that wraps the network.
        guidance_scale: diffusers' default guidance scale.
        encode: ``encode(pipeline, prompts)`` returns the tensors [B, …] of the condition.
        unconditional: ``unconditional(pipeline)`` returns the tensors [1, …] of the condition without a prompt. None:
            the condition of the empty prompt.
        library: The module of the pipeline class.
        images: What the images are.
        world: The world of small teachers of this layout: their data set, and the folder of their protocols.
        max_tokens: ``max_tokens(pipeline)`` returns the number of tokens that the pipeline gives a text encoder, by the
            tokenizer's name. Any other tokenizer is limited by the positions of its text encoder.
        sized: ``sized(size)`` returns the tensors [1, …] of a condition that depend on the size (H, W) of the images in
            pixels.
        spacing: The spacing (``SPACINGS``) of the pipeline's own times. None: the scheduler has them.
    """

    pipeline: str
    network: str
    denoiser: type[NetworkDenoiser]
    guidance_scale: float
    encode: Callable[[Any, list[str]], Tensors]
    unconditional: Callable[[Any], Tensors] | None = None
    library: str = "diffusers"
    images: ImageFormat = LEVELS
    world: str = "shapes"
    max_tokens: Callable[[Any], Mapping[str, int]] = lambda pipeline: {}
    sized: Callable[[tuple[int, int]], Tensors] | None = None
    spacing: str | None = None

    def nothing(self, pipeline: Any) -> Tensors:
        """Return the tensors [1, …] of the condition without a prompt and without its size."""
        return self.encode(pipeline, [""]) if self.unconditional is None else self.unconditional(pipeline)


def _stable_diffusion(pipeline: Any, prompts: list[str]) -> Tensors:
    text, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, False)
    return {"encoder_hidden_states": text}


def _sdxl(pipeline: Any, prompts: list[str]) -> Tensors:
    text, _, pooled, _ = pipeline.encode_prompt(prompts, device=pipeline.device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text, "text_embeds": pooled}


def _sdxl_unconditional(pipeline: Any) -> Tensors:
    """Return zeros or the empty prompt's embedding, by the pipeline's ``force_zeros_for_empty_prompt``."""
    _, text, _, pooled = pipeline.encode_prompt([""], device=pipeline.device, do_classifier_free_guidance=True)
    return {"encoder_hidden_states": text, "text_embeds": pooled}


def _sdxl_sized(size: tuple[int, int]) -> Tensors:
    """Return SDXL's size ids of an uncropped image: original size, crop corner, target size, each (height, width)."""
    return {"time_ids": torch.tensor([[*size, 0, 0, *size]])}


def _sd3(pipeline: Any, prompts: list[str]) -> Tensors:
    """Encode by the two CLIP encoders and T5. Zeros stand for the tokens of a T5 that is left out."""
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts,
        None,
        None,
        device=pipeline.device,
        do_classifier_free_guidance=False,
        max_sequence_length=sd3_t5_tokens(pipeline),
    )
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def sd3_t5_tokens(pipeline: Any) -> int:
    """Return how many tokens of T5 SD3's network reads.

    A network that is exactly as wide as the two CLIP encoders together was made without T5, and reads none.
    """
    clip = sum(encoder.config.hidden_size for encoder in (pipeline.text_encoder, pipeline.text_encoder_2))
    made_without = pipeline.text_encoder_3 is None and pipeline.transformer.config.joint_attention_dim == clip
    return 0 if made_without else _sd3_tokens(pipeline)["tokenizer_3"]


def _sd3_tokens(pipeline: Any) -> dict[str, int]:
    return {"tokenizer_3": 256}


def flux_tokens(pipeline: Any) -> dict[str, int]:
    """Return dev's number of T5's tokens, or that of schnell, which reads no guidance."""
    return {"tokenizer_2": 512 if pipeline.transformer.config.guidance_embeds else 256}


def _flux(pipeline: Any, prompts: list[str]) -> Tensors:
    text, pooled, _ = pipeline.encode_prompt(
        prompts, device=pipeline.device, max_sequence_length=flux_tokens(pipeline)["tokenizer_2"]
    )
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


CAPTION_TOKENS = 300
"""The number of tokens of a caption that PixArt-Σ and SANA read."""


def _pixart_tokens(pipeline: Any) -> dict[str, int]:
    return {"tokenizer": CAPTION_TOKENS}


def _pixart(pipeline: Any, prompts: list[str]) -> Tensors:
    text, mask, _, _ = pipeline.encode_prompt(prompts, False, device=pipeline.device)
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def _sana_tokens(pipeline: Any) -> dict[str, int]:
    """Return how many tokens of a prompt Gemma reads: two less than 300 beside the instruction, and its first one."""
    return {"tokenizer": CAPTION_TOKENS - 1}


def _sana(pipeline: Any, prompts: list[str]) -> Tensors:
    """Encode prompts after the instruction to Gemma that diffusers' pipeline has by default."""
    instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    return _sana_encoded(pipeline, prompts, instruction)


def _sana_unconditional(pipeline: Any) -> Tensors:
    return _sana_encoded(pipeline, [""], None)  # as diffusers: without the instruction


def _sana_encoded(pipeline: Any, prompts: list[str], instruction: list[str] | None) -> Tensors:
    text, mask, _, _ = pipeline.encode_prompt(
        prompts, False, device=pipeline.device, complex_human_instruction=instruction
    )
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def _gaussians(pipeline: Any, prompts: list[str]) -> Tensors:
    return {"classes": pipeline.encode_classes(prompts)}


LAYOUTS = Registry(
    "layout",
    "ddil.layouts",
    Layout,
    (
        Layout("StableDiffusionPipeline", "unet", UNetDenoiser, 7.5, _stable_diffusion),
        Layout("StableDiffusionXLPipeline", "unet", UNetDenoiser, 5.0, _sdxl, _sdxl_unconditional, sized=_sdxl_sized),
        Layout("LatentConsistencyModelPipeline", "unet", UNetDenoiser, 8.5, _stable_diffusion),
        Layout("StableDiffusion3Pipeline", "transformer", TransformerDenoiser, 7.0, _sd3, max_tokens=_sd3_tokens),
        Layout("FluxPipeline", "transformer", FluxDenoiser, 3.5, _flux, max_tokens=flux_tokens, spacing="even"),
        Layout("PixArtSigmaPipeline", "transformer", CaptionedDenoiser, 4.5, _pixart, max_tokens=_pixart_tokens),
        Layout(
            *("SanaPipeline", "transformer", CaptionedDenoiser, 4.5, _sana, _sana_unconditional),
            max_tokens=_sana_tokens,
        ),
        Layout(
            "GaussiansPipeline",
            "denoiser",
            PointDenoiser,
            1.0,
            _gaussians,
            library="ddil_core.gaussians.pipeline",
            images=POINTS,
            world="gaussians",
        ),
    ),
    key=lambda layout: layout.pipeline,
)
"""The layouts by the name of diffusers' pipeline class."""


def bound_tokenizers(pipeline: Any, layout: Layout, reference: str) -> None:
    """Limit each tokenizer to the number of positions of its text encoder, unless the layout limits it.

    Raises:
        DdilError: neither the tokenizer nor the text encoder has a limit, or the tokenizer's is no number.
    """
    limited = layout.max_tokens(pipeline)
    for name in TEXT_ENCODERS:
        tokenizer_name = name.replace("text_encoder", "tokenizer")
        tokenizer, encoder = getattr(pipeline, tokenizer_name, None), getattr(pipeline, name, None)
        if tokenizer is None or encoder is None or tokenizer_name in limited:
            continue
        longest = tokenizer.model_max_length
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
            raise DdilError(
                f"the tokenizer of the model {reference!r} has the model_max_length {value_text(longest)} in its "
                "tokenizer_config.json; set it to a number of at least 1"
            )
        limit = getattr(encoder.config, "max_position_embeddings", None)
        if limit is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        elif tokenizer.model_max_length > UNLIMITED:
            raise DdilError(
                f"the tokenizer of the model {reference!r} has no model_max_length, and its {name} has no limit of "
                "tokens; set model_max_length in tokenizer_config.json"
            )


def count_truncated(pipeline: Any, layout: Layout, prompts: Sequence[str]) -> int:
    """Count the prompts that are too long for a text encoder of the pipeline."""
    limited = layout.max_tokens(pipeline)
    distinct, too_long = list(dict.fromkeys(prompts)), set()
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            limit = limited.get(name, tokenizer.model_max_length)
            tokens = tokenizer(distinct).input_ids
            too_long |= {prompt for prompt, ids in zip(distinct, tokens, strict=True) if len(ids) > limit}
    return sum(prompt in too_long for prompt in prompts)
