"""The delete-a-group jackknife: intervals of set statistics, and p-values of their differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.special import stdtrit

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.estimate import CONFIDENCE, Estimate, is_difference, rate_error, score_interval, t_interval

Array = np.ndarray
GROUPS = 20


@dataclass(frozen=True)
class Spread:
    """A statistic's ``values`` [columns], its jackknife ``pseudovalues`` [groups, columns], and, where the point is a mean
    over subsets drawn at random, the ``draws`` [draws, columns] of those. ``note`` says why it is not to be trusted."""

    values: Array
    pseudovalues: Array
    draws: Array | None = None
    note: str | None = None


class Statistic(Protocol):
    """A statistic of a set of features, made ready once for one reference set.

    It may have several columns, values that are found together (precision, recall, density, coverage).
    """

    def values(self, features: Array) -> Array:
        """Features [n, d] → [columns]."""
        ...

    def spread(self, features: Array, labels: Array) -> Spread:
        """The same with what leaving out each group tells; ``labels`` [n] in 0 … groups − 1 say who is in which."""
        ...


@dataclass(frozen=True)
class Jackknife:
    """Cells measured on one set of prompts, with what leaving out each group of prompts tells of their spread.

    ``values`` [cells]; ``pseudovalues`` [groups, cells]; ``left_out`` [groups], the prompts of each group; ``draws``
    [draws, cells] where the values are means over random subsets, the same ones for every cell. ``notes`` [cells] say which
    values are not to be trusted, and why.
    """

    values: Array
    pseudovalues: Array = field(repr=False)
    left_out: Array = field(repr=False)
    draws: Array | None = field(default=None, repr=False)
    notes: tuple[str | None, ...] = ()

    @property
    def n(self) -> int:
        return int(self.left_out.sum())

    def estimate(
        self, contrast: Array, *, lowest: float = -np.inf, highest: float = np.inf, rate: bool = False
    ) -> Estimate:
        """Σ contrast · cells with its interval, Student's t with groups − 1 degrees of freedom.

        ``lowest`` and ``highest`` bound the interval: 0 below for a distance, nothing for a difference. Where cells are a
        ``rate``, from 0 to ``highest``, which is 1 for a share, one cell's interval is its ``score_interval``; in a difference
        one more sample of each is taken to differ, which tells only near the bounds, where hardly one does.
        """
        contrast = np.asarray(contrast, dtype=np.float64)
        value, alone = float(self.values @ contrast), np.count_nonzero(contrast) == 1
        error, degrees = self._standard_error(contrast), len(self.left_out) - 1
        if not np.isfinite([value, error]).all():
            raise DdilError(
                f"a statistic of these features is {value}, which cannot be compared; look for broken pictures"
            )
        if rate and not alone:
            error = rate_error(error, contrast, self.n)
        low, high, p_value = t_interval(value, error, degrees)
        if rate and alone:
            t = float(stdtrit(degrees, (1 + CONFIDENCE) / 2))
            low, high = score_interval(value, error, self.n, t, highest)
        low, high = max(low, min(lowest, value)), min(high, max(highest, value))
        notes = [note for note, weight in zip(self.notes, contrast, strict=False) if note is not None and weight != 0]
        return Estimate(
            value,
            float(min(low, value)),
            float(max(high, value)),
            self.n,
            p_value if is_difference(contrast) else None,
            notes[0] if notes else None,
        )

    def cells(self, *, lowest: float = -np.inf) -> list[Estimate]:
        """Each cell by itself."""
        return [self.estimate(row, lowest=lowest) for row in np.eye(len(self.values))]

    def _standard_error(self, contrast: Array) -> float:
        # Busing, Meijer and van der Leeden (1999): with h = n / m for a group of m, var = mean((θ̃ − θ_J)² / (h − 1)).
        pseudovalues = self.pseudovalues @ contrast
        inverse_share = self.n / self.left_out
        centre = np.average(pseudovalues, weights=self.left_out)
        variance = np.mean(np.square(pseudovalues - centre) / (inverse_share - 1))
        if self.draws is not None and len(self.draws) > 1:
            variance += np.var(self.draws @ contrast, ddof=1) / len(self.draws)
        return float(np.sqrt(variance))


def group_labels(n: int, seed: int = 0, groups: int = GROUPS) -> Array:
    """The group of each of ``n`` prompts, [n] in 0 … groups − 1, by a permutation that depends on (seed, n) alone.

    Groups are as equal as can be; there are n of them where n is smaller. Raises DdilError for fewer than four prompts.
    """
    if n < 4:
        raise DdilError(f"{n} prompts are too few for a jackknife interval; ask for at least 4")
    labels = np.empty(n, dtype=np.int64)
    for label, members in enumerate(np.array_split(np.random.default_rng([seed, n]).permutation(n), min(groups, n))):
        labels[members] = label
    return labels


def pseudovalues(values: Array, replicates: Array, labels: Array) -> Array:
    """h θ̂ − (h − 1) θ̂₋g of ``values`` [columns] and ``replicates`` [groups, columns], with h = n / size of the group.

    They take out a bias that falls as 1/n, whatever the groups' sizes, so that the interval is that of the spread at
    this n; the bias itself stays in the point, as in every published Fréchet distance. The reference is taken as given:
    its own spread is not in the interval.
    """
    inverse_share = (len(labels) / np.bincount(labels))[:, None]
    return inverse_share * np.asarray(values, dtype=np.float64) - (inverse_share - 1) * replicates


def jackknife(value_of: Callable[[Array], Array], n: int, *, groups: int = GROUPS, seed: int = 0) -> Jackknife:
    """Delete-a-group jackknife of a statistic of ``n`` prompts.

    ``value_of`` takes the sorted indices of the prompts to keep and gives the values of all cells, [cells].

    Raises:
        DdilError: fewer than four prompts.
    """
    labels = group_labels(n, seed, groups)
    values = np.asarray(value_of(np.arange(n)), dtype=np.float64)
    replicates = np.stack([value_of(np.flatnonzero(labels != group)) for group in range(labels.max() + 1)])
    return Jackknife(values, pseudovalues(values, replicates, labels), np.bincount(labels))
