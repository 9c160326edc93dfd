"""What the machine must offer, and one sentence with the cure where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ddil_core.support.errors import DdilError

_REINSTALL = "install the two of one build together: pip install --force-reinstall torch torchvision (same index)"


def require_torchvision() -> None:
    """Import torchvision; call this before a package that needs it (timm, open_clip, lpips).

    A torchvision made for another build of torch, such as a CUDA one beside a CPU-only torch, fails while it is
    imported with "operator torchvision::nms does not exist", or on a library that it cannot load.

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
    """Float32 that is float32: no TF32 inside matrix products and convolutions, on any device; restored afterwards."""
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
