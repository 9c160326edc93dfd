"""The benchmarks that ``python -m benchmarks`` runs: a row for each script, with its claim and its time.

To add one, write ``benchmarks/NAME.py`` with a click command ``main`` that takes ``--csv FILE``, and a row here. A
function ``summary(frame) -> list[Claim]`` puts its claims into the summary (`benchmarks.claims`).
"""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = 540
"""Seconds that all benchmarks of one machine may take together, so that a short lease of a GPU is enough."""


class Plan:
    """How a benchmark runs on one kind of machine.

    Args:
        seconds: What it may take on two quiet CPU cores, or on one GPU.
        arguments: Its command-line arguments there, besides ``--csv``.
    """

    def __init__(self, seconds: int, *arguments: str) -> None:
        self.seconds, self.arguments = seconds, arguments


@dataclass(frozen=True)
class Benchmark:
    """One script of this folder.

    Attributes:
        name: The module ``benchmarks.NAME``, and the file ``NAME.csv``.
        claim: What the script shows.
        cpu: How it runs on a machine without a GPU; None where it needs one.
        gpu: How it runs on a machine with a GPU; None where it measures nothing there.
    """

    name: str
    claim: str
    cpu: Plan | None = None
    gpu: Plan | None = None

    def plan(self, kind: str) -> Plan | None:
        """Return the plan for a kind of machine, "cpu" or "gpu"."""
        return self.gpu if kind == "gpu" else self.cpu


OVERHEAD = ("--threads", "1", "--stage", "later (T = 2)", "--batch-size", "8", "--updates", "16", "--rounds", "2")
"""One stage and small batches; without these arguments the script takes half an hour."""

BENCHMARKS = {
    row.name: row
    for row in (
        Benchmark("ceilings", "what the machine can do at most: products and memory", Plan(8), Plan(20)),
        Benchmark("limits", "how near the networks come to the machine's limit", Plan(20), Plan(30)),
        Benchmark("startup", "light commands start in less than 0.3 to 3 s", Plan(28)),
        Benchmark("sampling", "our sampler is not slower than diffusers' pipeline", Plan(60), Plan(150)),
        Benchmark("precision", "what bf16, fp16, TF32 and compilation change", Plan(105), Plan(60)),
        Benchmark("grid", "shared rollouts take at most half the time of separate ones", Plan(38), Plan(40)),
        Benchmark("training", "an LCM update is faster than the public script's", Plan(65), Plan(110)),
        Benchmark("ddil_overhead", "DDIL costs at most 4 % more than PD", Plan(50, *OVERHEAD), Plan(50)),
        Benchmark("processes", "two processes lose at most 10 % on two cores", Plan(50)),
        Benchmark("metrics", "no metric is slower than its peer's", Plan(75)),
        Benchmark("scale", "how cost grows with batch, steps, prompts and N", Plan(40), Plan(60)),
    )
}
