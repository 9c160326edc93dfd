"""What all tests share: markers that skip with a reason, the command-line runner, the material kept elsewhere."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download fails at once and says so
_CACHE = tempfile.TemporaryDirectory(prefix="ddil-tests-")
os.environ["DDIL_CACHE"] = _CACHE.name  # no test reads or writes the user's own folder
os.environ.pop("COLUMNS", None)  # readline sets it in the main process of pytest, and its workers inherit it
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core each: threads of several workers would wait for each other
gc.set_threshold(20_000)  # the collector looks less often through all that torch and transformers hold

LONGEST = (
    "core/distillation/test_processes.py",
    "core/models/test_computing.py",
    "cli/test_processes.py",
    "cli/test_recreate.py",
    "docs/test_commands.py",
    "test_guides.py",
    "eval/study/test_study.py",
    "test_your_own_teacher.py",
    "faults/test_faults.py",
    "test_stranger.py",
    "core/shapes/training/test_train.py",
    "core/distillation/test_lost_work.py",
    "core/distillation/test_run.py",
    "eval/experiments/test_prompt_inversion.py",
)
"""Files that take longest. Workers take them first, so that all workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    for marker, reason in (("gpu", no_gpu), ("weights", no_weights)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        why = reason() if marked else None
        for item in marked if why else []:
            item.add_marker(pytest.mark.skip(reason=str(why)))


def no_gpu() -> str | None:
    """Why tests marked ``gpu`` cannot run here, or None."""
    import torch

    return None if torch.cuda.is_available() else "no CUDA device here"


def no_weights() -> str | None:
    """Why tests marked ``weights`` cannot run here, or None."""
    index = ROOT / "ddil_core" / "shapes" / "weights" / "teacher" / "model_index.json"
    return None if index.is_file() else "the shipped shapes weights are not in this checkout"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder that ``DDIL_SHARED`` names: the reference tables and material too large for the repository."""
    folder = Path(os.environ.get("DDIL_SHARED", ""))
    if "DDIL_SHARED" not in os.environ or not folder.is_dir():
        pytest.skip("DDIL_SHARED names no folder")
    return folder


@pytest.fixture(scope="session", autouse=True)
def models_on_the_cpu() -> Iterator[None]:
    """Let ``load_model`` choose the CPU by default on a machine with a GPU too, so that tests compute the same."""
    from ddil_core.models import model
    from ddil_core.support.devices import choose_device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "choose_device", lambda name: choose_device(name or "cpu"))
        yield


@pytest.fixture
def a_gpu() -> Iterator[None]:
    """A GPU: the machine's, or a pretended one (``tests.pretend_gpu``)."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from tests.pretend_gpu import pretended

    AcceleratorState._reset_state(reset_partial_state=True)
    with nullcontext() if torch.cuda.is_available() else pretended():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Run ``ddil`` with the given arguments in this process; a fault of the program is raised, not swallowed."""
    from ddil_eval.cli import ddil

    def run(*args: object, command: click.Command = ddil) -> Result:
        return CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=False)

    return run
