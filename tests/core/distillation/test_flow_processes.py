"""Two processes (gloo) train a transformer of a flow, which has constant buffers and times that bfloat16 cannot hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ddil_core.distillation.distill import distill
from ddil_core.distillation.methods import METHODS
from tests.core.closed_form import distance
from tests.pipelines import save_pipeline

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
BASE: dict[str, Any] = {"batch_size": 6, "pool": 12, "warmup": 2, "learning_rate": 1e-3, "teacher_batch_size": 1}
UNEVEN = {"collect_every": 4, "capacity": 512, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.4}]}
RUNS: dict[str, dict[str, Any]] = {
    "dmd2": BASE
    | {"method": "dmd2", "updates": 4, "critic_updates": 1, "timesteps": [999, 749, 499, 249], "batch_size": 2},
    "pd": BASE | {"method": "pd", "stages": [{"steps": 4, "updates": 3}], "ddil": UNEVEN},
}
"""Runs whose processes evaluate the student unequally often in rollouts."""
SCRIPT = """
import copy, json, sys
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from ddil_core.distillation.distill import distill
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation.sharding import shard
from ddil_core.models.model import load_model
from ddil_core.support import ranks

joined = DistributedDataParallel.forward
def forward(net, *args, **settings):
    assert not net.will_sync_module_buffers()  # it would wait for the other process, which may not come
    return joined(net, *args, **settings)

DistributedDataParallel.forward = forward
teacher, out, runs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
for name, told in runs.items():
    distill(teacher, "shapes", METHODS[told["method"]].config.model_validate(told), out / name, device="cpu")
model = load_model(teacher, "cpu")
exact, condition = model.denoiser, model.encode(["a small red circle"])
z, t = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([954.545])
outputs = []
for net in (copy.deepcopy(exact.net).bfloat16(), shard(copy.deepcopy(exact.net), torch.bfloat16)):
    seen = []
    net.time_text_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
    with torch.no_grad():
        outputs.append(type(exact)(net, exact.schedule, exact.prediction).output(z, t, condition))
    assert torch.equal(seen[0], exact.schedule.network_time(t)), seen
if ranks.is_main():
    torch.save(outputs, out / "outputs.pt")
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sampling = {"solver": "flow_euler", "steps": None, "guidance_scale": 2.0}
    return save_pipeline(tmp_path_factory.mktemp("flow"), sampling, seed=1, layout="StableDiffusion3Pipeline")


@pytest.fixture(scope="module")
def together(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of two processes. Where one waits for the other, they end by a timeout."""
    out = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*launch, sys.executable, "-c", SCRIPT, str(teacher), str(out), json.dumps(RUNS)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_give_the_student_of_one(teacher: Path, together: Path, name: str, tmp_path: Path) -> None:
    distill(
        str(teacher), "shapes", METHODS[RUNS[name]["method"]].config.model_validate(RUNS[name]), tmp_path, device="cpu"
    )
    start, one, two = (
        load_file(folder / WEIGHTS) for folder in (teacher, tmp_path / "student", together / name / "student")
    )
    moved = [torch.cat([(end[key] - start[key]).flatten() for key in start]) for end in (one, two)]
    assert float(moved[0].norm()) > 0 and distance(moved[1], moved[0]) < 5e-3


def test_a_divided_network_in_bfloat16_gives_the_output_of_a_whole_one(together: Path) -> None:
    """Both see the exact time; 954.545 would be 956 in bfloat16. The whole one also rounds its buffers."""
    whole, divided = torch.load(together / "outputs.pt", weights_only=True)
    assert distance(divided, whole) < 2e-2
