"""Two commands on one folder, and commands that a signal stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from ddil_core.support.lock import LOCK
from tests.core.support.test_lock import HOLDER

COMMANDS = {
    "sample": ("sample", "--model", "TEACHER", "--prompt", "a small red circle"),
    "demo": ("demo",),
    "distill": ("distill", "--teacher", "TEACHER", "--set", "pool=64"),
    "coco": (
        "eval",
        "coco",
        "--model",
        "TEACHER",
        "--data",
        "shapes",
        "--num-images",
        "4",
        "--set",
        "metrics=[drawn_right]",
    ),
    "covariate shift": ("eval", "covariate-shift", "--teacher", "TEACHER", "--student", "TEACHER"),
    "prompt inversion": ("eval", "prompt-inversion"),
}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A folder that another process holds, and that process."""
    out = tmp_path_factory.mktemp("held") / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield out, process.pid
    process.kill()
    process.wait()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_command_on_a_folder_is_one_sentence(
    name: str, held: tuple[Path, int], teacher: Path, cli: Callable[..., Result]
) -> None:
    out, pid = held
    words = [str(teacher) if word == "TEACHER" else word for word in COMMANDS[name]]
    result = cli(*words, "--device", "cpu", "--out", out)
    assert (result.exit_code, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: the folder {out} is in use by process {pid} on ")
    assert [path.name for path in out.iterdir()] == [LOCK]


def test_a_stopped_command_leaves_nothing_half_done(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    words = ("sample", "--model", teacher, "--prompt", "a circle", "--steps", 900, "--num-images", 16, "--out", out)
    process = subprocess.Popen(
        [sys.executable, "-m", "ddil_eval.cli", *map(str, words), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    while not (out / LOCK).is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, "")
    sentence = "stopped by SIGTERM: what was finished is kept; run the same command again to go on"
    assert errors.splitlines()[-1] == sentence and "Traceback" not in errors
    assert not out.exists()
