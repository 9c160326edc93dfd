"""Two processes of one thread against one process of two threads, for a distillation and for an evaluation.

    python -m benchmarks.processes [--updates 6] [--images 48] [--rounds 1] [--csv FILE]

A round starts each contender once, as ``torchrun`` does (gloo), one after the other and in turns. Each does both works
on two cores: ``distill``, updates of PD with DDIL in the shapes world, and ``eval``, images of the shapes teacher with
features and a Fréchet distance. Each work runs once before it is timed, by the clock, until all processes are done. So
starting, importing and the encoding of data are left out. ``waits`` is the share of the time in which the first process
used no processor: it waited for the other one, or the machine did something else.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd

from benchmarks.alternation import figures
from benchmarks.claims import Claim
from benchmarks.printing import show

ONE, TWO = "1 process, 2 threads", "2 processes, 1 thread"
PROCESSES = {ONE: 1, TWO: 2}
WORKS = ("distill", "eval")
BAR = 1.1
"""What two processes may take of the time of one: they lose at most 10 %."""


def distillation(updates: int, folder: Path) -> Callable[[], object]:
    """Return the updates of a stage. Before, the data are encoded and as many updates are done."""
    from ddil_core.data.datasets import open_data
    from ddil_core.data.pool import encode_pool
    from ddil_core.diffusion.parameterization import calibrate_reflection
    from ddil_core.distillation.config import ProgressiveConfig
    from ddil_core.distillation.processes import make_accelerator
    from ddil_core.distillation.progressive import ProgressiveStage
    from ddil_core.models.model import load_model
    from ddil_core.support.protocol import override, read_yaml, validate
    from ddil_core.support.resources import protocols

    settings = ["pool=64", f"ddil.collect_every={updates}", f"stages=[{{steps: 8, updates: {2 * updates}}}]"]
    content = override(read_yaml(protocols() / "shapes" / "pd.yaml"), settings)
    config = validate(ProgressiveConfig, content, "pd.yaml")
    accelerator, model = make_accelerator(config, folder, "cpu"), load_model("shapes", "cpu")
    pool = encode_pool(model, open_data("shapes"), config.pool, folder / "data.safetensors")  # all processes encode
    teacher = model.guided(None, calibrate_reflection(pool.mean))
    stage = ProgressiveStage(teacher, pool, config.stages[0], config, accelerator)
    steps = iter(range(2 * updates))

    def work() -> None:
        for _ in range(updates):
            stage.update(next(steps))
        accelerator.wait_for_everyone()

    work()
    return work


def evaluation(images: int, folder: Path) -> Callable[[], object]:
    """Return a measurement of so many images. Before, the reference and a few images are measured."""
    from ddil_core.support.ranks import barrier
    from ddil_eval import compare
    from ddil_eval.experiments.systems import SystemsConfig

    config = SystemsConfig.model_validate(
        {"systems": [{"name": "shapes", "model": "shapes"}], "reference_images": images, "batch_size": 16}
    )

    def measured(count: int) -> None:
        out = folder / f"records-{count}"
        compare(None, "shapes", out=out, config=config, num_prompts=count, metrics=["fd_efflite0"])
        barrier()

    measured(32)
    return lambda: measured(images)


def work_here(updates: int, images: int, folder: Path) -> None:
    """Do both works in this process, which is one of several, and write what they took to ``folder``."""
    works = {"distill": distillation(updates, folder), "eval": evaluation(images, folder)}
    found = {}
    for name, work in works.items():
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        found[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    if os.environ.get("RANK", "0") == "0":
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def started(name: str, updates: int, images: int) -> dict[str, dict[str, float]]:
    """Start a contender and return what its works took.

    Raises:
        ClickException: It failed.
    """
    count = PROCESSES[name]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        "--no-python",
    ]
    threads = str(2 // count)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--updates", str(updates), "--images", str(images), "--work-in", folder]
        done = subprocess.run(
            [*launch, sys.executable, "-m", "benchmarks.processes", *options],
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise click.ClickException(f"{name} failed: {done.stderr.strip()[-2000:]}")
        found: dict[str, dict[str, float]] = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    return found


def measure(updates: int, images: int, rounds: int) -> pd.DataFrame:
    """Return a row for each work and contender."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in PROCESSES}
    for number in range(rounds):
        for name in list(PROCESSES) if number % 2 == 0 else reversed(PROCESSES):
            found[name].append(started(name, updates, images))
    frames = []
    for work in WORKS:
        frame = figures({name: [run[work]["wall"] for run in runs] for name, runs in found.items()}, peer=ONE)
        threads = {name: 2 // count for name, count in PROCESSES.items()}
        frame["waits"] = [
            statistics.median(1 - run[work]["cpu"] / threads[name] / run[work]["wall"] for run in runs)
            for name, runs in found.items()
        ]
        frame.insert(0, "work", work)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


@click.command(help=__doc__)
@click.option("--updates", default=6, show_default=True, help="Updates of the distillation, and one collection.")
@click.option("--images", default=48, show_default=True, help="Images of the evaluation.")
@click.option("--rounds", default=1, show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
@click.option("--work-in", type=click.Path(path_type=Path), default=None, hidden=True)
def main(updates: int, images: int, rounds: int, csv_path: Path | None, work_in: Path | None) -> None:
    if work_in is not None:
        from ddil_eval.cli.options import quiet_libraries

        quiet_libraries()
        work_here(updates, images, work_in)
        return
    show(measure(updates, images, rounds), csv_path)


def summary(frame: pd.DataFrame) -> list[Claim]:
    """Return a claim for each work: the seconds of two processes and of one."""
    claims = []
    for work, rows in frame.groupby("work", sort=False):
        by_name = rows.set_index("contender")
        two, one = by_name.loc[TWO], by_name.loc[ONE]
        claims.append(
            Claim(f"{work} in two processes, seconds", two.median_s, one.median_s, BAR, ratio=float(two.ratio))
        )
    return claims


if __name__ == "__main__":
    main()
