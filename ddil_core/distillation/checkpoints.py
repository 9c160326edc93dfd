"""The checkpoints of a stage. The last ones are kept, each with a checksum, and the newest that is whole is read."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ddil_core.support import ranks
from ddil_core.support.checksums import checksum_of, delete_with_checksum, require_checksum, with_checksum
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_torch
from ddil_core.support.progress import note, warn

AGAIN = "to start this stage again"
NEWER = ("random", "window")
"""What a checkpoint of an earlier version lacks."""


class Stateful(Protocol):
    """Anything that a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class CheckpointError(DdilError):
    """No checkpoint of a stage can be read. The message says why, and what to do."""


class Checkpoints:
    """The checkpoints of a stage, in the files ``NAME.STEP.pt``.

    A checkpoint of an earlier version is in ``NAME.pt``. It has no checksum and is read after all others.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        """``path`` is ``NAME.pt``, without a step. ``keep`` is the number of checkpoints that are kept."""
        self.path, self.keep = path, keep

    def files(self) -> dict[int, Path]:
        """Return the files by their step, the newest first. The step of an earlier version's file is -1."""
        if not self.path.parent.is_dir():
            return {}
        name = re.compile(rf"{re.escape(self.path.stem)}\.(\d+)\.pt")
        found = {int(match[1]): path for path in self.path.parent.iterdir() if (match := name.fullmatch(path.name))}
        if self.path.is_file():
            found[-1] = self.path
        return dict(sorted(found.items(), reverse=True))

    def file_of(self, step: int) -> Path:
        """Return the file of the checkpoint of a step."""
        return self.path.with_name(f"{self.path.stem}.{step}.pt")

    def save(self, step: int, stateful: Mapping[str, Stateful], **told: Any) -> None:
        """Write a checkpoint whole or not at all, and then delete those that are not kept.

        The main process writes it. The others give their shares where they divide networks.

        Args:
            step: The number of updates done.
            stateful: What the checkpoint holds, by name.
            told: What the checkpoint says beside it.

        Raises:
            DdilError: the disk does not take the file. The checkpoints before it are kept.
        """
        content = {"step": step, **told, **{name: item.state_dict() for name, item in stateful.items()}}
        if not ranks.is_main():
            return
        write_torch(self.file_of(step), content, writing=with_checksum)
        earlier = [path for at, path in self.files().items() if at <= step]
        for path in earlier[self.keep :]:
            delete_with_checksum(path)

    def load(self, stateful: Mapping[str, Stateful]) -> int:
        """Load the newest checkpoint that is whole into ``stateful``. A warning names each one that is damaged.

        Returns:
            Its step, or 0 where there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and each is damaged or belongs to other models.
            DdilError: a part of the checkpoint does not fit the settings.
        """
        damaged: dict[Path, str] = {}
        for path in self.files().values():
            try:
                step = _load(path, stateful)
            except CheckpointError as error:
                damaged[path] = str(error)
                continue
            for bad, why in damaged.items():
                warn(f"the checkpoint {bad} cannot be read ({why}); the stage goes on from {path.name}, update {step}")
            return step
        if damaged:
            (first, why), *others = damaged.items()
            and_others = "".join(f", and {path.name} neither" for path, _ in others)
            them = "them" if others else "it"
            raise CheckpointError(f"the checkpoint {first} cannot be read ({why}){and_others}; delete {them} {AGAIN}")
        return 0

    def kept(self) -> str:
        """Say which checkpoint is kept, for the end of a message."""
        newest = next(iter(self.files().values()), None)
        return "no checkpoint was saved before" if newest is None else f"the checkpoint {newest.name} before it is kept"

    def delete(self) -> None:
        """Delete all checkpoints of the stage, with their checksums."""
        for path in self.files().values():
            delete_with_checksum(path)
        if self.path.parent.is_dir():  # a kill can leave a checksum alone
            for checksum in self.path.parent.glob("*.pt.sha256"):
                if not checksum.with_suffix("").exists():
                    checksum.unlink()


def _load(path: Path, stateful: Mapping[str, Stateful]) -> int:
    """Load one checkpoint. Raises CheckpointError with the reason alone, or a DdilError of a part."""
    try:
        if not require_checksum(path, "the checkpoint", AGAIN):
            note(f"the checkpoint {path} has no checksum, because an earlier version wrote it; it is read unchecked")
    except DdilError as error:
        raise CheckpointError(f"it does not match its checksum {checksum_of(path).name}") from error
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        present = {name: item for name, item in stateful.items() if name in saved or name not in NEWER}
        states = {name: saved[name] for name in present}
        for name, item in present.items():
            item.load_state_dict(states[name])
        return int(saved["step"])
    except DdilError:
        raise
    except Exception as error:  # torch and pickle have errors of many kinds for a damaged file
        raise CheckpointError(type(error).__name__) from error


class RandomStates:
    """The global random generators of Python, NumPy and torch, of the main process.

    This project draws from none of them in an update. A method of another package may. In a run of several processes
    the other ones keep the state with which they start.
    """

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        kind, keys, *rest = np.random.get_state(legacy=True)
        return {
            "python": [version, list(words), gauss],
            "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not ranks.is_main():
            return
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
