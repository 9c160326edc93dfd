"""Time contenders side by side: one warm-up each, then rounds in which every contender runs once.

The order is reversed in each round, so that drift of the machine affects all contenders alike. Compare two contenders
by the ratio of their times in the same round (`ratios`), not by the ratio of two medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pandas as pd

Clock = Literal["cpu", "wall"]

CLOCKS: dict[Clock, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
"""CPU seconds of all threads of this process, which other work on the machine disturbs less; seconds of the clock."""


def compare(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, clock: Clock | None = None
) -> dict[str, list[float]]:
    """Run the contenders in alternation and return the seconds of each, round by round.

    Args:
        contenders: What to time, by name. Each function does the whole work of one round.
        rounds: Rounds that are counted, at least 1. Each contender runs once before them, uncounted.
        clock: "cpu" or "wall". None means "wall" where torch computes on a GPU, and "cpu" elsewhere. Work on a GPU and
            in other processes needs "wall".

    Returns:
        The seconds by name, in the order of the contenders. Place r of each list belongs to round r.

    Raises:
        ValueError: There are no contenders, or no rounds.
    """
    if not contenders or rounds < 1:
        raise ValueError(f"compare needs a contender and a round, not {len(contenders)} and {rounds}")
    now = CLOCKS[clock or ("wall" if _cuda() else "cpu")]
    names = list(contenders)
    for name in names:
        _seconds(contenders[name], now)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(_seconds(contenders[name], now))
    return times


def _seconds(work: Callable[[], object], now: Callable[[], float]) -> float:
    synchronise()
    started = now()
    work()
    synchronise()
    return now() - started


def _cuda() -> bool:
    """Whether torch is loaded and has a GPU. A benchmark without torch does not import it for this."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


def synchronise() -> None:
    """Wait until a GPU has done all its work."""
    if _cuda():
        sys.modules["torch"].cuda.synchronize()


def ratios(ours: list[float], peer: list[float]) -> list[float]:
    """Return ours over the peer's, round by round: below 1, ours is faster."""
    return [a / b for a, b in zip(ours, peer, strict=True)]


def ratio(ours: list[float], peer: list[float]) -> float:
    """Return the median of `ratios`."""
    return statistics.median(ratios(ours, peer))


def spread(times: list[float]) -> float:
    """Return (largest − smallest) / median of the times of one contender."""
    return (max(times) - min(times)) / statistics.median(times)


def figures(times: Mapping[str, list[float]], peer: str | None = None) -> pd.DataFrame:
    """Return a row for each contender: its median, least and largest seconds, and its ratio to a peer's.

    Args:
        times: What `compare` returned.
        peer: The contender that the others are compared with. Without it, there are no ratios.

    Returns:
        Columns ``contender``, ``median_s``, ``least_s``, ``most_s`` and, with a peer, ``ratio``, ``ratio_least`` and
        ``ratio_most``: the median and the limits of the ratios of the same round.
    """
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        row: dict[str, Any] = {"contender": name, "median_s": median, "least_s": min(seconds), "most_s": max(seconds)}
        if peer is not None:
            found = ratios(seconds, times[peer])
            row |= {"ratio": statistics.median(found), "ratio_least": min(found), "ratio_most": max(found)}
        rows.append(row)
    return pd.DataFrame(rows)
