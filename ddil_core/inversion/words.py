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
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand

Vocabulary = Literal["words", "tokens", "all"]
END_OF_WORD = "</w>"
"""The end of a word's last token, in CLIP's tokenizers."""


@dataclass(frozen=True, eq=False)
class Words:
    """The words that a prompt may hold, with their embeddings.

    Attributes:
        words: The V words.
        table: Their embeddings float32 [V, D]. With two text encoders, both embeddings stand side by side.
        layers: The text encoders' embedding layers.
        limit: The largest number of words in a prompt.
        owner: The model's name, for messages.
    """

    words: tuple[str, ...]
    table: Tensor
    layers: tuple[nn.Module, ...]
    limit: int
    owner: str

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
        return [" ".join(self.words[i] for i in row) for row in index.tolist()]

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
        with ExitStack() as stack:
            start = 0
            for layer in self.layers:
                width: int = layer.weight.shape[1]  # type: ignore[assignment, index]
                part = vectors[..., start : start + width]
                hook = layer.register_forward_hook(_in_place_of_words(part))
                stack.callback(hook.remove)
                start += width
            yield [" ".join([self.words[0]] * count)] * len(vectors)


def _in_place_of_words(part: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a hook that puts vectors [B, K, D] after the start token in an embedding layer's output."""

    def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1], part.to(output.dtype), output[:, 1 + part.shape[1] :]], dim=1)

    return hook


def encode(model: Model, words: Words, vectors: Tensor) -> Condition:
    """Encode prompts that are vectors [B, K, D], with gradients.

    The text encoders must stay on the model's device until the gradient is computed.
    """
    with words.reading(vectors) as prompts:
        return Condition(model.layout.encode(model.pipeline, prompts))


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
    if "text_encoder_3" in held:
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
    return gather_words(parts, vocabulary, repr(model.reference), model.device)


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
    known = [_tokens(tokenizer, vocabulary) for tokenizer, _ in parts]
    words = tuple(word for word in known[0] if all(word in other for other in known[1:]))
    if not words:
        raise WrongCommand(
            f"the text encoder of {owner} has no usable vocabulary: none of its {len(parts[0][0]):,} tokens is a whole "
            "word; name another model, or set vocabulary to 'tokens'"
        )
    rows = []
    for ids, (_, layer) in zip(known, parts, strict=True):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        rows.append(weight.detach()[torch.tensor([ids[word] for word in words], device=weight.device)].float())
    table = torch.cat(rows, dim=1).to(device)
    limit = min(tokenizer.model_max_length for tokenizer, _ in parts) - 2  # start and end
    return Words(words, table, tuple(layer for _, layer in parts), limit, owner)


def _tokens(tokenizer: Any, vocabulary: Vocabulary | Sequence[str]) -> dict[str, int]:
    """Return the texts that may be chosen, with their token ids."""
    entries: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    if vocabulary in ("tokens", "all"):
        allowed = [item for item in entries.items() if vocabulary == "all" or item[1] not in special]
        # Where a word and a part of a word have the same text, the tokenizer reads the word.
        allowed.sort(key=lambda item: (item[0].endswith(END_OF_WORD), item[1]))
        return {token.removesuffix(END_OF_WORD): index for token, index in allowed}
    listed = None if vocabulary == "words" else set(vocabulary)
    chosen = {}
    for token, index in sorted(entries.items(), key=lambda item: item[1]):
        word = token.removesuffix(END_OF_WORD)
        if (
            token.endswith(END_OF_WORD)
            and index not in special
            and (_is_word(word) if listed is None else word in listed)
        ):
            chosen[word] = index
    if not chosen:
        return {}
    # A token that only ends words ("ing") is not a word: the tokenizer would read it as several other tokens.
    read = tokenizer(list(chosen), add_special_tokens=False).input_ids
    return {word: index for (word, index), ids in zip(chosen.items(), read, strict=True) if ids == [index]}


def _is_word(text: str) -> bool:
    return text.isascii() and text.isalpha() and (len(text) > 1 or text in ("a", "i"))
