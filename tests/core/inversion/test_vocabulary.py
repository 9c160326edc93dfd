"""Words of any tokenizer: their places in a prompt, their rows, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.tokenizer import bytes_to_unicode
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from ddil_core.data.datasets import open_data
from ddil_core.inversion import InversionProblem
from ddil_core.inversion.ph2p import PH2PSettings, ph2p
from ddil_core.inversion.words import Words, encode, gather_words, model_words
from ddil_core.models.model import Model, load_model
from ddil_core.shapes.training.architecture import write_tokenizer
from ddil_core.support.errors import WrongCommand
from tests.pipelines import save_pipeline

LIMIT = 16
TEXT = ["a", "small", "red", "circle", "left", "of", "large", "blue", "star", "on", "grey", "background"]


def fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LIMIT, **special)


def framed(tokenizer: Tokenizer, template: str, *names: str) -> None:
    places = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=places)


def word_level(folder: Path) -> Any:
    """Nothing before a prompt and nothing after it; the first word is the first token."""
    tokens = [*TEXT, "<pad>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(tokenizer, pad_token="<pad>", unk_token="<unk>")


def word_piece(folder: Path) -> Any:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *TEXT, "##ing", "##s", "back", "##ground"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    framed(tokenizer, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return fast(tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def byte_level(folder: Path, *, add_prefix_space: bool = False) -> Any:
    """GPT-2's kind, whose first word has another token than the same word later."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(TEXT), " ".join(TEXT[::-1])] * 20, trainer)
    framed(tokenizer, "<s> $A </s>", "<s>", "</s>")
    return fast(tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def spaced(folder: Path) -> Any:
    return byte_level(folder, add_prefix_space=True)


def sentence_piece(folder: Path) -> Any:
    """An end token and no start token, with padding at the left."""
    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz▁"]
    tokens = [("<unk>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), *((f"▁{word}", -3.0) for word in TEXT), *letters]
    tokenizer = Tokenizer(models.Unigram(tokens, 0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    framed(tokenizer, "$A </s>", "</s>")
    return fast(tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left")


def clip(folder: Path) -> Any:
    tokenizer = write_tokenizer(folder)
    tokenizer.model_max_length = LIMIT
    return tokenizer


KINDS: tuple[Callable[[Path], Any], ...] = (word_level, word_piece, byte_level, spaced, sentence_piece, clip)


def with_tokenizer(model: Model, tokenizer: Any, *, eos: int = 0) -> Model:
    """The tiny model with another tokenizer, and a text encoder for it."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LIMIT, eos_token_id=eos,
    )  # fmt: skip
    pipeline = type(model.pipeline)(
        **{**model.pipeline.components, "tokenizer": tokenizer, "text_encoder": CLIPTextModel(config).eval()},
        requires_safety_checker=False,
    )
    return replace(model, pipeline=pipeline)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def stranger(request: pytest.FixtureRequest, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return with_tokenizer(model, request.param(tmp_path_factory.mktemp("words")))


@torch.no_grad()
def rows(model: Model, text: str) -> torch.Tensor:
    """The embeddings of a text's tokens as the tokenizer frames them, without the padding."""
    tokenizer = model.pipeline.tokenizer
    ids = tokenizer(text).input_ids
    return model.pipeline.text_encoder.get_input_embeddings().weight[ids]


def test_the_words_of_a_prompt_are_exactly_those_of_its_text(stranger: Model) -> None:
    """Also the first and the last: a token before the first word is kept, and no word is taken for it."""
    words = model_words(stranger)
    assert set(TEXT) <= set(words.words)
    index = torch.tensor([[words.words.index(word) for word in order] for order in (TEXT, TEXT[::-1])])
    fed, read = encode(stranger, words, words.table[index]), stranger.encode(words.texts(index))
    assert all(torch.equal(fed.tensors[name], read.tensors[name]) for name in read.tensors)
    other = stranger.encode([f"a {text.strip()}" for text in words.texts(index)])
    assert not torch.allclose(fed.tensors["encoder_hidden_states"], other.tensors["encoder_hidden_states"], atol=1e-3)


def test_the_prompt_that_ph2p_finds_has_the_rows_of_encoding_it(stranger: Model) -> None:
    words = model_words(stranger)
    images, ids = next(open_data("shapes").images(1)), ("one",)
    whole = InversionProblem(stranger, words, images, ids, 0)
    ((found,),) = ph2p(whole, PH2PSettings(tokens=5, rounds=1, evaluations=2, candidates=1), lambda: None)
    table = words.table[[words.words.index(word) for word in found.split()]]
    framed_rows = rows(stranger, found)
    start = next(i for i in range(len(framed_rows)) if torch.equal(framed_rows[i : i + 5], table))
    assert len(framed_rows) - 5 == stranger.pipeline.tokenizer.num_special_tokens_to_add()
    assert start == (0 if len(framed_rows) - 5 < 2 else 1)


def test_the_limit_leaves_room_for_what_the_tokenizer_adds(stranger: Model) -> None:
    words = model_words(stranger)
    added = len(stranger.pipeline.tokenizer("").input_ids)
    assert words.limit == LIMIT - added
    index = torch.arange(words.limit)[None] % len(words.words)
    fed, read = encode(stranger, words, words.table[index]), stranger.encode(words.texts(index))
    assert torch.equal(fed.tensors["encoder_hidden_states"], read.tensors["encoder_hidden_states"])
    with pytest.raises(WrongCommand, match=f"takes {words.limit} words in a prompt"):
        words.require(words.limit + 1)


def of(tokenizer: Any, vocabulary: Any) -> Words:
    return gather_words([(tokenizer, torch.nn.Embedding(len(tokenizer), 2))], vocabulary, "'it'", torch.device("cpu"))


def test_parts_of_words_are_words_only_where_they_are_asked_for(tmp_path: Path) -> None:
    tokenizer = word_piece(tmp_path)
    assert set(of(tokenizer, "words").words) == {*TEXT, "back"}
    parts = of(tokenizer, "tokens")
    assert set(parts.words) == {*TEXT, "back", "ing", "s", "ground"}
    assert {parts.words[number] for number in parts.whole} == {*TEXT, "back"}
    assert set(of(tokenizer, "all").words) - set(parts.words) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]"}
    raw = set(of(byte_level(tmp_path), "tokens").words) | set(of(sentence_piece(tmp_path), "tokens").words)
    assert not any(mark in word for word in raw for mark in ("Ġ", "▁", "\N{REPLACEMENT CHARACTER}"))


def test_a_listed_word_that_is_no_token_is_left_out_and_a_list_of_none_is_refused(tmp_path: Path) -> None:
    tokenizer = word_level(tmp_path)
    assert of(tokenizer, ("red", "purple")).words == ("red",)
    with pytest.raises(WrongCommand) as error:
        of(tokenizer, ("purple",))
    assert str(error.value) == (
        "the text encoder of 'it' has no usable vocabulary: none of its 14 tokens is a word of the given list; "
        "name another model"
    )


def test_two_encoders_share_the_words_and_the_space_before_a_prompt(tmp_path: Path) -> None:
    """Byte-level BPE needs a space before the first word; CLIP's tokenizer ignores it."""
    tokenizers = clip(tmp_path), byte_level(tmp_path)
    parts = [(tokenizer, torch.nn.Embedding(len(tokenizer), 2)) for tokenizer in tokenizers]
    words = gather_words(parts, "words", "'it'", torch.device("cpu"))
    assert words.lead == " " and set(TEXT) <= set(words.words)
    (prompt,) = words.texts(torch.tensor([[words.words.index(word) for word in ("red", "circle")]]))
    assert prompt == " red circle"
    for tokenizer, (_, layer), start in zip(tokenizers, parts, (0, 2), strict=True):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        both = [words.words.index(word) for word in ("red", "circle")]
        assert torch.equal(words.table[both, start : start + 2], layer.weight[ids])


def test_an_encoder_that_looks_at_the_tokens_again_is_refused(tmp_path: Path) -> None:
    """CLIP's old configuration (end token 2) takes the largest token for the end of a text. Here it is a word."""
    model = load_model(
        str(save_pipeline(tmp_path, None, seed=1, layout="StableDiffusionXLPipeline", prediction="epsilon"))
    )
    model_words(model)
    encoder: Any = model.pipeline.text_encoder_2
    for part in (encoder, encoder.text_model):
        if hasattr(part, "eos_token_id"):
            part.eos_token_id = 2
    model_words(model)  # CLIP's end token is the largest of its tokens
    for name in ("tokenizer", "tokenizer_2"):
        setattr(model.pipeline, name, word_piece(tmp_path))
    with pytest.raises(WrongCommand, match="reads the vectors of words in another way than the words"):
        model_words(model)


def test_clips_own_words_are_those_that_its_marks_name(tmp_path: Path) -> None:
    """On the vocabulary of CLIP itself, which ends each word in ``</w>``."""
    folder = Path(open_clip.__file__).parent
    lines = gzip.decompress((folder / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = [line.split() for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=77)
    ended = [token.removesuffix("</w>") for token in tokens if token.endswith("</w>")]
    plain = [word for word in ended if word.isascii() and word.isalpha() and (len(word) > 1 or word in ("a", "i"))]
    read = tokenizer(plain, add_special_tokens=False).input_ids
    words = of(tokenizer, "words")
    assert words.words == tuple(word for word, ids in zip(plain, read, strict=True) if len(ids) == 1)
    assert (len(words.words), words.lead, words.stand_in, words.limit) == (32_851, "", "a", 75)
