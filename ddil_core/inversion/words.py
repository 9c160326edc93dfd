"""Prompts as vectors: the words that a prompt may hold, their embeddings, and how a text encoder reads vectors.

While the encoder reads a prompt of K words, a hook puts K vectors in place of the output of its embedding layer.
Everything after that layer is the encoder's own code. The vectors of real words therefore give exactly what the words
give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import Condition
from ddil_core.inversion.vocabulary import LEADS, all_tokens, first_place, is_writable, whole_words, words_limit
from ddil_core.models.memory import on_device
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand

Vocabulary = Literal["words", "tokens", "all"]


@dataclass(frozen=True, eq=False)
class TextReader:
    """How a text encoder reads the words of a prompt.

    Attributes:
        tokenizer: The tokenizer, a class of transformers.
        layer: The text encoder's embedding layer.
        stand_in: The token of the word that stands in a prompt for vectors.
    """

    tokenizer: Any
    layer: nn.Module
    stand_in: int

    @property
    def width(self) -> int:
        """The width of an embedding."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight.shape[1]


@dataclass(frozen=True, eq=False)
class Words:
    """The words that a prompt may hold, with their embeddings.

    Attributes:
        words: The V words.
        table: Their embeddings float32 [V, D]. With two text encoders, both embeddings stand side by side.
        readers: The text encoders.
        limit: The largest number of words in a prompt.
        owner: The model's name, for messages.
        stand_in: The word that stands in a prompt for vectors.
        whole: The numbers of the words that each tokenizer reads as themselves. Others are parts of words.
        lead: What stands before a prompt, so that its first word is read as the others are.
    """

    words: tuple[str, ...]
    table: Tensor
    readers: tuple[TextReader, ...]
    limit: int
    owner: str
    stand_in: str
    whole: tuple[int, ...]
    lead: str = ""

    def nearest(self, vectors: Tensor, *, cosine: bool = False) -> Tensor:
        """Return for vectors [B, K, D] the words at the smallest L2 distance or the largest cosine, int64 [B, K]."""
        if cosine:
            return (F.normalize(vectors, dim=-1) @ F.normalize(self.table, dim=-1).T).argmax(-1)
        return (self.table.square().sum(1) - 2 * vectors @ self.table.T).argmin(-1)

    @property
    def spacing(self) -> float:
        """The median distance from a word to its nearest neighbour, over about 512 words."""
        rows = torch.arange(0, len(self.words), max(1, len(self.words) // 512), device=self.table.device)
        distances = torch.cdist(self.table[rows], self.table).scatter(1, rows[:, None], float("inf"))
        return float(distances.min(1).values.median())

    def texts(self, index: Tensor) -> list[str]:
        """Return the prompts of words int64 [B, K]."""
        return [self.prompt(self.words[i] for i in row) for row in index.tolist()]

    def prompt(self, words: Iterable[str]) -> str:
        """Return the prompt of some words."""
        return self.lead + " ".join(words)

    def draw(self, count: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw ``count`` words with each generator, with equal probability, int64 [B, count]."""
        rows = [torch.randint(len(self.words), (count,), generator=generator) for generator in generators]
        return torch.stack(rows).to(self.table.device)

    def require(self, count: int) -> None:
        """Refuse prompts of ``count`` words where the text encoder takes fewer.

        Raises:
            WrongCommand: the prompts are too long.
        """
        if count > self.limit:
            raise WrongCommand(
                f"the text encoder of {self.owner} takes {self.limit} words in a prompt, and the setting 'tokens' is "
                f"{count}; set fewer tokens"
            )

    @contextmanager
    def reading(self, vectors: Tensor) -> Iterator[list[str]]:
        """Yield B prompts. In this context the text encoders read vectors [B, K, D] in place of the prompts' words."""
        count = vectors.shape[1]
        prompt = self.prompt([self.stand_in] * count)
        with ExitStack() as stack:
            parts = vectors.split([reader.width for reader in self.readers], dim=-1)
            for reader, part in zip(self.readers, parts, strict=True):
                first = first_place(reader.tokenizer, prompt, reader.stand_in, count, self.owner)
                stack.callback(reader.layer.register_forward_hook(_in_place_of_words(part, first)).remove)
            yield [prompt] * len(vectors)


def _in_place_of_words(part: Tensor, first: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a hook that puts vectors [B, K, D] into an embedding layer's output, from the place ``first`` on."""

    def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :first], part.to(output.dtype), output[:, first + part.shape[1] :]], dim=1)

    return hook


def encode(model: Model, words: Words, vectors: Tensor) -> Condition:
    """Encode prompts that are vectors [B, K, D], with gradients.

    The text encoders must stay on the model's device until the gradient is computed.
    """
    with words.reading(vectors) as prompts:
        return model.with_size(model.layout.encode(model.pipeline, prompts))


def require_text_encoder(reference: str, parts: Iterable[str]) -> None:
    """Refuse a model that has no text encoder among its ``parts``.

    Raises:
        WrongCommand: the model has no text encoder.
    """
    if not any(name.startswith("text_encoder") for name in parts):
        raise WrongCommand(
            f"the model {reference!r} has no text encoder and cannot generate images from prompts; name another model"
        )


def model_words(model: Model, vocabulary: Vocabulary | Sequence[str] = "words") -> Words:
    """Return the words of a model's text encoders: whole words, all tokens, or the one-token words of a list.

    Raises:
        WrongCommand: the model has no CLIP text encoder, or its vocabulary has no usable word.
    """
    held = {name for name, part in model.pipeline.components.items() if part is not None}
    require_text_encoder(model.reference, held)
    if not held.isdisjoint(model.layout.max_tokens(model.pipeline)):  # a text encoder that is no CLIP
        raise WrongCommand(
            f"the model {model.reference!r} has the layout {model.layout.pipeline}, and prompt inversion supports only "
            "the layouts of Stable Diffusion and SDXL; name another --teacher"
        )
    ends = [end for end in ("", "_2") if f"text_encoder{end}" in held]
    parts = [
        (
            getattr(model.pipeline, f"tokenizer{end}"),
            getattr(model.pipeline, f"text_encoder{end}").get_input_embeddings(),
        )
        for end in ends
    ]
    words = gather_words(parts, vocabulary, repr(model.reference), model.device)
    with on_device(model.text_encoders(), model.device):
        require_exact(words, lambda prompts: tuple(model.layout.encode(model.pipeline, prompts).values()))
    return words


def gather_words(
    parts: Sequence[tuple[Any, nn.Module]], vocabulary: Vocabulary | Sequence[str], owner: str, device: torch.device
) -> Words:
    """Return the words that are one token in every tokenizer, with their embeddings.

    Args:
        parts: A tokenizer and an embedding layer for each text encoder.
        vocabulary: Which tokens count as words.
        owner: The model's name, for messages.
        device: Where the table of embeddings lies.

    Raises:
        WrongCommand: there is no such word.
    """
    tokenizers = [tokenizer for tokenizer, _ in parts]
    lead, whole = _shared_words(tokenizers, _wanted(vocabulary))
    if not whole[0]:
        raise _no_words(tokenizers[0], vocabulary, owner)
    known = whole
    if vocabulary in ("tokens", "all"):
        both = zip(tokenizers, whole, strict=True)
        known = _shared([all_tokens(tokenizer, own, vocabulary == "all") for tokenizer, own in both])
    stand_in, rows = next(iter(whole[0])), []
    for ids, (_, layer) in zip(known, parts, strict=True):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        rows.append(weight.detach()[torch.tensor(list(ids.values()), device=weight.device)].float())
    readers = tuple(TextReader(*part, ids[stand_in]) for part, ids in zip(parts, whole, strict=True))
    limit = min(words_limit(tokenizer) for tokenizer in tokenizers)
    numbers = {word: number for number, word in enumerate(known[0])}
    own = tuple(numbers[word] for word in whole[0])
    return Words(tuple(known[0]), torch.cat(rows, dim=1).to(device), readers, limit, owner, stand_in, own, lead)


def _shared_words(tokenizers: Sequence[Any], wanted: Callable[[str], bool]) -> tuple[str, list[dict[str, int]]]:
    """Return the first lead under which all tokenizers share words, and these words by tokenizer."""
    for lead in LEADS:
        words = _shared([whole_words(tokenizer, lead, wanted) for tokenizer in tokenizers])
        if words[0]:
            break
    return lead, words


def _shared(known: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """Return the texts that all tokenizers have, each with its token ids, in the order of the first tokenizer."""
    texts = [text for text in known[0] if all(text in other for other in known[1:])]
    return [{text: ids[text] for text in texts} for ids in known]


def _wanted(vocabulary: Vocabulary | Sequence[str]) -> Callable[[str], bool]:
    """Return the function that says whether a text may be a word."""
    if vocabulary == "words":
        return _is_word
    if isinstance(vocabulary, str):
        return is_writable
    return set(vocabulary).__contains__


def _no_words(tokenizer: Any, vocabulary: Vocabulary | Sequence[str], owner: str) -> WrongCommand:
    """Return the error of a tokenizer that has no word."""
    what = "is a whole word" if isinstance(vocabulary, str) else "is a word of the given list"
    cure = ", or say --set vocabulary=tokens" if vocabulary == "words" else ""
    return WrongCommand(
        f"the text encoder of {owner} has no usable vocabulary: none of its {len(tokenizer):,} tokens {what}; "
        f"name another model{cure}"
    )


def require_exact(words: Words, read: Callable[[list[str]], Sequence[Tensor]]) -> None:
    """Refuse a text encoder that reads the vectors of words in another way than the words.

    Some encoders look at the tokens again after the embedding layer, as where they search for the end of a text.

    Args:
        words: The words.
        read: Returns what the text encoders give for prompts, tensors [B, …].

    Raises:
        WrongCommand: they do.
    """
    places = torch.linspace(0, len(words.whole) - 1, min(words.limit, len(words.whole))).long().tolist()
    index = torch.tensor([[words.whole[place] for place in places]], device=words.table.device)
    with torch.no_grad():
        with words.reading(words.table[index]) as prompts:
            vectors = read(prompts)
        texts = read(words.texts(index))
    if any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(vectors, texts, strict=True)):
        raise WrongCommand(
            f"the text encoder of {words.owner} reads the vectors of words in another way than the words, so that its "
            "prompts cannot be inverted; name another model"
        )


def _is_word(text: str) -> bool:
    return text.isascii() and text.isalpha() and (len(text) > 1 or text in ("a", "i"))
