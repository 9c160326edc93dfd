"""How much of a shapes caption an inverted prompt recovers. Words count, because such a prompt is not a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ddil_core.shapes.scene import Meaning, parse_caption

ATTRIBUTES = ("shapes", "colours", "sizes", "relation", "background")
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def caption_recall(caption: str, prompt: str) -> dict[str, float]:
    """Return the share of a caption's words that a prompt holds, in [0, 1], for each of ``ATTRIBUTES`` and for "all".

    A word that stands twice in the caption counts twice only if the prompt holds it twice. A prompt that is a caption
    may state the relation the other way round ("b below a" for "a above b"). A caption without a relation has no share
    for it.

    Raises:
        ValueError: the caption does not belong to the shapes world.
    """
    meaning = parse_caption(caption)
    expected = attribute_words(meaning)
    words = Counter(prompt.lower().split())
    if meaning.relation and is_reversed(meaning, prompt):
        words += expected["relation"]
    shares = {name: _share([counts], words) for name, counts in expected.items() if counts}
    return shares | {"all": _share(expected.values(), words)}


def attribute_words(meaning: Meaning) -> dict[str, Counter[str]]:
    """Count the words of a caption that carry its meaning. A relation has one such word: "of" carries none."""
    things = meaning.things
    return {
        "shapes": Counter(thing.shape for thing in things),
        "colours": Counter(thing.colour for thing in things),
        "sizes": Counter(thing.size for thing in things),
        "relation": Counter([meaning.relation.split()[0]] if meaning.relation else []),
        "background": Counter([meaning.background]),
    }


def is_reversed(meaning: Meaning, prompt: str) -> bool:
    """Whether the prompt is a caption with the two objects in the other order and the converse relation."""
    try:
        other = parse_caption(prompt)
    except ValueError:
        return False
    return other.things == meaning.things[::-1] and other.relation == CONVERSE.get(str(meaning.relation))


def _share(expected: Iterable[Counter[str]], words: Counter[str]) -> float:
    counts = list(expected)
    return sum((count & words).total() for count in counts) / sum(count.total() for count in counts)
