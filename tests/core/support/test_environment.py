"""What the machine grants."""

from __future__ import annotations

import os

import pytest

from ddil_core.support.environment import cores


def test_the_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster grants a part of a machine. Where a system cannot say which, all cores count."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8}, raising=False)
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cores() == 64
