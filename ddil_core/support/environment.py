"""Requirements on the installed packages, and full precision in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ddil_core.support.errors import DdilError

_REINSTALL = "install the two of one build together: pip install --force-reinstall torch torchvision (same index)"


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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DdilError(f"torchvision does not fit the installed torch ({reason}); {_REINSTALL}") from error


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products and convolutions in float32, not in TF32, on any device.

    Restore the setting afterwards.
    """
    import torch

    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
