"""The layouts of diffusers' pipelines: how each turns prompts into a network's condition, and which denoiser its network is.

An addition is one function and one row of ``LAYOUTS``. Texts are encoded by diffusers' own pipelines, which know their encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_core.denoiser import NetworkDenoiser, TransformerDenoiser, UNetDenoiser

Tensors = dict[str, Tensor]
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
MAX_SEQUENCE = 256
"""The tokens that SD3's pipeline gives its T5 encoder."""


@dataclass(frozen=True)
class Layout:
    """A row: diffusers' pipeline class, the name of its network there, the denoiser that this is, diffusers' default guidance.

    ``encode(pipeline, prompts)`` gives the condition's tensors [B, …], ``silent(pipeline)`` those [1, …] where there is no prompt
    (None: the empty prompt's)."""

    pipeline: str
    network: str
    denoiser: type[NetworkDenoiser]
    guidance_scale: float
    encode: Callable[[Any, list[str]], Tensors]
    silent: Callable[[Any], Tensors] | None = None

    def nothing(self, pipeline: Any) -> Tensors:
        """What the network is told, one row, where there is no prompt."""
        return self.encode(pipeline, [""]) if self.silent is None else self.silent(pipeline)


def _stable_diffusion(pipeline: Any, prompts: list[str]) -> Tensors:
    text, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, False)
    return {"encoder_hidden_states": text}


def _sdxl(pipeline: Any, prompts: list[str]) -> Tensors:
    text, _, pooled, _ = pipeline.encode_prompt(prompts, device=pipeline.device, do_classifier_free_guidance=False)
    return _sized(pipeline, text, pooled)


def _sdxl_silent(pipeline: Any) -> Tensors:
    """Zeros, or the empty prompt, as the pipeline's ``force_zeros_for_empty_prompt`` says."""
    _, text, _, pooled = pipeline.encode_prompt([""], device=pipeline.device, do_classifier_free_guidance=True)
    return _sized(pipeline, text, pooled)


def _sized(pipeline: Any, text: Tensor, pooled: Tensor) -> Tensors:
    """SDXL's ids of the size before cropping, the crop's corner and the size asked for: a whole picture of the model's own size."""
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=text.dtype, device=text.device)
    return {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": ids.repeat(len(text), 1)}


def _sd3(pipeline: Any, prompts: list[str]) -> Tensors:
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, device=pipeline.device, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE
    )
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


LAYOUTS = {
    layout.pipeline: layout
    for layout in (
        Layout("StableDiffusionPipeline", "unet", UNetDenoiser, 7.5, _stable_diffusion),
        Layout("StableDiffusionXLPipeline", "unet", UNetDenoiser, 5.0, _sdxl, _sdxl_silent),
        Layout("LatentConsistencyModelPipeline", "unet", UNetDenoiser, 8.5, _stable_diffusion),
        Layout("StableDiffusion3Pipeline", "transformer", TransformerDenoiser, 7.0, _sd3),
    )
}


def cut(pipeline: Any, prompts: Sequence[str]) -> int:
    """How many of the prompts are longer than a text encoder of the pipeline takes."""
    distinct, long = list(dict.fromkeys(prompts)), set()
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            limit = MAX_SEQUENCE if name == "tokenizer_3" else tokenizer.model_max_length
            tokens = tokenizer(distinct).input_ids
            long |= {prompt for prompt, ids in zip(distinct, tokens, strict=True) if len(ids) > limit}
    return sum(prompt in long for prompt in prompts)
