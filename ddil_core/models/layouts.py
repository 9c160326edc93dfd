"""The layouts of diffusers' pipelines: how each turns prompts into a network's condition, and which denoiser its network is.

An addition is one function and one row of ``LAYOUTS``. Texts are encoded by diffusers' own pipelines, which know their encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_core.diffusion.denoiser import NetworkDenoiser, TransformerDenoiser, UNetDenoiser
from ddil_core.models.memory import latent_size
from ddil_core.support.errors import DdilError
from ddil_core.support.registry import Registry

Tensors = dict[str, Tensor]
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
UNLIMITED = 10**9
"""transformers gives a tokenizer without ``model_max_length`` a number far above this one."""
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
    """SDXL's ids of the size before cropping, the crop's corner and the size asked for: a whole picture of the model's own size,
    height before width."""
    size = [side * pipeline.vae_scale_factor for side in latent_size(pipeline.unet.config, type(pipeline).__name__)]
    ids = torch.tensor([[*size, 0, 0, *size]], dtype=text.dtype, device=text.device)
    return {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": ids.repeat(len(text), 1)}


def _sd3(pipeline: Any, prompts: list[str]) -> Tensors:
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, device=pipeline.device, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE
    )
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


LAYOUTS = Registry(
    "layout",
    "ddil.layouts",
    Layout,
    (
        Layout("StableDiffusionPipeline", "unet", UNetDenoiser, 7.5, _stable_diffusion),
        Layout("StableDiffusionXLPipeline", "unet", UNetDenoiser, 5.0, _sdxl, _sdxl_silent),
        Layout("LatentConsistencyModelPipeline", "unet", UNetDenoiser, 8.5, _stable_diffusion),
        Layout("StableDiffusion3Pipeline", "transformer", TransformerDenoiser, 7.0, _sd3),
    ),
    key=lambda layout: layout.pipeline,
)
"""The layouts by the name of diffusers' pipeline class. Another package adds a layout by an entry point of ``ddil.layouts``."""


def bound_tokenizers(pipeline: Any, reference: str) -> None:
    """Let no tokenizer give more tokens than its text encoder has positions, where its files name no length or a longer one.

    Raises:
        DdilError: neither the tokenizer nor the text encoder says how long a prompt may be.
    """
    for name in TEXT_ENCODERS[:2]:  # T5, the third, has no positions, and is told its length by ``MAX_SEQUENCE``
        tokenizer, encoder = (
            getattr(pipeline, name.replace("text_encoder", "tokenizer"), None),
            getattr(pipeline, name, None),
        )
        if tokenizer is None or encoder is None:
            continue
        limit = getattr(encoder.config, "max_position_embeddings", None)
        if limit is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        elif tokenizer.model_max_length > UNLIMITED:
            raise DdilError(
                f"the tokenizer of the model {reference!r} has no model_max_length, and its {name} does not say how many tokens it "
                "takes; set model_max_length in tokenizer_config.json"
            )


def count_truncated(pipeline: Any, prompts: Sequence[str]) -> int:
    """How many of the prompts are longer than a text encoder of the pipeline takes."""
    distinct, long = list(dict.fromkeys(prompts)), set()
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            limit = MAX_SEQUENCE if name == "tokenizer_3" else tokenizer.model_max_length
            tokens = tokenizer(distinct).input_ids
            long |= {prompt for prompt, ids in zip(distinct, tokens, strict=True) if len(ids) > limit}
    return sum(prompt in long for prompt in prompts)
