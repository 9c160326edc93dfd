"""Threads that work on images give what one thread gives."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from ddil_core.support.side_by_side import MOST, side_by_side

IMAGES = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)


def test_results_come_in_order_from_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    met, names = threading.Barrier(2, timeout=60), set()

    def work(image: np.ndarray) -> int:
        names.add(threading.current_thread().name)
        if image[0, 0, 0] in (0, 4):
            met.wait()  # the first two images are worked on at once
        return int(image.sum())

    assert side_by_side(work, IMAGES) == [int(image.sum()) for image in IMAGES]
    assert 2 <= len(names) <= 4


def test_an_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda image: 1 // int(image[0, 0, 0] - 12), IMAGES)
    assert side_by_side(len, IMAGES[:0]) == []


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not say which cores a process has")
def test_each_process_of_a_machine_takes_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes one thread where torchrun began several processes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    met = threading.Barrier(3, timeout=60)
    assert side_by_side(lambda image: met.wait() >= 0, IMAGES[:3]) == [True] * 3 and MOST > 3
