"""No update waits for the device: what is made ahead is the same, batches have few shapes, a teacher is rounded once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser
from ddil_core.distillation.autocast import rounded_for_autocast
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.distill import distill
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.run import Run
from ddil_core.distillation.steady import Steady, steady
from ddil_core.distillation.transfer import Ahead
from ddil_core.models.model import Model, load_model
from ddil_core.support.devices import sent
from tests.core.closed_form import distance, normal
from tests.core.distillation import test_dropout
from tests.core.distillation.test_dropout import KINDS, make

CPU = torch.device("cpu")


def test_what_is_made_ahead_is_the_same_and_made_in_another_thread() -> None:
    made: list[tuple[int, str]] = []

    def make_it(step: int) -> int:
        made.append((step, threading.current_thread().name))
        return step**2

    ahead = Ahead(make_it, CPU)
    assert not ahead.enabled and ahead.take(3, 4) == 9 and [step for step, _ in made] == [3]
    ahead.enabled = True
    assert [ahead.take(step, step + 1) for step in (4, 5, 9, 2)] == [16, 25, 81, 4]  # 9 and 2 were not foreseen
    assert ahead.take(3, None) == 9
    here = threading.current_thread().name
    assert [step for step, where in made if where == here] == [3, 4, 9, 2]
    assert {step for step, where in made if where != here} == {5, 6, 10, 3}


def test_a_fault_of_what_is_made_ahead_is_raised_where_it_is_taken() -> None:
    def make_it(step: int) -> int:
        return 1 // (2 - step)

    ahead = Ahead(make_it, CPU)
    ahead.enabled = True
    assert ahead.take(1, 2) == 1
    with pytest.raises(ZeroDivisionError):
        ahead.take(2, None)


@pytest.mark.parametrize("ddil", [True, False], ids=["DDIL", "data"])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_that_draw_ahead_are_the_same_to_the_bit(model: Model, pool: LatentPool, kind: str, ddil: bool) -> None:
    plain, early = (make(kind, model, pool, ddil, batch_size=5, teacher_batch_size=3) for _ in range(2))
    early.source.ahead.enabled = True
    if kind == "dmd2":
        early.ahead.enabled = True
    for step in range(2):
        a, b = plain.update(step), early.update(step)
        assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert all(torch.equal(a, b) for a, b in zip(plain.net.parameters(), early.net.parameters(), strict=True))


def test_nothing_is_drawn_ahead_of_the_end(model: Model, pool: LatentPool) -> None:
    """With a stream it would encode images while the student is saved."""
    stage = make("dmd2", model, pool, False, batch_size=5)
    stage.ahead.enabled = stage.source.ahead.enabled = True
    for step in range(stage.updates):
        stage.update(step)
    assert stage.ahead._made is stage.source.ahead._made is None


def test_a_steady_denoiser_sees_multiples_and_returns_the_rows(model: Model) -> None:
    sizes: list[int] = []
    hook = model.denoiser.net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    teacher = GuidedDenoiser(model.denoiser, model.nothing(), 1.0)
    filled = Steady(teacher, 4)
    texts = model.encode(["a small red circle", "a large blue star"] * 4)
    for count in (1, 3, 4, 7, 8):
        rows = torch.arange(count)
        z, t = normal(count, *model.latent_shape), torch.linspace(10, 990, count).long()
        guidance = torch.linspace(1, 4, count)
        told = Condition(texts.rows(rows).tensors, guidance)
        sizes.clear()
        with torch.no_grad():
            found = filled(z, t, told)
            assert sizes == [2 * (-(-count // 4) * 4)]  # guided: two rows each
            assert found.shape == z.shape and distance(found, teacher(z, t, told)) < 1e-5
    hook.remove()
    assert filled.nfe == 2 and filled.network is model.denoiser and filled.schedule is teacher.schedule
    assert steady(teacher, CPU, 64) is teacher  # filling only costs here
    on_gpu: Any = steady(teacher, torch.device("cuda"), 64)
    assert on_gpu.rows == 8


class Copies(TorchDispatchMode):
    """The names of the weights that are copied into another dtype."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.names = {weight.data_ptr(): name for name, weight in net.named_parameters()}
        self.copied: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.names:
            self.copied.append(self.names[args[0].data_ptr()])
        return func(*args, **(kwargs or {}))


def autocast_output(denoiser: Any, z: Tensor, t: Tensor, told: Condition) -> tuple[Tensor, list[str]]:
    """The output under autocast of bfloat16, and the weights that were copied for it."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Copies(denoiser.net) as copies:
        return denoiser.output(z, t, told), copies.copied


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_copies_no_weight_of_a_frozen_teacher(model: Model, dtype: str) -> None:
    z, t = normal(3, *model.latent_shape), torch.tensor([20, 500, 999])
    told = model.encode(["a small red circle"] * 3)
    settings = {"stages": [{"steps": 4, "updates": 1}], "mixed_precision": "bf16", "teacher_dtype": dtype}
    some: Any = SimpleNamespace(device=CPU)
    run = Run(model, pool=None, config=ProgressiveConfig.model_validate(settings), data="", out=None, accelerator=some)  # type: ignore[arg-type]
    before = model.denoiser if dtype == "float32" else copy.deepcopy(model.denoiser).bfloat16()
    expected, copied = autocast_output(before, z, t, told)
    assert bool(copied) == (dtype == "float32")
    found, copied = autocast_output(run.frozen(model.denoiser.net), z, t, told)
    assert torch.equal(found, expected) and copied == []
    assert all(weight.dtype == torch.float32 for weight in model.denoiser.net.parameters())


def test_a_teacher_outside_of_autocast_stays_in_float32(model: Model) -> None:
    """As the teacher of a regression's pairs: a rounded net would mix bfloat16 and float32 there."""
    settings = {"stages": [{"steps": 4, "updates": 1}], "mixed_precision": "bf16"}
    some: Any = SimpleNamespace(device=CPU)
    run = Run(model, pool=None, config=ProgressiveConfig.model_validate(settings), data="", out=None, accelerator=some)  # type: ignore[arg-type]
    exact = run.frozen(model.denoiser.net, under_autocast=False)
    assert {weight.dtype for weight in exact.net.parameters()} == {torch.float32}


@pytest.fixture
def mixed() -> Iterator[None]:
    """Accelerate's state anew, so that a run may have another precision. Afterwards it is as before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)


@pytest.mark.usefixtures("mixed")
def test_mixed_precision_leaves_the_pairs_of_a_regression_as_they_are(folder: Path, tmp_path: Path) -> None:
    pairs = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = {
            "updates": 1, "timesteps": [399], "critic_updates": 1, "pool": 8, "batch_size": 2,
            "regression": {"pairs": 4, "teacher_steps": 2, "updates": 1}, "mixed_precision": precision,
        }  # fmt: skip
        out = tmp_path / precision
        distill(str(folder), "shapes", MatchingConfig.model_validate(settings), out, device="cpu")
        pairs.append(load_file(out / "checkpoints" / "pairs.safetensors")["x0"])
    assert torch.equal(*pairs)


def test_only_what_autocast_rounds_is_rounded() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    kinds = [{weight.dtype for weight in layer.parameters()} for layer in rounded_for_autocast(net)]  # type: ignore[attr-defined]
    assert kinds == [{torch.bfloat16}, {torch.float32}] * 2


def test_a_look_reads_the_pool_once(pool: LatentPool) -> None:
    data = LatentPool(pool.mean, pool.std, pool.condition)
    figures = data.figures
    mean = pool.mean.float()
    assert torch.equal(figures.mean, mean.mean((0, 2, 3))) and torch.equal(figures.deviation, mean.std((0, 2, 3)))
    pairs = [float((mean[i] - mean[i + 1]).norm()) for i in range(0, len(mean) - 1, 2)]
    assert float(figures.apart) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    assert data.figures is figures


@pytest.fixture
def on_gpu(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's processes on the GPU, for the stages of ``make``."""
    monkeypatch.setattr(test_dropout, "CPU", Accelerator())


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("ddil", [True, False], ids=["DDIL", "data"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_on_a_gpu_waits_for_nothing(folder: Path, pool: LatentPool, kind: str, ddil: bool) -> None:
    """Between two collections. torch raises at whatever waits for the device."""
    trainer = make(kind, load_model(str(folder), "cuda"), pool, ddil, teacher_batch_size=4)
    trainer.update(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.update(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_sent_is_the_same() -> None:
    rows = normal(4, 3)
    assert sent(rows, CPU) is rows
