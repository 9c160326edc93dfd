"""Whether numbers are finite: asked here, before they become pictures, training data or measurements.

NaN is cast to byte 0, so that a picture of NaN is black and looks like any other; it fails every comparison, and so it can win one.
Whatever draws, rolls out, encodes or extracts asks here and stops with one sentence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ddil_core.support.errors import DdilError


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or an infinity. This waits for the device, once."""
    flags = [torch.isfinite(tensor).all() for tensor in tensors]
    return not flags or bool(torch.stack(flags).all())


P = TypeVar("P")


class Finite(Generic[P]):
    """Watches tensors over many steps: whether each is finite is found on its device, and read for all of them together.

    So a loop of steps never waits for a GPU, and yet it is known at which step a number was first not finite. A place ``P`` is
    whatever a message needs to name a step.
    """

    def __init__(self) -> None:
        self._places: list[P] = []
        self._flags: list[Tensor] = []

    def see(self, place: P, values: Tensor) -> None:
        """Remember whether all of ``values`` are finite."""
        self._places.append(place)
        self._flags.append(torch.isfinite(values.detach()).all())

    def first_broken(self) -> P | None:
        """The first place whose values were not finite, None where all were; what was seen is forgotten."""
        if not self._flags:
            return None
        flags = torch.stack(self._flags).tolist()
        broken = next((place for place, fine in zip(self._places, flags, strict=True) if not fine), None)
        self._places, self._flags = [], []
        return broken


def not_finite(what: str, place: str, whose: str, nets: Iterable[nn.Module | None]) -> DdilError:
    """The error that says that ``what`` of ``whose`` is not finite, where, in which dtype, and what to do.

    ``nets`` are the networks that computed it; they are searched for weights that are not finite.
    """
    present = [net for net in nets if net is not None]
    dtype = next((p.dtype for net in present for p in net.parameters()), torch.float32)
    broken = next((found for net in present if (found := broken_weight(net)) is not None), None)
    if broken is not None:
        cure = (
            f"its weights hold such numbers too, first in {broken}, so fetch the model again, or train it again with a lower "
            "learning rate"
        )
    elif dtype == torch.float16:
        cure = "float16 has no number above 65,504, so compute in bfloat16 or float32"
    else:
        cure = (
            "its weights or settings are too large for its arithmetic, so lower the guidance scale or check the model"
        )
    name = str(dtype).removeprefix("torch.")
    return DdilError(f"{what} of {whose}, computed in {name}, are not finite (NaN or infinity) {place}: {cure}")


def broken_weight(net: nn.Module) -> str | None:
    """The name of the first weight that holds NaN or an infinity; None where all are finite."""
    return next((name for name, weight in net.state_dict().items() if not torch.isfinite(weight).all()), None)
