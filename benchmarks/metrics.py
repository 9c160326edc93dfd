"""Metrics against their peers on the same features, in alternation: never slower, and the same number.

    python -m benchmarks.metrics [--only NAME …] [--rounds 1] [--full] [--csv FILE]

A row is shown only where both compute the same number within its tolerance. Times are CPU seconds of all threads: the
median of the rounds, and the median of the rounds' ratios (below 1, ours is faster) with its limits. "interval" is ours
with the jackknife of 20 groups, which no peer computes. KID's peers draw subsets of their own, so the numbers are
compared at N = 1,000, where every subset holds all samples.

``--full`` measures N = 30,000 instead, once, each side in a process of its own, with the peak of memory that it adds to
the features. It needs most of an hour, and the peer of PRDC needs 25 GB; a side that the machine stops stays empty.
"""

from __future__ import annotations

import contextlib
import io
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from benchmarks.alternation import compare, ratios
from benchmarks.claims import Claim
from benchmarks.printing import show
from ddil_eval.statistics import FrechetInfinity, FrechetReference, group_labels
from ddil_eval.statistics.kernels import GaussianDiscrepancy, KernelDistance
from ddil_eval.statistics.neighbours import COLUMNS, Neighbours
from ddil_eval.statistics.vendi import Vendi

Array = np.ndarray
PACKAGES = ("numpy", "scipy", "clean-fid", "torch-fidelity", "torchmetrics", "prdc")


def pair(count: int, dimensions: int) -> tuple[Array, Array]:
    """Return features and reference features float32 [count, d] that decay as a network's do: direction k as 1/k."""
    scale, rng = 1 / np.sqrt(np.arange(1, dimensions + 1)), np.random.default_rng(0)
    first, second = ((rng.normal(size=(count, dimensions)) + shift) * scale for shift in (0.1, 0.0))
    return first.astype(np.float32), second.astype(np.float32)


# The peers


def cleanfid_distance(x: Array, y: Array) -> float:
    """clean-fid's ``fid_from_feats``, which warns of singular products."""
    from cleanfid.fid import fid_from_feats

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return float(fid_from_feats(x.astype(np.float64), y.astype(np.float64)))


def fidelity_distance(x: Array, y: Array) -> float:
    """torch-fidelity's FID of two sets of features."""
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = (fid_features_to_statistics(torch.from_numpy(one.astype(np.float64))) for one in (x, y))
        return float(fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"])


def torchmetrics_distance(x: Array, y: Array) -> float:
    """torchmetrics' FID, in float64."""
    import torch
    from torchmetrics.image.fid import _compute_fid

    both = [torch.from_numpy(one.astype(np.float64)) for one in (x, y)]
    return float(_compute_fid(both[0].mean(0), both[0].T.cov(), both[1].mean(0), both[1].T.cov()))


def fidelity_kid(x: Array, y: Array) -> float:
    """torch-fidelity's KID of 100 pairs of subsets of 1,000; of one pair where it holds all samples."""
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    subsets = {"kid_subsets": 1 if len(x) == len(y) == 1000 else 100, "kid_subset_size": 1000}
    found = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **subsets, verbose=False)
    return float(found["kernel_inception_distance_mean"])


def torchmetrics_kid(x: Array, y: Array) -> float:
    """torchmetrics' KID of 100 pairs of subsets of 1,000; of one pair where it holds all samples."""
    import torch
    from torchmetrics.image.kid import poly_mmd

    draw, both = torch.Generator().manual_seed(0), [torch.from_numpy(one) for one in (x, y)]
    subsets = range(1 if len(x) == len(y) == 1000 else 100)
    found = [poly_mmd(*(one[torch.randperm(len(one), generator=draw)[:1000]] for one in both)) for _ in subsets]
    return float(torch.stack(found).mean())


def prdc_shares(x: Array, y: Array) -> Array:
    """The package prdc's four values with 5 neighbours."""
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):
        found = compute_prdc(real_features=y, fake_features=x, nearest_k=5)
    return np.array([found[name] for name in COLUMNS])


# The cases


@dataclass(frozen=True)
class Case:
    """One metric and one peer.

    Attributes:
        metric: What is measured.
        peer: The package, or "" where no package computes the metric.
        ours: Our statistic, from the reference features.
        theirs: The peer's function of features and reference features.
        count: N of the default run.
        dimensions: d of the features. clean-fid's matrix square root takes a minute for 2,048 on one core.
        tolerance: The largest difference of the numbers, over the peer's number or over 1, whichever is larger.
        checked_at: N at which the numbers are compared; None for the measured N.
    """

    metric: str
    peer: str
    ours: Callable[[Array], Any]
    theirs: Callable[[Array, Array], Any] | None
    count: int
    dimensions: int = 2048
    tolerance: float = 1e-4
    checked_at: int | None = None


CASES = (
    Case("fid", "torch-fidelity", FrechetReference, fidelity_distance, 1000),
    Case("fid", "torchmetrics", FrechetReference, torchmetrics_distance, 1000),
    Case("fid", "clean-fid", FrechetReference, cleanfid_distance, 1000, 512),
    Case("kid", "torch-fidelity", KernelDistance, fidelity_kid, 2000, tolerance=1e-6, checked_at=1000),
    Case("kid", "torchmetrics", KernelDistance, torchmetrics_kid, 1000, tolerance=1e-5),
    # prdc rounds distances to float32: at 30,000 images one pair of 9 · 10⁸ may count as equal. That is 6.7e-6 in density.
    Case("prdc", "prdc", Neighbours, prdc_shares, 2000, tolerance=1e-5),
    Case("fid_infinity", "", FrechetInfinity, None, 1000),
    Case("cmmd", "", GaussianDiscrepancy, None, 2000),
    Case("vendi", "", Vendi, None, 1000),
)
SIDES = ("ours", "interval", "peer")


def work(case: Case, side: str, x: Array, y: Array) -> Any:
    """Return the numbers of one side."""
    if side == "peer":
        assert case.theirs is not None
        return case.theirs(x, y)
    statistic = case.ours(y)
    return statistic.values(x) if side == "ours" else statistic.spread(x, group_labels(len(x))).values


def sides(case: Case) -> tuple[str, ...]:
    return SIDES if case.theirs is not None else SIDES[:2]


def difference(case: Case, ours: Any, theirs: Any) -> float:
    """Return how far the numbers are apart. Refuse what is beyond the case's tolerance."""
    found = np.max(np.abs(np.asarray(ours) - theirs) / np.maximum(np.abs(theirs), 1.0))
    if not found <= case.tolerance:
        raise click.ClickException(
            f"{case.metric} is {ours}, and {theirs} by {case.peer}; they differ by more than {case.tolerance:g}"
        )
    return float(found)


def alternated(case: Case, rounds: int) -> dict[str, object]:
    """Return the row of a case: all sides in alternation in this process."""
    x, y = pair(case.count, case.dimensions)
    results: dict[str, Any] = {}

    def timed(side: str) -> Callable[[], object]:
        return lambda: results.__setitem__(side, work(case, side, x, y))

    times = compare({side: timed(side) for side in sides(case)}, rounds=rounds, clock="cpu")
    if case.theirs is not None and case.checked_at is not None:
        first = slice(case.checked_at)
        results = {side: work(case, side, x[first], y[first]) for side in ("ours", "peer")}
    return row(case, case.count, times, results)


def row(case: Case, count: int, times: dict[str, list[float]], results: dict[str, Any]) -> dict[str, object]:
    """Return the figures of a case, after checking that its numbers agree."""
    both = {"ours", "peer"} <= results.keys()  # a side that the machine stopped has no numbers
    apart = difference(case, results["ours"], results["peer"]) if both else float("nan")
    nothing = [float("nan")] * len(times["ours"])
    ours, interval, peer = (times.get(side, nothing) for side in SIDES)
    found = ratios(ours, peer)
    return {
        "metric": case.metric,
        "peer": case.peer,
        "N": count,
        "d": case.dimensions,
        "ours_s": statistics.median(ours),
        "interval_s": statistics.median(interval),
        "peer_s": statistics.median(peer),
        "ratio": statistics.median(found),
        "ratio_least": min(found),
        "ratio_most": max(found),
        "interval_ratio": statistics.median(ratios(interval, peer)),
        "interval_in_values": statistics.median(ratios(interval, ours)),
        "difference": apart,
        "tolerance": case.tolerance,
    }


def alone(index: int, side: str, count: int) -> tuple[float, float, Any]:
    """Return CPU seconds, MiB beside the features at the peak, and the numbers, of one side in this process."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    x, y = pair(count, CASES[index].dimensions)
    work(CASES[index], side, x[:1000], y[:1000])  # imports, and their memory
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    numbers = work(CASES[index], side, x, y)
    seconds = time.process_time() - started
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit, numbers


def large(index: int, count: int) -> dict[str, object]:
    """Return the row of a case at a large N: each side once, in a process of its own, with its memory."""
    case, times, memory = CASES[index], {}, {}
    results: dict[str, Any] = {}
    for side in sides(case):
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                seconds, memory[side], results[side] = process.submit(alone, index, side, count).result()
                times[side] = [seconds]
        except (BrokenProcessPool, MemoryError):  # the machine stopped it, most often for its memory
            click.echo(f"{case.metric}, {side}: stopped at N = {count:,}, most likely for want of memory", err=True)
            times[side], memory[side] = [float("nan")], float("nan")
    if case.checked_at is not None:
        x, y = pair(case.checked_at, case.dimensions)
        results = {side: work(case, side, x, y) for side in ("ours", "peer")}
    return row(case, count, times, results) | {f"{side}_MiB": memory.get(side, float("nan")) for side in SIDES}


def summary(frame: pd.DataFrame) -> list[Claim]:
    """Return one claim for each metric that a peer computes: never slower."""
    claims = []
    for found in frame.dropna(subset=["peer_s"]).itertuples():
        name = f"{found.metric} at N = {found.N:,}, d = {found.d:,}, against {found.peer}, CPU seconds"
        claims.append(Claim(name, found.ours_s, found.peer_s, 1.0, ratio=found.ratio))
    return claims


@click.command()
@click.option("--only", multiple=True, type=click.Choice(sorted({case.metric for case in CASES})))
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--full", is_flag=True, help="Measure --samples images once, with memory.")
@click.option("--samples", type=click.IntRange(min=1000), default=30000, show_default=True, help="N of --full.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(only: Sequence[str], rounds: int, full: bool, samples: int, csv_path: Path | None) -> None:
    chosen = [index for index, case in enumerate(CASES) if not only or case.metric in only]
    rows = []
    for index in chosen:
        case = CASES[index]
        click.echo(f"{case.metric} {case.peer}", err=True)
        rows.append(large(index, samples) if full else alternated(case, rounds))
    show(pd.DataFrame(rows), csv_path, ".3g", packages=PACKAGES)


if __name__ == "__main__":
    main()
