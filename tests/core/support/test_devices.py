"""Devices and dtypes by name."""

from __future__ import annotations

import pytest
import torch

from ddil_core.support.devices import DTYPES, choose_device, torch_dtype
from ddil_core.support.errors import WrongCommand

current: list[str] = []
"""The GPUs that became current, in their order."""


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)


def test_the_best_device_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 2)
    current.clear()
    assert [choose_device(name) for name in (None, "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    assert current == ["cuda:1"]  # where its streams and figures of memory are
    pretend_gpus(monkeypatch, 0)
    assert choose_device() == "cpu"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "tpu", ""])
def test_a_device_that_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend_gpus(monkeypatch, 0)
    with pytest.raises(WrongCommand) as error:
        choose_device(name)
    assert str(error.value) == f"this machine has no device {name!r}; leave out --device to take the best one"


def test_dtypes_have_short_and_full_names() -> None:
    full = [torch.float32, torch.bfloat16, torch.float16]
    assert [torch_dtype(name) for name in DTYPES] == [torch_dtype(name) for name in DTYPES.values()] == full
    with pytest.raises(WrongCommand) as error:
        torch_dtype("float64")
    assert str(error.value) == "the dtype 'float64' is not known; it may be one of float32, bfloat16, float16"
