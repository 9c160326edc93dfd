"""Two processes (gloo) give the student of one, and a stopped run can be resumed with as many or fewer processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ddil_core.distillation.distill import distill
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation.processes import gather_rows, own_rows, owners
from tests.core.closed_form import distance, normal
from tests.core.distillation.test_methods import UNET
from tests.pipelines import TEACHER, save_pipeline, without_weights

DDIL = {"collect_every": 4, "capacity": 512, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.2}]}
UNEVEN = DDIL | {"phases": [{"until": 1, "aggregated": 0.3, "p_teacher": 0.2}]}  # 2.4 states of a batch
BASE = {"batch_size": 8, "pool": 12, "warmup": 2, "save_every": 2, "learning_rate": 1e-3, "teacher_batch_size": 6}
REGRESSION = {"pairs": 7, "teacher_steps": 2, "updates": 2, "learning_rate": 2e-3, "weight": 0.5}
RUNS: dict[str, dict[str, Any]] = {
    "pd": {
        "method": "pd",
        "gradient_accumulation": 2,
        "convert": {"updates": 2},
        "stages": [{"steps": 4, "updates": 4}],
        "watch": {"every": 2, "prompts": 1, "images": 2},
        "ddil": DDIL,
    },
    "lcm": {"method": "lcm", "updates": 4, "w_embedding": 16, "pool": 130, "ddil": UNEVEN},  # three batches of images
    "dmd2": {"method": "dmd2", "updates": 4, "critic_updates": 1, "teacher_steps": 4, "gan": {}, "ddil": DDIL},
    "dmd2-simulated": {"method": "dmd2", "updates": 4, "critic_updates": 1, "gan": {}, "regression": REGRESSION}
    | {"gradient_accumulation": 2},
}
SHARDED: dict[str, dict[str, Any]] = {
    "lcm-sharded": RUNS["lcm"] | {"pool": 12, "stream": 0.5, "shard": True},
    "lora-sharded": {"method": "lcm", "updates": 2, "lora": {"rank": 4, "alpha": 4}, "ddil": DDIL, "shard": True}
    | {"watch": {"every": 1, "prompts": 1, "images": 2}},
    "dmd2-sharded": RUNS["dmd2-simulated"] | {"shard": True},
}
"""Runs whose networks two processes divide. One process divides nothing."""
RUNS |= SHARDED
STOPPED = {"dmd2": 2, "lcm": 1, "lcm-sharded": 1, "dmd2-sharded": 2}
"""Runs that stop after their third update, and how many processes take them up again at their second."""
SCRIPT = """
import json, os, sys
from pathlib import Path
from torch.nn.modules.module import register_module_forward_hook
from diffusers import UNet2DConditionModel
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation import consistency
from ddil_core.distillation import matching
from ddil_core.distillation.distill import distill
from ddil_core.data import pool
from ddil_core.support.errors import WrongCommand

pool.PART = 1  # so that both processes encode

class Stopped(Exception):
    pass

def stopping(update):
    def stops(stage, step):
        logs = update(stage, step)
        if step == 2:
            raise Stopped
        return logs
    return stops

teacher, out, runs, stopped = sys.argv[1], Path(sys.argv[2]), *map(json.loads, sys.argv[3:5])
stages = {"dmd2": matching.MatchingStage, "lcm": consistency.ConsistencyStage}
stages |= {f"{name}-sharded": stage for name, stage in stages.items()}
evaluated = dict.fromkeys(runs, 0)
def count(module, args, output):
    if isinstance(module, UNet2DConditionModel):
        evaluated[name] += len(output.sample)

register_module_forward_hook(count)
for name, told in runs.items():
    config = METHODS[told["method"]].config.model_validate(told)
    if name in stopped:
        update, stages[name].update = stages[name].update, stopping(stages[name].update)
        try:
            distill(teacher, "shapes", config, out / name, device="cpu")
        except Stopped:
            stages[name].update = update
    if stopped.get(name) != 1:
        distill(teacher, "shapes", config, out / name, device="cpu")
(out / f"rows-{os.environ['RANK']}.json").write_text(json.dumps(evaluated))
try:
    odd = METHODS["pd"].config.model_validate(runs["pd"] | {"batch_size": 6})
    distill(sys.argv[5], "shapes", odd, out / "odd", device="cpu")
except WrongCommand as error:
    (out / f"odd-{os.environ['RANK']}.txt").write_text(str(error))
"""


def config(name: str) -> Any:
    told = BASE | RUNS[name]
    return METHODS[told["method"]].config.model_validate(told)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("eps"), TEACHER, seed=1, prediction="epsilon")


@pytest.fixture(scope="module")
def together(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of two processes."""
    out = tmp_path_factory.mktemp("two")
    told = json.dumps({name: BASE | run for name, run in RUNS.items()})
    damaged = without_weights(shutil.copytree(teacher, tmp_path_factory.mktemp("damaged") / "pipeline"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*launch, sys.executable, "-c", SCRIPT, str(teacher), str(out), told, json.dumps(STOPPED), damaged],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def alone(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, int]]:
    """The folder of a run of one process, and how many rows its networks evaluated. One process divides nothing."""
    out = tmp_path_factory.mktemp("one")

    @cache
    def run(undivided: str) -> tuple[Path, int]:
        with rows_evaluated() as rows:
            distill(str(teacher), "shapes", config(undivided), out / undivided, device="cpu")
        return out / undivided, sum(rows)

    return lambda name: run("dmd2-simulated" if name == "dmd2-sharded" else name)


@contextmanager
def rows_evaluated() -> Iterator[list[int]]:
    """The rows of every evaluation of a U-Net."""
    seen: list[int] = []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, UNet2DConditionModel):
            seen.append(len(output.sample))

    hook = register_module_forward_hook(count)
    yield seen
    hook.remove()


def moved(out: Path, start: dict[str, Tensor]) -> Tensor:
    """By how much a student's weights differ from its teacher's, in one vector."""
    student = load_file(out / "student" / UNET)
    return torch.cat([(student[key] - start[key]).flatten() for key in start])


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_give_the_student_of_one(
    teacher: Path, together: Path, alone: Callable[[str], tuple[Path, int]], name: str
) -> None:
    """Adam amplifies rounding where a gradient is nearly zero, so the tolerance is 0.5 % of the change."""
    single, rows = alone(name)
    distill(str(teacher), "shapes", config(name), together / name, device="cpu")  # finishes what was stopped
    start = load_file(teacher / UNET)
    one, two = moved(single, start), moved(together / name, start)
    assert float(one.norm()) > 0
    assert distance(two, one) < 5e-3
    encoded = [out / "checkpoints" / "data.safetensors" for out in (single, together / name)]
    assert encoded[0].read_bytes() == encoded[1].read_bytes()
    assert not list(together.rglob("*.partial"))
    if name in STOPPED:
        return  # what it did again counts twice, and its lines are means since it was taken up
    for process in (0, 1):  # the first watches too, and what is less than a row for each is done by both
        share = json.loads((together / f"rows-{process}.json").read_text())[name] / rows
        assert 0.4 < share < 0.65
    ours, theirs = (
        [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (single, together / name)
    )
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one_line, two_line in zip(ours, theirs, strict=True):
        for key in one_line.keys() - {"stage", "watch"}:
            assert one_line[key] == pytest.approx(two_line[key], rel=1e-2, abs=1e-6), (name, key)


def test_divided_networks_end_as_whole_ones(
    teacher: Path, together: Path, alone: Callable[[str], tuple[Path, int]]
) -> None:
    """One DMD2 run by two processes with FSDP, by two with DDP, and by one. The shares are of the distance moved."""
    start = load_file(teacher / UNET)
    fsdp, ddp = (moved(together / f"dmd2-{kind}", start) for kind in ("sharded", "simulated"))
    one = moved(alone("dmd2-simulated")[0], start)
    pairs = {"FSDP and DDP": (fsdp, ddp), "FSDP and one process": (fsdp, one), "DDP and one process": (ddp, one)}
    apart = {name: distance(a, b) for name, (a, b) in pairs.items()}
    print(", ".join(f"{name}: {share:.3%} of the distance moved" for name, share in apart.items()))
    assert max(apart.values()) < 5e-3


def test_rows_are_divided_and_joined() -> None:
    alone = Accelerator(cpu=True)
    assert own_rows(alone, 5) == slice(0, None, 1)
    rows = torch.arange(5)
    assert torch.equal(gather_rows(alone, rows[own_rows(alone, 5)], owners(alone, 5)), rows)
    for count, parts in ((5, [[0, 3], [1, 4], [2]]), (2, [[0, 1]] * 3)):  # too few are done by each
        for index, own in enumerate(parts):
            some: Any = SimpleNamespace(num_processes=3, process_index=index)
            assert torch.arange(count)[own_rows(some, count)].tolist() == own


@pytest.mark.parametrize("owner", [[0, 1, 2, 0, 1], [2, 2, 0, 1, 2, 0], [1, 0, 2]])
def test_ragged_parts_are_gathered_in_their_places(owner: list[int]) -> None:
    """Every process sends as many rows as the largest part, and none of the filling arrives."""
    whole = normal(len(owner), 2, 3)
    places = torch.tensor(owner)
    own = [whole[places == process] for process in range(3)]
    most, sizes = max(map(len, own)), list[int]()

    def gather(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return torch.cat([torch.cat([rows, rows.new_full((most - len(rows), 2, 3), 7.0)]) for rows in own])

    for process in range(3):
        some: Any = SimpleNamespace(num_processes=3, process_index=process, gather=gather)
        assert torch.equal(gather_rows(some, own[process], places), whole)
        empty = gather_rows(some, own[process].new_empty(len(own[process]), 0), places)
        assert empty.shape == (len(owner), 0)
    assert sizes == [most] * 3  # what has no numbers is not sent


def test_a_batch_that_does_not_divide_is_refused_before_weights_are_read(together: Path) -> None:
    for process in (0, 1):
        assert (together / f"odd-{process}.txt").read_text() == (
            "batch_size is the whole batch, and 6 is not divisible by 2 processes with 2 parts each "
            "(gradient_accumulation); choose another batch_size or number of processes"
        )
    assert not (together / "odd").exists()
