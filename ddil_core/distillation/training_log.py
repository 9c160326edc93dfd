"""The log of a stage: means over updates and processes, and updates that were skipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_text
from ddil_core.support.outside import parse_json
from ddil_core.support.progress import warn

Logs = dict[str, Tensor | float]
"""The log of an update: numbers, or pairs [2] of a sum and its weight. The weight may be 0.

The number under ``SKIPPED`` is 1 where the update changed no weights, and 0 or missing otherwise.
"""

SKIPPED = "skipped"


class Window:
    """The logs since the last line. A checkpoint holds them, so that the first line of a resumed run is whole."""

    def __init__(self) -> None:
        self.in_a_row = 0
        """How many updates were skipped one after another, up to the last."""
        self.longest = 0
        """The most updates that were skipped one after another, among those that were last read."""
        self._sums: dict[str, Tensor] = {}
        self._new: list[Logs] = []

    def add(self, logs: Logs) -> None:
        """Remember the log of an update. Tensors stay on their device."""
        self._new.append(logs)

    def read(self) -> None:
        """Bring the new logs to the host. This waits for the device."""
        if not self._new:
            return
        skipped = _on_host([logs.get(SKIPPED, 0.0) for logs in self._new]) > 0
        for key in self._new[0]:
            values = _on_host([logs[key] for logs in self._new])
            pairs = torch.stack([values, torch.ones_like(values)], 1) if values.dim() == 1 else values
            if key != SKIPPED:
                pairs = torch.where(skipped[:, None], 0.0, pairs)
            total = self._sums.get(key, torch.zeros(2, dtype=torch.float64))
            for pair in pairs:  # one by one, so that the sum does not depend on how often it was read
                total = total + pair
            self._sums[key] = total
        self.longest = self.in_a_row
        for flag in skipped.tolist():
            self.in_a_row = self.in_a_row + 1 if flag else 0
            self.longest = max(self.longest, self.in_a_row)
        self._new = []

    def join(self, accelerator: Accelerator | None) -> dict[str, float]:
        """Add up the sums of all processes, which the main process then holds. The others begin anew.

        Returns:
            The mean of each key over updates and processes. A key with the weight 0 is left out.
        """
        self.read()
        keys = sorted(self._sums)
        sums = torch.stack([self._sums[key] for key in keys])
        if accelerator is not None and accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
            held = sums if accelerator.is_main_process else torch.zeros_like(sums)
            self._sums = dict(zip(keys, held, strict=True))
        return {key: float(total / weight) for key, (total, weight) in zip(keys, sums, strict=True) if float(weight)}

    def clear(self) -> None:
        """Begin a new line. The updates skipped in a row are still counted."""
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self.in_a_row = dict(state["sums"]), int(state["in_a_row"])


def _on_host(values: list[Tensor | float]) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values]).cpu()


def require_finite(means: Mapping[str, float], title: str, step: int, kept: str) -> None:
    """Refuse to go on where a loss or a gradient's norm is not finite. The keys end with "loss" or "gradient_norm".

    Args:
        means: The means of a line of the log.
        title: What messages call the stage.
        step: The number of updates done.
        kept: Says which checkpoint is kept.

    Raises:
        DdilError: one is NaN or infinite.
    """
    for key, mean in means.items():
        if key.endswith(("loss", "gradient_norm")) and not math.isfinite(mean):
            raise DdilError(
                f"the {key.replace('_', ' ')} of the stage {title!r} is not finite at update {step}: begin "
                f"another run (another --out) with a lower learning_rate or gradient_clip; {kept}"
            )


def require_progress(window: Window, title: str, step: int, limit: int, kept: str) -> None:
    """Refuse to go on where ``limit`` updates in a row were skipped. For the other arguments see ``require_finite``.

    Raises:
        DdilError: they were.
    """
    if window.longest >= limit:
        raise DdilError(
            f"{window.longest} updates of the stage {title!r} in a row were skipped by update {step}, because their "
            "loss or their gradient's norm was not finite, or the norm was above skip_above: begin another run "
            f"(another --out) with a lower learning_rate or gradient_clip; {kept}"
        )


def forget_after(step: int, title: str, log: Path) -> None:
    """Remove the lines of a stage after update ``step`` from the log, because these updates are done again.

    Damaged lines go too, with a warning. The run does not depend on its log.

    Raises:
        DdilError: the log cannot be read or written.
    """
    if not log.exists():
        return
    try:
        lines = log.read_bytes().split(b"\n")
    except OSError as error:
        raise DdilError(f"the log {log} cannot be read ({error.strerror}); move it away to go on without it") from error
    entries = [(line, _entry(line)) for line in lines[:-1]]
    damaged = sum(entry is None for _, entry in entries)
    if damaged:
        warn(f"{damaged} of {len(entries)} lines of the log {log} are damaged and were removed")
    kept = [line for line, entry in entries if entry is not None and (entry[0] != title or entry[1] <= step)]
    if kept != lines[:-1] or lines[-1]:  # a kill can leave half a line at the end
        write_text(log, "".join(line.decode() + "\n" for line in kept))


def _entry(line: bytes) -> tuple[str, int] | None:
    """Return the stage and the step of a line of the log; None for a damaged line."""
    try:
        entry = parse_json(line)
        return str(entry["stage"]), int(entry["step"])
    except (ValueError, TypeError, KeyError):
        return None
