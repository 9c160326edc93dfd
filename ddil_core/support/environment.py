"""Requirements on the installed packages, the precision of float32 products, and deterministic algorithms."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddil_core.support.errors import DdilError

_REINSTALL = "install the two of one build together: pip install --force-reinstall torch torchvision (same index)"
_WORKSPACE, _WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""The variable that fixes the memory of NVIDIA's library of products, and the values with which it is deterministic."""
_LIBRARIES = ("_C_stable.*", "_C.*")
"""Torchvision's compiled operators, in recent versions and in older ones."""


def cores() -> int:
    """Return the number of CPU cores that this process may use: a cluster often grants a part of a machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_torchvision() -> None:
    """Import torchvision. Call this before the import of a package that needs it (timm, open_clip, lpips).

    A torchvision for another build of torch, such as a CUDA build beside a CPU-only torch, fails during its import:
    either with "operator torchvision::nms does not exist", or because it cannot load a library.

    Raises:
        DdilError: torchvision is not installed, or does not fit the installed torch.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise DdilError("torchvision is not installed; install it with: pip install torchvision") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise _does_not_fit(error) from error


def check_torchvision() -> None:
    """Check that torchvision fits the installed torch, and import torch alone, which takes half the time.

    The function loads torchvision's compiled operators as its import does. Where it finds none, it imports torchvision.

    Raises:
        DdilError: torchvision is not installed, or does not fit the installed torch.
        ImportError: torch cannot be imported.
    """
    import torch

    found = find_spec("torchvision")
    folder = Path(found.origin).parent if found is not None and found.origin is not None else None
    libraries = [] if folder is None else [path for name in _LIBRARIES for path in sorted(folder.glob(name))]
    if not libraries:
        return require_torchvision()
    try:
        torch.ops.load_library(libraries[0])
        theirs = int(torch.ops.torchvision._cuda_version())  # 13000 for 13.0, and -1 for a build for CPUs
    except (AttributeError, OSError, RuntimeError) as error:
        raise _does_not_fit(error) from error
    ours = torch.version.cuda
    if ours is not None and theirs != -1 and theirs // 1000 != int(ours.split(".")[0]):
        raise _does_not_fit(RuntimeError(f"torch is for CUDA {ours}, torchvision for CUDA {theirs // 1000}"))


def _does_not_fit(error: Exception) -> DdilError:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # of a library, what it lacks
    reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    return DdilError(f"torchvision does not fit the installed torch ({reason}); {_REINSTALL}")


class _Float32Precision:
    """The switch of float32 products, which is one for the whole process, as contexts of several threads need it.

    Threads that want the same precision share it. A thread that wants another one waits until no other thread computes.
    In the innermost context of a thread, its precision holds. After the last context, torch has its own setting again.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._held: dict[int, list[str]] = {}
        self._before: list[str] = []

    def enter(self, precision: str) -> None:
        with self._turn:
            self._wait(precision)
            if not self._held:
                self._before = [switch.fp32_precision for switch in _switches()]
            self._held.setdefault(threading.get_ident(), []).append(precision)
            self._set(precision)

    def leave(self) -> None:
        with self._turn:
            mine = self._held[threading.get_ident()]
            mine.pop()
            if mine:
                self._wait(mine[-1])
                self._set(mine[-1])
                return
            del self._held[threading.get_ident()]
            if not self._held:
                for switch, value in zip(_switches(), self._before, strict=True):
                    switch.fp32_precision = value
            self._turn.notify_all()

    def _wait(self, precision: str) -> None:
        me = threading.get_ident()
        self._turn.wait_for(lambda: all(held[-1] == precision for other, held in self._held.items() if other != me))

    def _set(self, precision: str) -> None:
        for switch in _switches():
            switch.fp32_precision = precision
        self._turn.notify_all()


def _switches() -> tuple[Any, Any]:
    import torch

    return torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]


_FLOAT32 = _Float32Precision()


@contextmanager
def float32_precision(*, tf32: bool) -> Iterator[None]:
    """Compute float32 products and convolutions of a GPU in TF32 inside the context, or in float32.

    Restore the setting afterwards. The setting is one for the whole process: a thread that needs the other one waits.
    """
    _FLOAT32.enter("tf32" if tf32 else "ieee")
    try:
        yield
    finally:
        _FLOAT32.leave()


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products and convolutions in float32, not in TF32, on any device (`float32_precision`)."""
    with float32_precision(tf32=False):
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    """Use only algorithms inside the context that give the same bits each time on the same device.

    On a GPU, some algorithms add up in an order that differs from run to run. Enter the context before anything is
    computed on the GPU. The settings are those of the whole process, and are restored afterwards.

    Raises:
        DdilError: an operation has no deterministic algorithm on this device.
    """
    import torch

    cudnn, workspace = torch.backends.cudnn, os.environ.get(_WORKSPACE)
    before = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark
    if workspace not in _WORKSPACES:
        os.environ[_WORKSPACE] = _WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).partition(". ")[0]
        raise DdilError(f"{reason}; leave out --deterministic, or take another device") from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
        else:
            os.environ[_WORKSPACE] = workspace


def is_deterministic() -> bool:
    """Whether this process uses deterministic algorithms alone (:func:`deterministic`)."""
    import torch

    return torch.are_deterministic_algorithms_enabled()
