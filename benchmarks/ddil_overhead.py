"""The cost of DDIL over plain progressive distillation, by phase, stage and uses of a state.

    python -m benchmarks.ddil_overhead [--teacher shapes] [--batch-size 32] [--updates 24] [--rounds 5] [--threads N]
        [--csv FILE]

PD and DDIL alternate in one run, a block of updates each, so that drift of the machine affects both. A block holds one
whole collection. On a CPU the benchmark compares the CPU seconds of the process, which other work on the machine
disturbs less. With one thread (``--threads 1``) no threads wait for each other. On a GPU it compares wall time. A
target takes 4 forward passes of the teacher in the guided stage, and 2 in the later stages. The paper claims under 5 %
more.

``--updates`` is a multiple of 4: the teacher labels the data of up to four batches together, and a block should hold
whole groups of them. Small batches and short blocks cost DDIL more, because its rollouts then evaluate few rows at once.

``evaluations`` is the overhead that the evaluated rows alone give, where a row that is trained on counts three times.
It is what DDIL costs on any machine: in phase 2 the student takes most transitions, and its evaluations are extra work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.alternation import compare, figures
from benchmarks.claims import Claim
from benchmarks.printing import show
from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool, encode_pool
from ddil_core.diffusion.denoiser import GuidedDenoiser
from ddil_core.diffusion.parameterization import calibrate_reflection
from ddil_core.distillation.config import ProgressiveConfig, StageConfig
from ddil_core.distillation.phases import DdilConfig, PhaseConfig
from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.models.model import load_model
from ddil_core.support.protocol import override, read_yaml, validate
from ddil_core.support.resources import protocols
from ddil_eval.cli.options import quiet_libraries

STAGES = ("guided (T = 4)", "later (T = 2)")
POOL = 128
PLAIN = "PD"
USES = {PLAIN: 0, "DDIL, 1 use": 1, "DDIL, 2 uses": 2}
BARS = {"DDIL, 1 use": 1.04, "DDIL, 2 uses": 1.0}
"""What DDIL may take, over both phases, of the time of PD."""
SHARES = {1: 0.6, 2: 0.4}
"""The paper's phases, 6,000 and 4,000 updates."""


class Contender:
    """A stage of PD or DDIL that stays in one phase."""

    def __init__(
        self, teacher: GuidedDenoiser, pool: LatentPool, config: ProgressiveConfig, accelerator: Accelerator
    ) -> None:
        self.stage = ProgressiveStage(teacher, pool, StageConfig(steps=4, updates=10**6), config, accelerator)
        self.step = 0
        self.evaluations = 0
        """The evaluated rows of all blocks. A row with its gradient counts three times."""

    def block(self, updates: int) -> None:
        with evaluated_rows(self.stage.net, self.stage.teacher.network.net) as rows:
            for _ in range(updates):
                self.stage.update(self.step)
                self.step += 1
        self.evaluations += sum(rows)


@contextmanager
def evaluated_rows(*nets: nn.Module) -> Iterator[list[int]]:
    """Yield a list that receives the rows of every evaluation inside the context."""
    rows: list[int] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(len(args[0]) * (3 if torch.is_grad_enabled() else 1))

    hooks = [net.register_forward_pre_hook(look) for net in nets]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def contender(
    uses: int,
    teacher: GuidedDenoiser,
    pool: LatentPool,
    config: ProgressiveConfig,
    phase: PhaseConfig,
    updates: int,
    accelerator: Accelerator,
) -> Contender:
    """Return DDIL with so many uses of a state, in one phase; plain PD for no use."""
    assert isinstance(config.ddil, DdilConfig)
    whole = phase.model_copy(update={"until": 1.0})
    ddil = config.ddil.model_copy(update={"uses": uses, "collect_every": updates, "phases": (whole,)})
    return Contender(teacher, pool, config.model_copy(update={"ddil": ddil if uses else None}), accelerator)


def measure_phase(group: dict[str, Contender], updates: int, rounds: int) -> pd.DataFrame:
    """Return a row for each contender: seconds of an update, and its overhead over PD's block beside it."""
    times = compare({name: partial(each.block, updates) for name, each in group.items()}, rounds=rounds)
    frame = figures(times, peer=PLAIN)
    rows = {name: each.evaluations for name, each in group.items()}
    overheads: dict[str, Any] = {"seconds_per_update": frame.median_s / updates}
    for column, of in (("overhead", "ratio"), ("overhead_least", "ratio_least"), ("overhead_most", "ratio_most")):
        overheads[column] = frame[of] - 1
    expected = [rows[name] / rows[PLAIN] - 1 for name in frame.contender]
    return pd.DataFrame({"method": frame.contender, **overheads, "evaluations": expected})


@click.command(help=__doc__)
@click.option("--teacher", default="shapes", show_default=True)
@click.option("--batch-size", type=int, default=32, show_default=True, help="The teacher takes twice as many states.")
@click.option("--updates", default=24, show_default=True, help="Updates in a block; one collection serves a block.")
@click.option(
    "--rounds", default=5, show_default=True, help="Blocks of each contender that are counted, after one warm-up."
)
@click.option("--threads", type=int, default=None, help="Threads of a CPU; by default torch's own choice.")
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True, default=STAGES, show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(
    teacher: str,
    batch_size: int,
    updates: int,
    rounds: int,
    threads: int | None,
    stages: tuple[str, ...],
    csv_path: Path | None,
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads or torch.get_num_threads())
    accelerator = Accelerator()
    model = load_model(teacher, accelerator.device)
    settings = [f"batch_size={batch_size}", f"teacher_batch_size={2 * batch_size}", f"pool={POOL}"]
    content = override(read_yaml(protocols() / "shapes" / "pd.yaml"), settings)
    config = validate(ProgressiveConfig, content, "pd.yaml")
    assert isinstance(config.ddil, DdilConfig)
    with tempfile.TemporaryDirectory() as folder:
        pool = encode_pool(model, open_data("shapes"), POOL, Path(folder) / "data.safetensors")
    reflection = calibrate_reflection(pool.mean.float()).to(accelerator.device)
    frames = []
    for stage in stages:
        guided = model.guided(None if stage == STAGES[0] else 1.0, reflection)
        for number, phase in enumerate(config.ddil.phases, 1):
            group = {
                name: contender(uses, guided, pool, config, phase, updates, accelerator) for name, uses in USES.items()
            }
            found = measure_phase(group, updates, rounds)
            found.insert(0, "phase", number)
            found.insert(0, "stage", stage)
            frames.append(found)
    frame = pd.concat(frames, ignore_index=True)
    show(frame, csv_path, ".4f")
    for claim in summary(frame):
        click.echo(f"{claim.claim}: {claim.ours - 1:+.1%}")


def summary(frame: pd.DataFrame) -> list[Claim]:
    """Average a stage's phases with the paper's shares: DDIL's time of an update over PD's.

    An overhead is the median over the rounds of DDIL's block against PD's block beside it.
    """
    claims = []
    for (stage, method), group in frame.groupby(["stage", "method"], sort=False):
        if method != PLAIN:
            over = float(sum(SHARES[row.phase] * (1 + row.overhead) for row in group.itertuples()))
            claims.append(Claim(f"{method}, {stage}, both phases, time over PD's", over, bar=BARS[method]))
    return claims


if __name__ == "__main__":
    main()
