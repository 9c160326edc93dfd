"""The cost of DDIL over plain progressive distillation, in seconds an update, by phase, stage and uses of a state.

    python -m benchmarks.ddil_overhead [--teacher shapes] [--updates 50] [--rounds 5] [--threads N] [--csv FILE]

PD and DDIL alternate in one run, a block of updates each, so that drift of the machine affects both. A block holds
whole collections. On a CPU the benchmark compares the CPU seconds of the process, which other work on the machine
disturbs less. With one thread (``--threads 1``) no threads wait for each other. On a GPU it compares wall time. A
target takes 4 forward passes of the teacher in the guided stage, and 2 in the later stages. The paper claims under 5 %
more.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import click
import pandas as pd
import torch
from accelerate import Accelerator

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


@dataclass
class Contender:
    """A stage of PD or DDIL, with the time that its blocks took."""

    name: str
    trainer: ProgressiveStage
    seconds: list[float]
    step: int = 0

    def run(self, updates: int) -> None:
        synchronise()
        started = now()
        for _ in range(updates):
            self.trainer.update(self.step)
            self.step += 1
        synchronise()
        self.seconds.append((now() - started) / updates)


def now() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def contenders(
    teacher: GuidedDenoiser,
    pool: LatentPool,
    config: ProgressiveConfig,
    phase: PhaseConfig,
    updates: int,
    accelerator: Accelerator,
) -> list[Contender]:
    """Return plain PD, then DDIL with one and with two uses of a state. Each stays in one phase."""
    assert config.ddil is not None
    found = []
    for uses in (0, 1, 2):
        ddil = (
            config.ddil.model_copy(update={"uses": uses, "collect_every": updates, "phases": (phase,)})
            if uses
            else None
        )
        chosen = config.model_copy(update={"ddil": ddil})
        name = f"DDIL, {uses} use{'s' * (uses > 1)}" if uses else "PD"
        found.append(
            Contender(
                name, ProgressiveStage(teacher, pool, StageConfig(steps=4, updates=10**6), chosen, accelerator), []
            )
        )
    return found


STAGES = ("guided (T = 4)", "later (T = 2)")


@click.command()
@click.option("--teacher", default="shapes", show_default=True)
@click.option("--updates", default=50, show_default=True, help="Updates in a block; one collection serves a block.")
@click.option(
    "--rounds", default=5, show_default=True, help="Blocks of each contender that are counted, after one warm-up."
)
@click.option("--threads", type=int, default=None, help="Threads of a CPU; by default torch's own choice.")
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True, default=STAGES, show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(
    teacher: str, updates: int, rounds: int, threads: int | None, stages: tuple[str, ...], csv_path: Path | None
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads or torch.get_num_threads())
    accelerator = Accelerator()
    model = load_model(teacher, accelerator.device)
    config = validate(
        ProgressiveConfig, override(read_yaml(protocols() / "shapes" / "pd.yaml"), ["pool=1024"]), "pd.yaml"
    )
    assert isinstance(config.ddil, DdilConfig)
    encoded = Path(
        f"runs/benchmark/data-{model.weights_sha256()[:16]}.safetensors"
    )  # another teacher has other latents
    pool = encode_pool(model, open_data("shapes"), config.pool, encoded)
    reflection = calibrate_reflection(pool.mean.float()).to(accelerator.device)
    rows = []
    for stage in stages:
        teacher_denoiser = model.guided(None if stage == STAGES[0] else 1.0, reflection)
        for number, phase in enumerate(config.ddil.phases, 1):
            group = contenders(
                teacher_denoiser, pool, config, phase.model_copy(update={"until": 1.0}), updates, accelerator
            )
            for _ in range(rounds + 1):
                for contender in group:
                    contender.run(updates)
            for contender in group:
                seconds = statistics.median(contender.seconds[1:])
                ratios = [a / b - 1 for a, b in zip(contender.seconds[1:], group[0].seconds[1:], strict=True)]
                rows.append(
                    {
                        "stage": stage,
                        "phase": number,
                        "method": contender.name,
                        "seconds_per_update": seconds,
                        "overhead": statistics.median(ratios),
                        "overhead_min": min(ratios),
                        "overhead_max": max(ratios),
                    }
                )
    frame = pd.DataFrame(rows)
    show(frame, csv_path, ".4f")
    summarise(frame)


def summarise(frame: pd.DataFrame) -> None:
    """Average a stage's phases with the paper's shares, 6,000 and 4,000 updates.

    An overhead is the median over the rounds of DDIL's block against PD's block beside it.
    """
    for (stage, method), group in frame.groupby(["stage", "method"]):
        click.echo(f"{stage}, {method}, both phases: {group.set_index('phase').overhead @ [0.6, 0.4]:+.1%}")


if __name__ == "__main__":
    main()
