"""What a benchmark claims, what it found, and whether the claim is met.

A benchmark module that offers ``summary(frame: pandas.DataFrame) -> list[Claim]`` has its claims in the table that
``python -m benchmarks`` writes. ``frame`` is the CSV file that the module's ``main`` wrote, as `benchmarks.printing.read`
returns it. A claim of time compares ours with a peer's::

    Claim("KID at N = 1,000, seconds", ours=0.12, peer=0.15, bar=1.0)                       # met: 0.8 ≤ 1
    Claim("images a second, SD 1.5", ours=31.0, peer=20.0, bar=1.5, at_least=True)          # met: 1.55 ≥ 1.5
    Claim("ddil --help, seconds", ours=0.21, bar=0.3)                                       # no peer: 0.21 ≤ 0.3
    Claim("memory bandwidth, GB/s", ours=18.0)                                              # measured, nothing claimed

`Claim.timed` takes the times of `benchmarks.alternation.compare`, and pairs them by round. The median of those ratios is
not the ratio of the two medians, and is the one to report.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from benchmarks.alternation import ratio

COLUMNS = ["benchmark", "claim", "ours", "peer", "ratio", "bar", "met"]


@dataclass(frozen=True)
class Claim:
    """One claim of a benchmark.

    Attributes:
        claim: What is measured, with the case and the unit, such as "KID at N = 1,000, seconds".
        ours: Our figure.
        peer: The peer's figure in the same unit; None where there is none.
        bar: The limit of ours/peer, or of ours where there is no peer; None where nothing is claimed.
        at_least: Whether more is better, such as images a second: the bar is then the least value.
        ratio: Ours over the peer's. Without it, the quotient of the two figures.
    """

    claim: str
    ours: float
    peer: float | None = None
    bar: float | None = None
    at_least: bool = False
    ratio: float | None = None

    @classmethod
    def timed(cls, claim: str, ours: list[float], peer: list[float], bar: float | None = 1.0) -> Claim:
        """Return a claim on the seconds of two contenders, in medians, with the median of the paired ratios."""
        return cls(claim, statistics.median(ours), statistics.median(peer), bar, ratio=ratio(ours, peer))

    @property
    def quotient(self) -> float | None:
        """Ours over the peer's; None without a peer."""
        if self.ratio is not None or self.peer is None:
            return self.ratio
        return self.ours / self.peer

    @property
    def met(self) -> bool | None:
        """Whether the claim holds; None where nothing is claimed."""
        if self.bar is None:
            return None
        found = self.ours if self.quotient is None else self.quotient
        return found >= self.bar if self.at_least else found <= self.bar


def table(claims: Iterable[tuple[str, Claim]]) -> pd.DataFrame:
    """Return the summary: a row for each pair of a benchmark's name and one of its claims."""
    rows = [
        {
            "benchmark": name,
            "claim": one.claim,
            "ours": one.ours,
            "peer": one.peer,
            "ratio": one.quotient,
            "bar": None if one.bar is None else f"{'≥' if one.at_least else '≤'} {one.bar:g}",
            "met": {None: "", True: "yes", False: "no"}[one.met],
        }
        for name, one in claims
    ]
    return pd.DataFrame(rows, columns=COLUMNS)
