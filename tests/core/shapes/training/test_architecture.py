"""The networks of the shapes world fit each other, and its tokenizer has a token for every word."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTokenizer

from ddil_core.shapes.batches import draw_batch
from ddil_core.shapes.scorer import scorer_config
from ddil_core.shapes.training import architecture
from ddil_core.shapes.training.architecture import LATENT_CHANNELS, LATENT_SIZE, MAX_TOKENS, TEXT_WIDTH


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """Written, then loaded as any CLIP tokenizer is."""
    folder = tmp_path_factory.mktemp("tokenizer")
    architecture.write_tokenizer(folder).save_pretrained(folder / "saved")
    return CLIPTokenizer.from_pretrained(folder / "saved")


def test_each_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    words = architecture.caption_words()
    assert len(words) == len(set(words)) > 25
    assert [tokenizer.tokenize(word) for word in words] == [[f"{word}</w>"] for word in words]


def test_captions_are_their_words_between_start_and_end(tokenizer: CLIPTokenizer) -> None:
    for caption in draw_batch(50, 0).captions:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids)
        assert tokens == ["<|startoftext|>", *(f"{word}</w>" for word in caption.split()), "<|endoftext|>"]
        assert len(tokens) <= MAX_TOKENS


def test_other_words_fall_apart_and_nothing_is_unknown(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.tokenize("dog") == ["d", "o", "g</w>"]
    assert tokenizer.tokenize("reds") == ["r", "e", "d", "s</w>"]
    for word in ("zebra", "bed", "backgrounds", "reddish"):
        pieces = tokenizer.tokenize(word)
        assert len(pieces) > 1 and "".join(pieces) == f"{word}</w>"


def test_the_empty_caption_pads_to_the_model_length(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenizer("", padding="max_length").input_ids
    assert len(tokens) == tokenizer.model_max_length == MAX_TOKENS
    assert tokens[:2] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_the_scorer_has_a_row_for_every_token(tokenizer: CLIPTokenizer) -> None:
    config = scorer_config()["model_cfg"]["text_cfg"]
    assert (config["vocab_size"], config["context_length"]) == (len(tokenizer), MAX_TOKENS)


@torch.no_grad()
def test_the_networks_fit_each_other(tokenizer: CLIPTokenizer) -> None:
    batch = draw_batch(2, 0)
    latents = architecture.autoencoder().encode(batch.pixels()).latent_dist.mean
    assert latents.shape == (2, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    tokens = tokenizer(batch.captions, padding="max_length", return_tensors="pt").input_ids
    text = architecture.text_encoder(tokenizer)(tokens).last_hidden_state
    assert text.shape == (2, MAX_TOKENS, TEXT_WIDTH)
    v = architecture.unet()(latents, torch.tensor([10, 900]), text).sample
    assert v.shape == latents.shape


def test_the_networks_are_small_enough_to_ship(tokenizer: CLIPTokenizer) -> None:
    """Half precision for the pipeline, single for the scorer: the folder must stay under 30 MB."""
    from ddil_core.shapes.scorer import build_scorer

    pipeline = architecture.autoencoder(), architecture.unet(), architecture.text_encoder(tokenizer)
    halves = sum(p.numel() for network in pipeline for p in network.parameters())
    singles = sum(p.numel() for p in build_scorer().parameters())
    assert 2 * halves + 4 * singles < 28e6
