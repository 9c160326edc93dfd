"""Run all benchmarks that fit this machine, and say which claims are met.

    python -m benchmarks [--only NAME] [--out DIR] [--list]

Each benchmark runs in a process of its own. It writes DIR/NAME.csv, and what it prints goes to DIR/NAME.log. The
claims of all go to DIR/summary.csv: ours, the peer's, their ratio, the bar, and whether it is met. A machine with a GPU
runs the benchmarks of a GPU, and another one those of a CPU. Exit status: 0 if all benchmarks ran, whether or not their
claims are met; 1 if one failed; 2 if the command was wrong.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import click

from benchmarks import ROOT
from benchmarks.claims import Claim, table
from benchmarks.printing import read, show, write
from benchmarks.table import BENCHMARKS, LIMIT, Benchmark, Plan


class Failed(Exception):
    """A benchmark did not end well."""


def kind_of_machine() -> str:
    """Return "gpu" where torch sees a GPU, else "cpu"."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def run(benchmark: Benchmark, plan: Plan, out: Path, patience: float = 3) -> None:
    """Run one benchmark in a process of its own, with its files and scratch in ``out``.

    After ``patience`` times its planned seconds it is stopped, so that the others have their turn.

    Raises:
        Failed: It ended with an error, took too long, or wrote no CSV file.
    """
    csv, log = out / f"{benchmark.name}.csv", out / f"{benchmark.name}.log"
    csv.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{benchmark.name}", "--csv", str(csv), *plan.arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=out, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(patience * plan.seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"stopped after {patience:g} times its planned {plan.seconds} s; see {log}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own processes too
                process.wait()
    if status:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        raise Failed(f"exit status {status}: {lines[-1] if lines else 'it printed nothing'}; see {log}")
    if not csv.is_file():
        raise Failed(f"it wrote no {csv.name}; see {log}")


def claims(benchmark: Benchmark, out: Path) -> list[Claim]:
    """Return the claims of a benchmark that has run; none where its module has no ``summary``."""
    module = import_module(f"benchmarks.{benchmark.name}")
    return module.summary(read(out / f"{benchmark.name}.csv")) if hasattr(module, "summary") else []


def list_benchmarks() -> None:
    """Print the table of benchmarks, with the seconds that each may take."""
    width = max(map(len, BENCHMARKS))
    click.echo(f"{'name':{width}}  CPU, s  GPU, s  claim")
    for row in BENCHMARKS.values():
        cpu, gpu = (str(plan.seconds) if plan else "–" for plan in (row.cpu, row.gpu))
        click.echo(f"{row.name:{width}}  {cpu:>6}  {gpu:>6}  {row.claim}")


@click.command(help=__doc__, epilog=f"All together take less than {LIMIT // 60} minutes on two quiet CPU cores.")
@click.option("--only", multiple=True, type=click.Choice(list(BENCHMARKS)), metavar="NAME",
              help="Run this benchmark; may be given several times.")  # fmt: skip
@click.option("--out", default=Path("runs/benchmarks"), show_default=True, help="The folder for files.",
              type=click.Path(file_okay=False, path_type=Path))  # fmt: skip
@click.option("--patience", default=3.0, show_default=True, metavar="FACTOR",
              help="Stop a benchmark after so many times its planned seconds.")  # fmt: skip
@click.option("--list", "listing", is_flag=True, help="List the benchmarks and run none.")
@click.pass_context
def main(ctx: click.Context, only: tuple[str, ...], out: Path, patience: float, listing: bool) -> None:
    if listing:
        list_benchmarks()
        return
    kind = kind_of_machine()
    chosen = [BENCHMARKS[name] for name in dict.fromkeys(only or BENCHMARKS)]
    if misplaced := [row.name for row in chosen if only and row.plan(kind) is None]:
        with_or_without = "with" if kind == "gpu" else "without"
        raise click.UsageError(f"{', '.join(misplaced)}: nothing to measure on a machine {with_or_without} a GPU")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found: list[tuple[str, Claim]] = []
    failures = []
    for row in chosen:
        if (plan := row.plan(kind)) is None:
            continue
        started = time.perf_counter()
        try:
            run(row, plan, out, patience)
            found += [(row.name, claim) for claim in claims(row, out)]
        except Exception as error:  # one benchmark must not stop the others; the failure is named at the end
            failures.append(f"{row.name} failed: {error}")
        write(table(found), out / "summary.csv")  # each time, as a lease of a machine may end before the last one
        seconds = time.perf_counter() - started
        click.echo(f"{row.name}: {seconds:.0f} s, planned {plan.seconds} s", err=True)
    show(table(found), None, title="Claims")
    for failure in failures:
        click.echo(failure, err=True)
    ctx.exit(1 if failures else 0)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
