"""Runs that are killed after an update, and students that are compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@contextmanager
def killed_after(kind: Any, step: int, index: int | str | None = None) -> Iterator[None]:
    """Expect that what happens here is killed after an update of a kind of stage, before its checkpoint is saved.

    ``index`` is that of the stage; None is any.
    """
    update = kind.update

    def dies(stage: Any, now: int) -> Any:
        logs = update(stage, now)
        if now == step and index in (None, stage.index):
            raise Killed
        return logs

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(kind, "update", dies)
        yield


def same_weights(file: str, one: Path, other: Path) -> bool:
    """Whether the students of two run folders have the same tensors in a file."""
    ours, theirs = (load_file(out / "student" / file) for out in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
