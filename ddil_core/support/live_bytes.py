"""Count the bytes of the tensors that are alive, and the most of them at once, on any device and without a driver."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations read or make inside the context.

    Tensors that share a storage count once, and a storage counts until it is freed. Memory that the kernels of a device
    take for themselves does not count. The tensors may be fake (``torch._subclasses.fake_tensor``): then nothing is
    allocated.

    Attributes:
        live: The bytes that are alive now.
        peak: The most bytes that were alive at once.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        """``ignored`` are tensors that exist already, and whose storages do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._storages = dict[int, int]()
        for tensor in ignored:
            self._see(tensor, counted=False)

    def _see(self, tensor: Tensor, *, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        self._storages[key] = storage.nbytes() if counted else 0
        weakref.finalize(storage, self._freed, key)
        self.live += self._storages[key]
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int) -> None:
        self.live -= self._storages.pop(key)

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return result
