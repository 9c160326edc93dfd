"""``make fuzz``: run generated command lines and files, and count their outcomes.

The only outcomes are success, and one clear sentence with the status 1 or 2. A finding is anything else: a traceback,
several sentences, another status, more than the time limit, or a file outside of the working folder's ``o`` and ``new``.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click
from click.testing import CliRunner

from ddil_eval.cli import ddil
from tests.fuzz.cases import KINDS, Kind
from tests.fuzz.words import make_place

LIMIT = 120
"""Seconds that a case may take on a busy machine."""


@dataclass(frozen=True)
class Finding:
    """A case whose outcome is neither success nor one sentence."""

    kind: str
    case: int
    line: list[str]
    what: str


class _TooLong(BaseException):
    """A case took longer than ``LIMIT``. No ``except Exception`` of the package holds it up."""


def _stop(*_: object) -> None:
    raise _TooLong


def run_case(kind: Kind, case: int, seed: int, place: Path) -> tuple[int | None, Finding | None]:
    """Run a case in the working folder ``place``. Return its exit status, and a finding or None."""
    rng = Random(f"{seed} {kind.name} {case}")
    for name in ("new", "o"):
        shutil.rmtree(place / name, ignore_errors=True)
        (place / name).unlink(missing_ok=True)
    line = kind.make(rng, place)
    there = {path for path in place.iterdir() if path.name != "o"}

    def found(what: str) -> Finding:
        return Finding(kind.name, case, line, what)

    signal.alarm(LIMIT)
    try:
        result = CliRunner().invoke(ddil, line)
        signal.alarm(0)
    except _TooLong:
        return None, found(f"it took more than {LIMIT} s")
    finally:
        signal.alarm(0)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        trace = "".join(traceback.format_exception(result.exception, limit=-4))
        return result.exit_code, found(f"a traceback: {trace}")
    said = [part for part in result.stderr.splitlines() if part.lower().startswith("error")]
    if result.exit_code not in (0, 1, 2) or len(said) != (result.exit_code != 0):
        return result.exit_code, found(f"status {result.exit_code} with {len(said)} errors: {result.stderr[-300:]}")
    if result.exit_code and result.stderr.splitlines()[-1] != said[0]:
        return result.exit_code, found(f"more after the sentence: {result.stderr[-300:]}")
    if left := {path for path in place.iterdir() if path.name != "o"} - there:
        return result.exit_code, found(f"files outside of its output: {sorted(map(str, left))}")
    return result.exit_code, None


def cases(count: int, seed: int) -> Iterator[tuple[Kind, int]]:
    """Yield the kind and the number of each case, in an order that the seed decides."""
    rng = Random(seed)
    yield from zip(rng.choices(KINDS, [kind.share for kind in KINDS], k=count), range(count), strict=True)


def fuzz(
    count: int, seed: int, only: str | None = None, minutes: float = math.inf
) -> tuple[Counter[tuple[str, int | None]], list[Finding]]:
    """Run ``count`` cases in a new folder, or as many as some minutes allow.

    Returns:
        How often each kind had each exit status, and the findings.
    """
    end = time.monotonic() + 60 * minutes
    outcomes, findings = Counter[tuple[str, int | None]](), list[Finding]()
    before = signal.signal(signal.SIGALRM, _stop)
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            place = Path(folder).resolve() / "place"  # some cases read "..", which holds nothing else
            place.mkdir()
            stack.enter_context(chdir(place))
            make_place(place)
            for kind, case in cases(count, seed):
                if only is not None and only not in kind.name:
                    continue
                if time.monotonic() > end:
                    break
                status, finding = run_case(kind, case, seed, place)
                outcomes[kind.name, status] += 1
                if finding is not None:
                    findings.append(finding)
                    print(
                        json.dumps([finding.kind, finding.case, finding.line, finding.what])[:3000],
                        file=sys.stderr,
                        flush=True,
                    )
    finally:
        signal.signal(signal.SIGALRM, before)
    return outcomes, findings


@click.command()
@click.option("--cases", "count", default=100_000, show_default=True, help="How many cases to run.")
@click.option("--seed", default=0, show_default=True, help="Decides all cases.")
@click.option("--minutes", default=math.inf, help="Stop after this time, and count the cases until then.")
@click.option("--only", default=None, help="Run the cases of one kind alone, by a part of its name.")
def main(count: int, seed: int, minutes: float, only: str | None) -> None:
    """Run generated command lines and files, and count their outcomes. Exit with 1 where there is a finding."""
    start = time.monotonic()
    outcomes, findings = fuzz(count, seed, only, minutes)
    click.echo(f"{'kind':20} {'success':>8} {'status 1':>9} {'status 2':>9}")
    for kind in KINDS:
        click.echo(
            f"{kind.name:20} {outcomes[kind.name, 0]:8,} {outcomes[kind.name, 1]:9,} {outcomes[kind.name, 2]:9,}"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    click.echo(
        f"{outcomes.total():,} cases in {time.monotonic() - start:,.0f} s, {len(findings)} findings, {peak:.1f} GiB at most"
    )
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
