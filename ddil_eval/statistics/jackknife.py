"""The delete-a-group jackknife: intervals of set statistics, and p-values of their differences.

Each replicate is the statistic without one group of prompts. The spread of the replicates gives the standard error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.special import stdtrit

from ddil_core.support.errors import DdilError
from ddil_eval.statistics.estimate import (
    CONFIDENCE,
    Estimate,
    Families,
    is_difference,
    is_level,
    rate_error,
    score_interval,
    t_interval,
    with_seeds,
)

Array = np.ndarray
GROUPS = 20


@dataclass(frozen=True)
class Spread:
    """The values of a statistic with what their intervals need.

    Attributes:
        values: [columns].
        pseudovalues: The jackknife's pseudovalues [groups, columns].
        draws: Values [draws, columns] of random subsets, where ``values`` are their mean; else None.
        note: Why the values are not reliable, or None.
    """

    values: Array
    pseudovalues: Array
    draws: Array | None = None
    note: str | None = None


class Statistic(Protocol):
    """A statistic of a set of features, prepared once for one reference set.

    A statistic has one or more columns: values that are computed together (precision, recall, density, coverage).
    """

    def values(self, features: Array) -> Array:
        """Return the values [columns] of features [n, d]."""
        ...

    def spread(self, features: Array, labels: Array) -> Spread:
        """Return values and pseudovalues. ``labels`` [n] give each sample's group, 0 … groups − 1."""
        ...


@dataclass(frozen=True)
class Jackknife:
    """Cells measured on one set of prompts, with their pseudovalues.

    Attributes:
        values: [cells].
        pseudovalues: [groups, cells].
        group_sizes: The number of prompts in each group, [groups].
        draws: Values [draws, cells] of random subsets, the same subsets for every cell, where ``values`` are their
            mean; else None.
        notes: For each cell why its value is not reliable, or None. May be empty.
    """

    values: Array
    pseudovalues: Array = field(repr=False)
    group_sizes: Array = field(repr=False)
    draws: Array | None = field(default=None, repr=False)
    notes: tuple[str | None, ...] = ()

    @property
    def n(self) -> int:
        """The number of prompts."""
        return int(self.group_sizes.sum())

    def estimate(
        self,
        contrast: Array,
        by_seed: Families = (),
        *,
        lowest: float = -np.inf,
        highest: float = np.inf,
        rate: bool = False,
    ) -> Estimate:
        """Return a contrast of the cells with its interval: Student's t with groups − 1 degrees of freedom.

        Where no group changes a value, the estimate has a note: its spread is unknown, and not 0.

        A single rate has the interval of ``score_interval``. In a difference of rates, ``rate_error`` counts one more
        sample of each cell as different. With training seeds the interval is over seeds and prompts (``with_seeds``).

        Args:
            contrast: Weights [cells].
            by_seed: For each family of training seeds, a contrast [seeds, cells] of each seed.
            lowest: The interval does not pass this bound: 0 for a distance, −∞ for a difference.
            highest: The interval does not pass this bound.
            rate: The cells are rates from 0 to ``highest``, which is 1 for a share.

        Raises:
            DdilError: the value or its standard error is not finite.
        """
        contrast = np.asarray(contrast, dtype=np.float64)
        value, single = float(self.values @ contrast), is_level(contrast)
        error, groups = self._standard_error(contrast), len(self.group_sizes)
        still = not rate and not by_seed and value != 0 and error <= 1e-9 * abs(value)
        if not np.isfinite([value, error]).all():
            raise DdilError(
                f"a statistic of these features is {value}, which cannot be compared; check the images for broken ones"
            )
        if rate and not single:
            error = rate_error(error, contrast, self.n)
        error, degrees = with_seeds(error, groups - 1, [family @ self.values for family in by_seed])
        low, high, p_value = t_interval(value, error, degrees)
        if rate and single:
            t = float(stdtrit(degrees, (1 + CONFIDENCE) / 2))
            low, high = score_interval(value, error, self.n, t, highest)
        low, high = max(low, min(lowest, value)), min(high, max(highest, value))
        notes = [note for note, weight in zip(self.notes, contrast, strict=False) if note is not None and weight != 0]
        notes += ["no group of prompts changes the value, so that its spread is not known"] if still else []
        return Estimate(
            value,
            float(min(low, value)),
            float(max(high, value)),
            self.n,
            p_value if is_difference(contrast) else None,
            notes[0] if notes else None,
            degrees if by_seed else None,
        )

    def _standard_error(self, contrast: Array) -> float:
        # Busing, Meijer and van der Leeden (1999): var = mean((θ̃ − θ_J)² / (h − 1)), with h = n / group size.
        pseudovalues = self.pseudovalues @ contrast
        inverse_share = self.n / self.group_sizes
        centre = np.average(pseudovalues, weights=self.group_sizes)
        variance = np.mean(np.square(pseudovalues - centre) / (inverse_share - 1))
        if self.draws is not None and len(self.draws) > 1:
            variance += np.var(self.draws @ contrast, ddof=1) / len(self.draws)
        return float(np.sqrt(variance))


def group_labels(n: int, seed: int = 0, groups: int = GROUPS) -> Array:
    """Return the group of each of ``n`` prompts, [n] in 0 … groups − 1, by a permutation that depends only on
    (seed, n).

    Group sizes differ by at most 1. Where n < groups, there are n groups. Raises DdilError for fewer than four prompts.
    """
    if n < 4:
        raise DdilError(f"{n} prompts are too few for a jackknife interval; measure at least 4")
    labels = np.empty(n, dtype=np.int64)
    for label, members in enumerate(np.array_split(np.random.default_rng([seed, n]).permutation(n), min(groups, n))):
        labels[members] = label
    return labels


def pseudovalues(values: Array, replicates: Array, labels: Array) -> Array:
    """Return h θ̂ − (h − 1) θ̂₋g of ``values`` [columns] and ``replicates`` [groups, columns], with h = n /
    size of the group.

    Pseudovalues remove a bias that falls as 1/n, for groups of any size. So the interval measures the spread at this n.
    The bias stays in the value, as in every published Fréchet distance. The reference set counts as fixed: its own
    spread is not in the interval.
    """
    inverse_share = (len(labels) / np.bincount(labels))[:, None]
    return inverse_share * np.asarray(values, dtype=np.float64) - (inverse_share - 1) * replicates
