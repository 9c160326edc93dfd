"""Worker processes: one core each; a task that fails or kills its process stops no other task."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

from ddil_core.support.errors import DdilError
from ddil_eval.study.workers import run_tasks

LONG = 120.0
"""Seconds of the task that is stopped."""


def work(task: str) -> None:
    print("worked on", task, flush=True)
    if task == "wrong":
        raise DdilError("the task is wrong; do another")
    if task == "faulty":
        raise ZeroDivisionError("a fault")
    if task == "long":
        time.sleep(LONG)
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_failed_tasks_are_named_and_the_others_are_done(tmp_path: Path) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    tasks = ["a", "wrong", "killed", "faulty", "b", "c"]
    errors = dict(run_tasks(tasks, work, 2, tmp_path))
    assert set(errors) == set(tasks)
    assert errors["wrong"] == "the task is wrong; do another"
    assert "exit status -9" in str(errors["killed"])
    assert str(errors["faulty"]).startswith("ZeroDivisionError: a fault")
    assert [errors[name] for name in "abc"] == [None] * 3
    logged = "".join(path.read_text() for path in tmp_path.glob("worker-*.log"))
    assert all(f"worked on {task}" in logged for task in tasks)
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_a_caller_that_stops_stops_the_workers(tmp_path: Path) -> None:
    tasks = run_tasks(["a", "long", "c"], work, 1, tmp_path)
    assert next(tasks) == ("a", None)
    started = time.monotonic()
    tasks.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < LONG / 2
    assert not multiprocessing.active_children()
    assert "worked on c" not in (tmp_path / "worker-0.log").read_text()
