"""What a user chooses for an export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What a user chooses for an export.

    Attributes:
        name: The name of the student, which its files get.
        checkpoint: The name of the base's checkpoint in ComfyUI, for a LoRA. None: not given.
    """

    name: str
    checkpoint: str | None = None
