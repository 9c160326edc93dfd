"""A teacher that this project has never seen: simple pictures with captions, and small networks without ``ddil.json``.

The pictures have 32 px: one of five forms, in one of eight colours and at one of five places, on a ground of one of
four colours. The tokenizer knows whole words and has no start token. The teacher predicts ε in Stable Diffusion's
layout, with the scheduler that such models are published with. Nothing here comes from the shapes world.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

SIZE = 32
FORMS = ("disc", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (214, 48, 49),
    "cyan": (60, 190, 200),
    "yellow": (246, 214, 60),
    "green": (46, 160, 67),
    "blue": (52, 101, 222),
    "purple": (142, 68, 173),
    "white": (245, 245, 245),
    "black": (24, 24, 24),
}
PLACES = {
    "in the middle": (0.5, 0.5),
    "at the left": (0.28, 0.5),
    "at the right": (0.72, 0.5),
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
}
GROUNDS = {"grey": (128, 128, 132), "brown": (112, 74, 44), "navy": (20, 30, 84), "pink": (238, 178, 196)}
MAX_TOKENS = 12
TEXT_WIDTH = 64
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def picture(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Draw a picture of 32 px at random. Return it with its caption."""
    form, colour, place, ground = (str(rng.choice(list(names))) for names in (FORMS, COLOURS, PLACES, GROUNDS))
    large = 4 * SIZE  # the picture is drawn larger and scaled down, so that its edges are smooth
    image = Image.new("RGB", (large, large), _varied(GROUNDS[ground], rng))
    x, y = large * (np.array(PLACES[place]) + rng.uniform(-0.05, 0.05, 2))
    _draw(
        ImageDraw.Draw(image), form, float(x), float(y), large * rng.uniform(0.15, 0.21), _varied(COLOURS[colour], rng)
    )
    return image.resize((SIZE, SIZE), Image.Resampling.BOX), f"a {colour} {form} {place} of a {ground} ground"


def _varied(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(np.array(colour) + rng.normal(0, 8, 3), 0, 255))


def _draw(draw: ImageDraw.ImageDraw, form: str, x: float, y: float, r: float, colour: tuple[int, ...]) -> None:
    """Draw a form of radius ``r`` around (x, y)."""
    box = (x - r, y - r, x + r, y + r)
    if form == "disc":
        draw.ellipse(box, fill=colour)
    elif form == "square":
        draw.rectangle(box, fill=colour)
    elif form == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    elif form == "cross":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=colour)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=colour)
    else:
        draw.ellipse(box, outline=colour, width=round(r / 2.5))


def write_pictures(folder: Path, count: int, seed: int) -> Path:
    """Write ``count`` captioned pictures, with the captions in ``metadata.jsonl``. Return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(seed), list[str]()
    for index in range(count):
        image, caption = picture(rng)
        image.save(folder / f"{index:05}.png")
        lines.append(json.dumps({"file_name": f"{index:05}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, without a start token."""
    phrases = (*FORMS, *COLOURS, *PLACES, *GROUNDS, "a of ground")
    words = ["[PAD]", "[UNK]", "[END]", *dict.fromkeys(word for phrase in phrases for word in phrase.split())]
    words_to_ids = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    words_to_ids.normalizer = normalizers.Lowercase()
    words_to_ids.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[END]",
        model_max_length=MAX_TOKENS,
    )


def text_encoder(words: PreTrainedTokenizerFast, width: int = TEXT_WIDTH, layers: int = 2) -> CLIPTextModel:
    """Return an untrained text encoder for the tokenizer's words."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def autoencoder(channels: tuple[int, int, int] = (8, 16, 32)) -> AutoencoderKL:
    """Return an untrained autoencoder: images of 32 px become latents [4, 8, 8]."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def unet(channels: tuple[int, int] = (48, 96), text_width: int = TEXT_WIDTH) -> UNet2DConditionModel:
    """Return an untrained U-Net that predicts ε."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def save_teacher(
    folder: Path,
    vae: AutoencoderKL,
    network: UNet2DConditionModel,
    encoder: CLIPTextModel,
    words: PreTrainedTokenizerFast,
) -> Path:
    """Write the teacher as such models are published: half precision, and no file of this project. Return the folder."""
    scheduler = PNDMScheduler(**BETAS, prediction_type="epsilon", skip_prk_steps=True, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=encoder.half(),
        tokenizer=words,
        unet=network.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
