"""A function that counts its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddil_core.diffusion.rollout import rollout_latents


class Counted:
    """Counts the calls of a function (the rollout engine), and raises KeyboardInterrupt after ``allowed`` calls."""

    def __init__(self, allowed: int | None = None, of: Callable[..., Any] = rollout_latents) -> None:
        self.allowed, self.of, self.chunks = allowed, of, 0

    def __call__(self, *args: Any, **settings: Any) -> Any:
        if self.chunks == self.allowed:
            raise KeyboardInterrupt
        self.chunks += 1
        return self.of(*args, **settings)
