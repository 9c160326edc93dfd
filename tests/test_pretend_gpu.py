"""The pretended GPU refuses what a real one refuses, and counts what makes its host wait."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.pretend_gpu import PretendedGpu, pretended


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with pretended() as gpu:
        yield gpu


def test_tensors_say_where_they_are_and_compute_what_the_host_computes(gpu: PretendedGpu) -> None:
    torch.manual_seed(0)
    net, rows = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1)), torch.randn(5, 3)
    twin = copy.deepcopy(net)
    net.to(device="cuda")
    there = rows.to("cuda")
    assert {p.device.type for p in net.parameters()} == {"cuda"} and rows.device.type == "cpu"
    assert {p.device.type for p in copy.deepcopy(net).parameters()} == {"cuda"}
    for one, given in ((net, there), (twin, rows)):
        optimizer = torch.optim.AdamW(one.parameters(), fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            one(given).square().mean().backward()
            nn.utils.clip_grad_norm_(one.parameters(), 0.1)
            optimizer.step()
    assert net[0].weight.grad is not None and net[0].weight.grad.is_cuda
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.cpu(), b)
    assert torch.zeros(2, device="cuda").is_cuda and torch.zeros_like(there).is_cuda and not torch.zeros(2).is_cuda


def test_tensors_of_the_host_and_of_the_gpu_do_not_mix(gpu: PretendedGpu) -> None:
    there, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    for mix in (lambda: there + here, lambda: torch.cat([there, here]), lambda: nn.Linear(3, 1)(there)):
        with pytest.raises(RuntimeError, match="takes tensors of one device"):
            mix()
    assert (there + torch.tensor(1.0)).is_cuda  # a number is no tensor of the host
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, generator=torch.Generator(), device="cuda")


@pytest.mark.parametrize("what", [
    "there.cpu()", "there.sum().item()", "bool(there.all())", "there.tolist()", "there[there > 0]", "there[[0, 1]]",
    "there[torch.tensor([0, 1])]", "there.nonzero()", "torch.tensor([1.0], device='cuda')", "torch.ones(3).to('cuda')",
    "torch.ones(3).to('cuda', non_blocking=True)", "torch.ones(3).copy_(there, non_blocking=True)",
    "torch.cuda.synchronize()",
])  # fmt: skip
def test_what_waits_is_counted_and_refused_on_demand(gpu: PretendedGpu, what: str) -> None:
    names = {"torch": torch, "there": torch.ones(3, device="cuda")}
    eval(what, names)
    assert len(gpu.waits) == 1
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="the host waits for the GPU"):
        eval(what, names)


def test_what_does_not_wait_is_not_counted(gpu: PretendedGpu) -> None:
    there, places = torch.ones(3, device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    torch.empty(3, pin_memory=True).copy_(there, non_blocking=True)
    there[places], there[1:], there.index_select(0, places), torch.where(there > 0, there, 0.0)
    with torch.cuda.stream(torch.cuda.Stream()):
        there.cpu()
    assert gpu.waits == []


def test_a_copy_holds_nonsense_until_it_is_waited_for(gpu: PretendedGpu) -> None:
    there, host = torch.arange(3.0, device="cuda"), torch.empty(3, pin_memory=True)
    host.copy_(there, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    assert host.isnan().all()
    done.synchronize()
    assert host.tolist() == [0, 1, 2] and len(gpu.waits) == 1
    later = torch.empty(3, pin_memory=True)
    later.copy_(there, non_blocking=True)
    done.synchronize()  # which was recorded before
    assert later.isnan().all()
    torch.cuda.synchronize()
    assert later.tolist() == [0, 1, 2]


def test_the_source_of_a_copy_must_not_change_before(gpu: PretendedGpu) -> None:
    source = torch.ones(3).pin_memory()
    source.to("cuda", non_blocking=True)
    source.add_(1)
    with pytest.raises(RuntimeError, match="changed before"):
        torch.cuda.synchronize()


def test_the_work_of_another_stream_must_be_waited_for(gpu: PretendedGpu) -> None:
    there, other = torch.ones(3, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(other):
        more = there + 1
    with pytest.raises(RuntimeError, match="of another stream is not waited for"):
        more + 1
    torch.cuda.current_stream().wait_stream(other)
    assert (more + 1).tolist() == [3, 3, 3]


def test_afterwards_there_is_no_gpu() -> None:
    before = torch.cuda.is_available()
    with pretended():
        assert torch.cuda.is_available()
        there = torch.ones(2, device="cuda")
    assert torch.cuda.is_available() == before
    assert there.device.type == "cpu" and (there + torch.ones(2)).tolist() == [2, 2]
