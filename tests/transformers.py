"""Tiny real pipelines in the layouts of today's transformers, untrained, for the words and the sizes of the shapes world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.pipelines import tiny_autoencoder, tiny_t5, tiny_text_encoder

LATENT_CHANNELS = 8
HALF_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


def flux(words: Path, seed: int, frame_seed: int, distilled: bool = False) -> Any:
    """FLUX.1: dev reads its guidance and shifts its times by the resolution; schnell, ``distilled``, does neither."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from ddil_core.shapes.training.architecture import write_tokenizer

    tokenizer, dev = write_tokenizer(words), not distilled
    torch.manual_seed(frame_seed)
    parts: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": tiny_text_encoder(tokenizer)}
    parts |= tiny_t5(words / "t5", "_2", width=32)
    parts["vae"] = tiny_autoencoder(
        shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False
    )
    torch.manual_seed(seed)
    network = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    return FluxPipeline(transformer=network, scheduler=scheduler, **parts)


def pixart(words: Path, seed: int, frame_seed: int, distilled: bool = False) -> Any:
    """PixArt-Σ: a transformer that predicts ε and a variance."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(frame_seed)
    parts = tiny_t5(words / "t5", "", width=32)
    parts["vae"] = tiny_autoencoder()
    torch.manual_seed(seed)
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=32,
    )
    return PixArtSigmaPipeline(transformer=network, scheduler=DPMSolverMultistepScheduler(**HALF_BETAS), **parts)


def sana(words: Path, seed: int, frame_seed: int, distilled: bool = False) -> Any:
    """SANA: a flow with linear attention, an AutoencoderDC of 32 pixels a latent, and Gemma."""
    import torch
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(frame_seed)
    parts = tiny_gemma(words / "gemma")
    channels = (8,) * 6
    parts["vae"] = AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )
    torch.manual_seed(seed)
    network = SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=2,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, beta_schedule="linear"
    )
    return SanaPipeline(transformer=network, scheduler=scheduler, **parts)


def tiny_gemma(folder: Path) -> dict[str, Any]:
    """A Gemma 2 text encoder, and its tokenizer: the letters, and the words of the shapes world."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

    from ddil_core.shapes.training.architecture import caption_words

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *map(chr, range(33, 127))]
    merges: list[tuple[str, str]] = []
    for word in caption_words():
        start = "▁" + word[0]
        for left, right in [("▁", word[0]), *((start + word[1:i], word[i]) for i in range(1, len(word)))]:
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    GemmaTokenizerFast(vocab=vocabulary, merges=merges).save_pretrained(folder)
    tokenizer = GemmaTokenizerFast.from_pretrained(folder)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return {"tokenizer": tokenizer, "text_encoder": Gemma2Model(config)}


BUILDERS: dict[str, Callable[..., Any]] = {
    "FluxPipeline": flux,
    "PixArtSigmaPipeline": pixart,
    "SanaPipeline": sana,
}
"""The builders by the name of diffusers' pipeline class: (folder, the network's seed, the frame's seed, distilled)."""
