"""How much of a shapes caption an inverted prompt says: words counted, since such a prompt is no sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ddil_core.shapes.scene import Meaning, parse_caption

ATTRIBUTES = ("shapes", "colours", "sizes", "relation", "background")


def stated(meaning: Meaning) -> dict[str, Counter[str]]:
    """The words that a caption's meaning hangs on; of a relation the first, as "of" says nothing."""
    things = meaning.things
    return {
        "shapes": Counter(thing.shape for thing in things),
        "colours": Counter(thing.colour for thing in things),
        "sizes": Counter(thing.size for thing in things),
        "relation": Counter([meaning.relation.split()[0]] if meaning.relation else []),
        "background": Counter([meaning.background]),
    }


def caption_recall(caption: str, prompt: str) -> dict[str, float]:
    """The share of each of ``ATTRIBUTES`` that is among the prompt's words, in [0, 1], and of all of them ("all").

    A word that a caption states twice is found twice only where the prompt has it twice. A prompt that is a caption and says the
    same the other way round (a above b, b below a) has found the relation. A caption without a relation has none to be found: its
    share is left out.

    Raises:
        ValueError: the caption is not of the shapes world.
    """
    meaning = parse_caption(caption)
    wanted = stated(meaning)
    words = Counter(prompt.lower().split())
    if meaning.relation and says_reversed(meaning, prompt):
        words += wanted["relation"]
    shares = {name: _share([counts], words) for name, counts in wanted.items() if counts}
    return shares | {"all": _share(wanted.values(), words)}


CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def says_reversed(meaning: Meaning, prompt: str) -> bool:
    """Whether a prompt is a caption whose two objects stand in the other order, and in the converse relation."""
    try:
        other = parse_caption(prompt)
    except ValueError:
        return False
    return other.things == meaning.things[::-1] and other.relation == CONVERSE.get(str(meaning.relation))


def _share(wanted: Iterable[Counter[str]], words: Counter[str]) -> float:
    counts = list(wanted)
    return sum((one & words).total() for one in counts) / sum(one.total() for one in counts)
