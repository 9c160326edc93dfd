"""The rollout engine under observation."""

from __future__ import annotations

from typing import Any

from ddil_core.rollout import rollout


class Counted:
    """The rollout engine, counting its chunks, and interrupted where it would begin one more than allowed."""

    def __init__(self, allowed: int | None = None) -> None:
        self.allowed, self.chunks = allowed, 0

    def __call__(self, *args: Any, **settings: Any) -> Any:
        if self.chunks == self.allowed:
            raise KeyboardInterrupt
        self.chunks += 1
        return rollout(*args, **settings)
