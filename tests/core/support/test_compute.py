"""How models compute: names of number formats, and the one switch of float32 products for all threads."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.support.compute import FP32, Compute, with_network_dtypes, without_defaults
from ddil_core.support.environment import deterministic, float32_precision, full_precision
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.protocol import validate

PD = {"stages": [{"steps": 4, "updates": 1}]}


def switched() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_a_dtype_has_one_name(dtype: torch.dtype | str) -> None:
    assert Compute.of(dtype) == Compute("bf16") and Compute("bf16").torch_dtype is torch.bfloat16


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(WrongCommand, match="^the dtype 'int8' is not known; it may be one of fp32, bf16, fp16$"):
        Compute("int8")


def test_hashes_hold_only_settings_that_are_no_defaults() -> None:
    assert FP32.changed() == {}
    assert Compute("fp16", compile=True).changed() == {"dtype": "fp16", "compile": True}
    older = {"seed": 1, "teacher_dtype": "float32"}
    assert without_defaults(older | {"dtype": "fp32", "tf32": False, "compile": False}) == older
    assert without_defaults(older | {"dtype": "bf16"}) == older | {"dtype": "bf16"}


def test_tf32_needs_a_gpu() -> None:
    Compute(tf32=True).require_device(torch.device("cuda"))
    expected = "^TF32 is arithmetic of NVIDIA's GPUs, and the device is cpu; leave out --tf32$"
    with pytest.raises(WrongCommand, match=expected):
        Compute(tf32=True).require_device(torch.device("cpu"))


def test_the_networks_of_a_distillation_take_the_dtype_unless_they_have_their_own() -> None:
    plain, low = (validate(ProgressiveConfig, PD | more, "the test") for more in ({}, {"dtype": "bfloat16"}))
    assert (plain.dtype, plain.teacher_dtype, plain.student_dtype) == ("fp32", "float32", "float32")
    assert (low.dtype, low.teacher_dtype, low.student_dtype) == ("bf16", "bfloat16", "bfloat16")
    own = validate(ProgressiveConfig, PD | {"dtype": "bf16", "student_dtype": "float32"}, "the test")
    assert (own.teacher_dtype, own.student_dtype) == ("bfloat16", "float32")
    assert with_network_dtypes({"dtype": "int8"}) == {"dtype": "int8"}  # validation refuses it later


def test_training_in_float16_is_refused() -> None:
    expected = "training in fp16 needs its losses scaled, which is not done here; take bf16"
    with pytest.raises(WrongCommand, match=expected):
        validate(ProgressiveConfig, PD | {"dtype": "fp16"}, "the test")


def test_the_innermost_context_of_a_thread_decides_and_torchs_own_setting_comes_back() -> None:
    before = switched()
    with full_precision():
        with float32_precision(tf32=True):
            assert switched() == ("tf32", "tf32")
        assert switched() == ("ieee", "ieee")
    assert switched() == before


def test_a_thread_that_ends_first_leaves_the_precision_of_the_other() -> None:
    entered, leave, before = threading.Event(), threading.Event(), switched()

    def other() -> None:
        with full_precision():
            entered.set()
            leave.wait(10)

    with full_precision():
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)  # both share full precision
    assert switched() == ("ieee", "ieee")  # this thread has left, the other computes
    leave.set()
    thread.join(10)
    assert switched() == before


def test_a_thread_waits_while_another_computes_in_another_precision() -> None:
    seen = list[tuple[str, str]]()

    def metric() -> None:
        with full_precision():
            seen.append(switched())

    thread = threading.Thread(target=metric)
    with float32_precision(tf32=True):
        thread.start()
        thread.join(0.2)
        assert seen == [] and switched() == ("tf32", "tf32")
    thread.join(10)
    assert seen == [("ieee", "ieee")]


def flags() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark, workspace


@pytest.mark.parametrize("workspace", [None, ":16:8", ":0:0"])
def test_deterministic_algorithms_hold_inside_the_context_alone(
    monkeypatch: pytest.MonkeyPatch, workspace: str | None
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    before, config = flags(), validate(ProgressiveConfig, PD, "the test")
    assert not config.compute.deterministic and not config.compute.changed()
    with deterministic():
        assert flags() == (2, True, False, ":16:8" if workspace == ":16:8" else ":4096:8")
        assert config.compute.changed() == {"deterministic": True}  # work that is under way is not mixed
    assert flags() == before


def test_an_operation_without_a_deterministic_algorithm_is_one_sentence() -> None:
    before = flags()
    expected = (
        "^put_ does not have a deterministic implementation.*; leave out --deterministic, or take another device$"
    )
    with pytest.raises(DdilError, match=expected), deterministic():
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    assert flags() == before


@pytest.mark.gpu
def test_a_deterministic_update_gives_the_same_bits_on_a_gpu() -> None:
    """Backward through a convolution, attention and an embedding, whose sums differ from run to run without it."""

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        conv, table = torch.nn.Conv2d(8, 64, 3).cuda(), torch.nn.Embedding(7, 64).cuda()
        tokens = torch.randint(7, (64, 512), device="cuda")
        keys = table(tokens)[:, None]
        queries = conv(torch.randn(64, 8, 18, 18, device="cuda")).flatten(2).mT[:, None]
        torch.nn.functional.scaled_dot_product_attention(queries, keys, keys).square().sum().backward()
        return [conv.weight.grad, table.weight.grad]  # type: ignore[list-item]

    with deterministic():
        first = gradients()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
