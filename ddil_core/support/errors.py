"""Errors that a user can correct. The message is one sentence: what is wrong, where, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence


class DdilError(Exception):
    """The work failed. A command ends with exit status 1 and without a traceback."""

    exit_status = 1


class Missing(DdilError):
    """Several things are missing. A command prints each on a line of its own.

    Attributes:
        parts: A sentence on each, in order.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__("; ".join(parts))
        self.parts = tuple(parts)


class WrongCommand(DdilError):
    """A command, option or configuration is wrong. A command ends with exit status 2 and without a traceback."""

    exit_status = 2


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means too little memory, on any device. The function does not import torch."""
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, MemoryError) or on_device or "DefaultCPUAllocator" in str(error)
