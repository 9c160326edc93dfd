"""``ddil eval`` in several processes, as torchrun starts them, gives the numbers of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

from ddil_core.models.generate import begin_images
from ddil_core.support import ranks
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_eval.cli.options import choose_device
from ddil_eval.experiments import image_sources
from ddil_eval.report.records import Record, read_records
from tests.counted import Counted

Cli = Callable[..., Result]
PICTURES, BATCH = 24, 4


def arguments(student: Path, out: Path) -> list[str]:
    settings = (f"batch_size={BATCH}", "reference_images=32", "metrics=[fd_efflite0, drawn_right]")
    words = ("eval", "systems", "--model", student, "--data", "shapes", "--num-images", PICTURES, "--steps", 2, "--save-images",
             "--device", "cpu", "--out", out)  # fmt: skip
    return [str(word) for word in words] + [word for setting in settings for word in ("--set", setting)]


def launched(processes: int, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m",
               "ddil_eval.cli", *words]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "DDIL_PROGRESS_EVERY": "0.2"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in the order in which a process of torchrun has them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_the_numbers_of_one(
    cli: Cli, student: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that one process began and two finish has the pictures, features and values of one process's run."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli(*arguments(student, one)).exit_code == 0
    monkeypatch.setattr(image_sources, "begin_images", Counted(allowed=1, of=begin_images))
    assert cli(*arguments(student, two)).exit_code == 130
    result = launched(2, root, *arguments(student, two))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Records are in") == 1  # the other process says nothing
    assert result.stderr.count(f"{PICTURES // 2} of {PICTURES // 2} (100%)") <= 1  # and shows no share of its own
    (alone,), (together,) = read_records(one), read_records(two)
    assert (together.identity(), together.device) == (alone.identity(), "2 × cpu")
    found, expected = features(two), features(one)
    assert found.keys() == expected.keys() == {"efflite0", "drawn_right"}
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    assert kept(two) == kept(one) and len(kept(two)) == PICTURES + 3  # the index, how they were made, and checksums
    assert list(two.rglob("*.npz")) == []
    for name, numbers in estimates(alone).items():
        assert estimates(together)[name] == pytest.approx(numbers, rel=1e-10, abs=1e-10)


def features(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path) for path in (out / "features").rglob("*.npy")}


def kept(out: Path) -> dict[Path, bytes]:
    return {path.relative_to(out): path.read_bytes() for path in (out / "images").rglob("*") if path.is_file()}


def estimates(record: Record) -> dict[str, tuple[float, float, float]]:
    found = {name: metric.estimate for name, metric in record.metrics.items()}
    return {name: (estimate.value, estimate.low, estimate.high) for name, estimate in found.items()}


@pytest.fixture
def second_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_three")
def test_work_is_dealt_out_by_its_place() -> None:
    assert list(ranks.mine(8)) == [1, 4, 7] and list(ranks.mine(1)) == []
    assert not ranks.is_main() and ranks.described("cuda:1") == "3 × cuda"


def test_one_process_has_all_the_work_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks.barrier()
    assert list(ranks.mine(3)) == [0, 1, 2] and ranks.is_main() and ranks.described("cuda") == "cuda"


@pytest.mark.usefixtures("second_of_three")
def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert choose_device(None) == choose_device("cuda") == "cuda:1"
    assert choose_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(WrongCommand) as error:
        choose_device(None)
    assert str(error.value) == (
        "process 2 of this machine (counted from 0) has no GPU: the machine has 2; start as many processes as there "
        "are GPUs"
    )


@pytest.mark.usefixtures("second_of_three")
def test_what_runs_in_one_process_says_so(cli: Cli, tmp_path: Path) -> None:
    result = cli("eval", "prompt-inversion", "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: prompt inversion runs in one process, and 3 were started; start it by itself\n"


@pytest.mark.usefixtures("second_of_three")
def test_a_process_that_the_others_have_left_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def barrier(self, options: object) -> None:
            raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(ranks, "_groups", [Gone()])
    with pytest.raises(DdilError) as error:
        ranks.barrier()
    assert str(error.value) == (
        "process 1 of 3 waits in vain for the others (Connection closed by peer); see what they said, and run the same command "
        "again to go on"
    )


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "x"}, "the environment variable RANK is 'x', which is no whole number of at least 0; "),
        ({"WORLD_SIZE": "0"}, "the environment variable WORLD_SIZE is '0', which is no whole number of at least 1; "),
        ({"LOCAL_RANK": "-1"}, "the environment variable LOCAL_RANK is '-1', which is no whole number of at least 0; "),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "the environment variable RANK is 2, and WORLD_SIZE is 2; "),
    ],
)
def test_environment_variables_that_number_no_process(
    environment: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WrongCommand) as error:
        ranks.require_valid()
    assert str(error.value) == f"{sentence}unset it, or start the processes with torchrun"
