"""The texts that a tokenizer reads as one token, found by the tokenizer itself.

No mark of a tokenizer's family is read (``</w>``, ``▁``, ``Ġ``, ``##``). A text is a whole word where the tokenizer
turns two of it, with a space between them, into twice the same token. Places in a prompt are found in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddil_core.support.errors import WrongCommand

LEADS = ("", " ")
"""What may stand before a prompt. Byte-level BPE reads the first word as it reads the others only after a space."""
UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""It stands in a decoded text for bytes that are no character."""


def whole_words(tokenizer: Any, lead: str, wanted: Callable[[str], bool]) -> dict[str, int]:
    """Return the texts that the tokenizer reads as one token at every place of a prompt, with their token ids.

    Args:
        tokenizer: A tokenizer of transformers.
        lead: What stands before a prompt, one of ``LEADS``.
        wanted: Whether a text may be a word.

    Returns:
        Token ids by text, in the order of the ids.
    """
    special = special_tokens(tokenizer)
    texts = list(
        dict.fromkeys(text for text in _texts(tokenizer, _plain_ids(tokenizer, special)).values() if wanted(text))
    )
    if not texts:
        return {}
    read = tokenizer([f"{lead}{text} {text}" for text in texts], add_special_tokens=False).input_ids
    words = {text: ids[0] for text, ids in zip(texts, read, strict=True) if len(ids) == 2 and ids[0] == ids[1]}
    return dict(sorted(((text, i) for text, i in words.items() if i not in special), key=lambda item: item[1]))


def all_tokens(tokenizer: Any, whole: dict[str, int], with_special: bool) -> dict[str, int]:
    """Return the texts of all tokens, parts of words too, with their token ids, in the order of the ids.

    Args:
        tokenizer: A tokenizer of transformers.
        whole: Its whole words. Where a word and a part of a word have the same text, the tokenizer reads the word.
        with_special: Whether special tokens count.
    """
    special = special_tokens(tokenizer)
    before = next(iter(whole.values()))  # after a word, a part of a word is written without a mark
    texts = _texts(tokenizer, _plain_ids(tokenizer, special), before)
    if with_special:
        texts |= {index: tokenizer.convert_ids_to_tokens(index) for index in special}
    entries: dict[str, int] = {}
    for index in sorted(texts):
        if is_writable(texts[index]):
            entries.setdefault(texts[index], index)
    return entries | whole


def is_writable(text: str) -> bool:
    """Whether a prompt can hold the text of a token. Some tokens are single bytes or control characters."""
    return bool(text) and text.isprintable() and UNREADABLE not in text


def special_tokens(tokenizer: Any) -> set[int]:
    """Return the ids of the special tokens: those that the tokenizer names, and those that it adds to an empty text."""
    return {*tokenizer.all_special_ids, *tokenizer("").input_ids}


def words_limit(tokenizer: Any) -> int:
    """Return how many tokens of a prompt the text encoder takes beside the special ones."""
    return int(tokenizer.model_max_length) - int(tokenizer.num_special_tokens_to_add(pair=False))


def first_place(tokenizer: Any, prompt: str, token: int, count: int, owner: str) -> int:
    """Return the place of the first of ``count`` equal tokens in the padded sequence of a prompt.

    A start token or padding at the left comes before it.

    Raises:
        WrongCommand: the tokens are not all there, side by side.
    """
    ids = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
    places = [place for place, index in enumerate(ids) if index == token]
    if len(places) != count or places[-1] - places[0] != count - 1:
        raise WrongCommand(
            f"the tokenizer of {owner} does not keep the words of a prompt side by side, so that its prompts cannot be "
            "inverted; name another model"
        )
    return places[0]


def _plain_ids(tokenizer: Any, special: set[int]) -> list[int]:
    return sorted(index for index in tokenizer.get_vocab().values() if index not in special)


def _texts(tokenizer: Any, ids: list[int], before: int | None = None) -> dict[int, str]:
    """Return the text of each token, without spaces around it. ``before`` is a word that stands before the token."""
    start = [] if before is None else [before]
    written = tokenizer.batch_decode([[*start, index] for index in ids], clean_up_tokenization_spaces=False)
    word = "" if before is None else tokenizer.decode(start, clean_up_tokenization_spaces=False)
    return {index: text.removeprefix(word.rstrip()).strip() for index, text in zip(ids, written, strict=True)}
