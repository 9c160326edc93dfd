"""Check that numbers are finite before they become images, training data or measurements.

NaN becomes byte 0, so that an image of NaN is black and looks valid. NaN also fails every comparison, so that it can
win one. Sampling, rollouts, encoders and feature extraction all check here, and stop with one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ddil_core.support.devices import fetched
from ddil_core.support.errors import DdilError


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite. This waits for the device once."""
    flags = [torch.isfinite(tensor).all() for tensor in tensors]
    return not flags or bool(torch.stack(flags).all())


P = TypeVar("P")


class Finite(Generic[P]):
    """Watches tensors over many steps, and finds the first step at which a number is not finite.

    The check of each step stays on its device, and all results are read together. So a loop of steps never waits for a
    GPU. The type ``P`` is what a message needs to name a step.
    """

    def __init__(self) -> None:
        self._places: list[P] = []
        self._flags: list[Tensor] = []

    def see(self, place: P, values: Tensor) -> None:
        """Remember whether all of ``values`` are finite."""
        self._places.append(place)
        self._flags.append(torch.isfinite(values.detach()).all())

    def first_broken(self) -> P | None:
        """Return the first place with values that are not finite, or None. Then start anew."""
        places, flags = self._taken()
        return _first(places, [] if flags is None else flags.tolist())

    def begin_reading(self) -> Callable[[], P | None]:
        """Begin to read all results, and start anew. The returned function gives what ``first_broken`` would give.

        On a GPU, call the returned function after waiting for the work until now (``work_until_now``). It then waits
        for nothing that came later.
        """
        places, flags = self._taken()
        host = None if flags is None else fetched(flags)
        return lambda: _first(places, [] if host is None else host.tolist())

    def _taken(self) -> tuple[list[P], Tensor | None]:
        places, flags = self._places, self._flags
        self._places, self._flags = [], []
        return places, torch.stack(flags) if flags else None


def _first(places: list[P], fine: list[bool]) -> P | None:
    return next((place for place, one in zip(places, fine, strict=True) if not one), None)


Checks = Finite[Callable[[], DdilError]]
"""Checks of different things. Each place makes the error for values that are not finite there."""


def not_finite(what: str, place: str, whose: str, nets: Iterable[nn.Module | None]) -> DdilError:
    """Return the error for numbers that are not finite. Its message names the dtype and what to do.

    Args:
        what: The numbers, such as "the latents".
        place: The step, such as "after step 3 of 4".
        whose: The model or actor, such as "the model 'sd15'".
        nets: The networks that computed the numbers. Their weights are searched for NaN and infinities.
    """
    present = [net for net in nets if net is not None]
    dtype = next((p.dtype for net in present for p in net.parameters()), torch.float32)
    broken = next((weight for net in present if (weight := broken_weight(net)) is not None), None)
    if broken is not None:
        cure = (
            f"its weights hold such numbers too, first in {broken}, so fetch the model again, or train it again with a "
            "lower learning rate"
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
    """Return the name of the first weight that is not finite, or None. Of a divided network, look at the own share."""
    for name, weight in net.state_dict().items():
        own = weight.to_local() if hasattr(weight, "to_local") else weight
        if not torch.isfinite(own).all():
            return name
    return None
