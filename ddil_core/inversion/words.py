"""Prompts as vectors: the words that may be chosen, their embeddings in a model's text encoders, and how vectors are fed to those.

Vectors take the place of an embedding layer's output while the encoder reads a prompt of as many words, so that everything
behind that layer is the encoder's own code, and the vectors of real words give exactly what the words give.
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
"""What CLIP's tokenizers end a word's last piece with."""


@dataclass(frozen=True, eq=False)
class Words:
    """What may be chosen: ``words`` [V] with their embeddings ``table`` float32 [V, D]; those of several encoders lie side by side.

    ``layers`` are the encoders' embedding layers, ``limit`` the words that a prompt may have.
    """

    words: tuple[str, ...]
    table: Tensor
    layers: tuple[nn.Module, ...]
    limit: int
    owner: str

    def nearest(self, vectors: Tensor, *, cosine: bool = False) -> Tensor:
        """int64 [B, K]: for vectors [B, K, D] the words at the smallest L2 distance, or at the largest cosine."""
        if cosine:
            return (F.normalize(vectors, dim=-1) @ F.normalize(self.table, dim=-1).T).argmax(-1)
        return (self.table.square().sum(1) - 2 * vectors @ self.table.T).argmin(-1)

    @property
    def spacing(self) -> float:
        """The median distance of a word to its nearest neighbour, of about 512 words."""
        rows = torch.arange(0, len(self.words), max(1, len(self.words) // 512), device=self.table.device)
        distances = torch.cdist(self.table[rows], self.table).scatter(1, rows[:, None], float("inf"))
        return float(distances.min(1).values.median())

    def texts(self, index: Tensor) -> list[str]:
        """The prompts of words int64 [B, K]."""
        return [" ".join(self.words[i] for i in row) for row in index.tolist()]

    def draw(self, count: int, generators: Sequence[torch.Generator]) -> Tensor:
        """``count`` words for each generator, all words as likely: int64 [B, count]."""
        rows = [torch.randint(len(self.words), (count,), generator=generator) for generator in generators]
        return torch.stack(rows).to(self.table.device)

    def require(self, count: int) -> None:
        """Refuse prompts longer than the encoder takes."""
        if count > self.limit:
            raise WrongCommand(
                f"the text encoder of {self.owner} takes {self.limit} words in a prompt, fewer than the {count} tokens asked "
                "for; ask for fewer"
            )

    @contextmanager
    def fed(self, vectors: Tensor) -> Iterator[list[str]]:
        """While this lasts the encoders read vectors [B, K, D] in place of the words of the prompts that it yields, B of them."""
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
    """A hook that puts vectors [B, K, D] between an embedding layer's first row, the start, and those after the words."""

    def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1], part.to(output.dtype), output[:, 1 + part.shape[1] :]], dim=1)

    return hook


def encode(model: Model, words: Words, vectors: Tensor) -> Condition:
    """What the model's network is told of prompts that are vectors [B, K, D], with their gradient.

    The text encoders have to be on the model's device, and to stay there until the gradient is found.
    """
    with words.fed(vectors) as prompts:
        return Condition(model.layout.encode(model.pipeline, prompts))


def require_text_encoder(reference: str, parts: Iterable[str]) -> None:
    """Refuse a model none of whose ``parts`` reads text.

    Raises:
        WrongCommand: there is none.
    """
    if not any(name.startswith("text_encoder") for name in parts):
        raise WrongCommand(
            f"the model {reference!r} has no text encoder, so that it draws nothing from a prompt; name another model"
        )


def model_words(model: Model, vocabulary: Vocabulary | Sequence[str] = "words") -> Words:
    """The words of a model's text encoders: its whole words, all its tokens, or those of a list that are one token each.

    Raises:
        WrongCommand: the model has no text encoder of CLIP's kind, or none of its tokens may be chosen.
    """
    held = {name for name, part in model.pipeline.components.items() if part is not None}
    require_text_encoder(model.reference, held)
    if "text_encoder_3" in held:
        raise WrongCommand(
            f"the model {model.reference!r} has the layout {model.layout.pipeline}, and prompts are inverted on Stable "
            "Diffusion's and SDXL's; name another --teacher"
        )
    ends = [end for end in ("", "_2") if f"text_encoder{end}" in held]
    parts = [
        (
            getattr(model.pipeline, f"tokenizer{end}"),
            getattr(model.pipeline, f"text_encoder{end}").get_input_embeddings(),
        )
        for end in ends
    ]
    return gather(parts, vocabulary, repr(model.reference), model.device)


def gather(
    parts: Sequence[tuple[Any, nn.Module]], vocabulary: Vocabulary | Sequence[str], owner: str, device: torch.device
) -> Words:
    """Words that are one token for every tokenizer, with their embeddings in the layer beside it.

    Raises:
        WrongCommand: there is none.
    """
    known = [_tokens(tokenizer, vocabulary) for tokenizer, _ in parts]
    words = tuple(word for word in known[0] if all(word in other for other in known[1:]))
    if not words:
        raise WrongCommand(
            f"the text encoder of {owner} has no usable vocabulary: none of its {len(parts[0][0]):,} tokens is a whole word; "
            "name another model, or set vocabulary to 'tokens'"
        )
    rows = []
    for ids, (_, layer) in zip(known, parts, strict=True):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        rows.append(weight.detach()[torch.tensor([ids[word] for word in words], device=weight.device)].float())
    table = torch.cat(rows, dim=1).to(device)
    limit = min(tokenizer.model_max_length for tokenizer, _ in parts) - 2  # start and end
    return Words(words, table, tuple(layer for _, layer in parts), limit, owner)


def _tokens(tokenizer: Any, vocabulary: Vocabulary | Sequence[str]) -> dict[str, int]:
    """What may be chosen, by its text, with its id."""
    entries: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    if vocabulary in ("tokens", "all"):
        allowed = [item for item in entries.items() if vocabulary == "all" or item[1] not in special]
        # Where a piece and a word are written alike, the word is what a tokenizer reads.
        allowed.sort(key=lambda item: (item[0].endswith(END_OF_WORD), item[1]))
        return {token.removesuffix(END_OF_WORD): index for token, index in allowed}
    listed = None if vocabulary == "words" else set(vocabulary)
    found = {}
    for token, index in sorted(entries.items(), key=lambda item: item[1]):
        word = token.removesuffix(END_OF_WORD)
        if (
            token.endswith(END_OF_WORD)
            and index not in special
            and (_is_word(word) if listed is None else word in listed)
        ):
            found[word] = index
    if not found:
        return {}
    # A piece that only ends words ("ing") is no word: as a prompt it falls apart into other tokens, and so it would be read.
    read = tokenizer(list(found), add_special_tokens=False).input_ids
    return {word: index for (word, index), ids in zip(found.items(), read, strict=True) if ids == [index]}


def _is_word(text: str) -> bool:
    return text.isascii() and text.isalpha() and (len(text) > 1 or text in ("a", "i"))
