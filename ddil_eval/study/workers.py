"""Worker processes: each takes one task after another. A task that fails, or kills its process, stops no other task."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from ddil_core.support.ending import PATIENCE, Interrupted, listen, stop_with
from ddil_core.support.errors import DdilError

T = TypeVar("T")
ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Each worker computes on one core. Threads of several workers would wait for each other."""


def run_tasks(tasks: Sequence[T], work: Callable[[T], None], jobs: int, logs: Path) -> Iterator[tuple[T, str | None]]:
    """Do tasks in worker processes. Yield each finished task with its error in a sentence, or None.

    Where the caller stops early, the workers are told to stop, and save what they can.

    Args:
        tasks: The tasks. They and ``work`` can be pickled.
        work: Does one task.
        jobs: The number of worker processes.
        logs: The folder for what the workers print.
    """
    waiting, workers = deque(tasks), list[_Worker[T]]()
    logs.mkdir(parents=True, exist_ok=True)
    try:
        for number in range(min(jobs, len(tasks))):
            workers.append(_Worker(work, logs / f"worker-{number}.log", waiting.popleft()))
        while workers:
            ready = set(wait([worker.connection for worker in workers]))
            for worker in [worker for worker in workers if worker.connection in ready]:
                task, error = worker.task, worker.answer()
                if waiting:
                    worker.give(waiting.popleft())
                else:
                    workers.remove(worker)
                    worker.end()
                yield task, error
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(PATIENCE)
            worker.process.kill()


class _Worker(Generic[T]):
    """A worker process and its present task. A process that died is replaced when it gets the next task."""

    def __init__(self, work: Callable[[T], None], log: Path, task: T) -> None:
        self.work, self.log = work, log
        self._start()
        self.give(task)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.work, self.log, os.getpid()))
        with _environment(ONE_CORE):
            self.process.start()
        theirs.close()

    def give(self, task: T) -> None:
        if not self.process.is_alive():
            self._start()
        self.task = task
        self.connection.send(task)

    def answer(self) -> str | None:
        """Return the error of the task in a sentence, or None."""
        try:
            error: str | None = self.connection.recv()
            return error
        except (EOFError, OSError):
            self.process.join()
            return f"its process ended with exit status {self.process.exitcode}; see {self.log}"

    def end(self) -> None:
        self.connection.close()
        self.process.join()


def _serve(connection: Connection, work: Callable[[Any], None], log: Path, parent: int) -> None:
    """Do the tasks that come through a connection, until it is closed. Answer each with its error or None."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal reaches the command alone, which then stops its workers
    stop_with(parent)
    with log.open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    listen()
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError, Interrupted):
            return
        try:
            work(task)
            connection.send(None)
        except DdilError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            connection.send(str(error))
        except Interrupted:
            return
        except Exception as error:
            traceback.print_exc()
            connection.send(f"{type(error).__name__}: {error}; see {log}")


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that start in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
