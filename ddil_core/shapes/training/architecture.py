"""The networks of the shapes world in Stable Diffusion's layout, small enough for two CPU cores."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddil_core.shapes.scene import BACKGROUNDS, COLOURS, IMAGE_SIZE, RELATIONS, SHAPES, SIZES
from ddil_core.support.files import write_text

LATENT_CHANNELS = 8
LATENT_SIZE = IMAGE_SIZE // 8
TEXT_WIDTH = 128
MAX_TOKENS = 20
"""The length of a token sequence, with its start and end. Captions of two objects have 13 words."""


def autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder: 64 × 64 images become 8 × 8 × 8 latents."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def unet() -> UNet2DConditionModel:
    """Return an untrained U-Net that predicts v. It reads the caption at both levels, 8 × 8 and 4 × 4."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(80, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder for the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class LayoutHead(nn.Module):
    """Predicts an image's coarse latents from the caption alone. Only the text encoder's training uses this head.

    Text states [B, L, TEXT_WIDTH] become the mean latents [B, 16, LATENT_CHANNELS] of the image's 4 × 4 places.
    """

    places = 16

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(self.places, TEXT_WIDTH))
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(TEXT_WIDTH, 4, TEXT_WIDTH // 4, cross_attention_dim=TEXT_WIDTH) for _ in range(2)
        )
        self.out = nn.Linear(TEXT_WIDTH, LATENT_CHANNELS)

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.queries.expand(len(states), -1, -1)
        for block in self.blocks:
            hidden = block(hidden, encoder_hidden_states=states)
        return self.out(hidden)


def use_plain_attention(*networks: nn.Module) -> None:
    """Replace torch's fused attention by plain attention, which is faster on a CPU in bfloat16.

    An update of the U-Net takes 0.11 s instead of 0.21 s (batch 32, two cores).
    """
    for network in networks:
        if isinstance(network, CLIPTextModel):
            network.set_attn_implementation("eager")
        for module in network.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())


def caption_words() -> list[str]:
    """Return all words of captions, each once."""
    phrases = (*SIZES, *COLOURS, *SHAPES, *RELATIONS, *BACKGROUNDS, "a on background")
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write and return a CLIP tokenizer. Each word of captions is one token; other words become letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in caption_words():
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            # Join from the right: each word ends in </w>, so no merge of one word starts inside another word.
            merge = f"{pieces[-2]} {pieces[-1]}"
            pieces[-2:] = [pieces[-2] + pieces[-1]]
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(pieces[-1])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    write_text(folder / "vocab.json", json.dumps({token: index for index, token in enumerate(vocabulary)}))
    write_text(folder / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
