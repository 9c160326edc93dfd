"""Networks that are not trained have no dropout, and evaluate at most ``teacher_batch_size`` states at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import GuidedDenoiser
from ddil_core.diffusion.parameterization import calibrate_reflection
from ddil_core.distillation.adapters import with_lora
from ddil_core.distillation.config import ConvertConfig, ProgressiveConfig
from ddil_core.distillation.consistency import ConsistencyStage, student_network
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.conversion import ConversionStage
from ddil_core.distillation.distill import distill
from ddil_core.distillation.dropout import evaluating
from ddil_core.distillation.matching import MatchingStage
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation.processes import slices
from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.distillation.regression import encode_pairs
from ddil_core.distillation.stage import Stage
from ddil_core.models.model import Model, load_model

DDIL = {"collect_every": 4, "capacity": 1024, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]}
LORA = {"lora": {"rank": 4, "alpha": 4}, "w_embedding": None}
CPU = Accelerator(cpu=True)
KINDS = ["pd", "lcm", "lcm-lora", "dmd2"]
SIZE = 3  # of a teacher's batch: divides nothing


def with_dropout(folder: Path, where: Path) -> Path:
    """A copy of a pipeline whose U-Net has dropout, and the same weights."""
    shutil.copytree(folder, where)
    net = UNet2DConditionModel.from_pretrained(folder / "unet")
    dropping = UNet2DConditionModel.from_config(dict(net.config) | {"dropout": 0.5})
    dropping.load_state_dict(net.state_dict())
    dropping.save_pretrained(where / "unet")
    return where


@pytest.fixture(scope="module")
def dropping(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_dropout(folder, tmp_path_factory.mktemp("dropping") / "pipeline")


@pytest.fixture(scope="module")
def dropper(dropping: Path) -> Model:
    return load_model(str(dropping))


def make(kind: str, model: Model, pool: LatentPool, ddil: bool | dict[str, Any] = True, **more: Any) -> Any:
    """A stage of one of ``KINDS``, with ``DDIL``, another configuration of it, or none."""
    told = {"updates": 8, "batch_size": 8, "warmup": 0, "ddil": (DDIL if ddil is True else ddil) or None} | more
    bound = calibrate_reflection(pool.mean.float()).to(model.device)
    if kind == "pd":
        stages = [{"steps": told.pop("teacher_steps", 4), "updates": told.pop("updates")}]
        progressive = ProgressiveConfig.model_validate(told | {"stages": stages})
        start = progressive.lora and with_lora(model.denoiser.net, progressive.lora)
        return ProgressiveStage(model.guided(3.0, bound), pool, progressive.stages[0], progressive, CPU, start=start)
    if kind == "dmd2":
        matching = MatchingConfig.model_validate({"critic_updates": 1, "teacher_steps": 4, "gan": {}} | told)
        start = matching.lora and with_lora(model.denoiser.net, matching.lora)
        return MatchingStage(model.guided(3.0, bound), pool, matching, CPU, start)
    settings = ConsistencyConfig.model_validate({"w_embedding": 16} | told | (LORA if kind == "lcm-lora" else {}))
    start = student_network(model.denoiser.net, settings)
    return ConsistencyStage(
        GuidedDenoiser(model.denoiser, model.nothing(), reflection=bound), pool, settings, CPU, start
    )


def drop_adapters(net: nn.Module) -> None:
    """Give a LoRA's adapters dropout, and values that make a difference."""
    for module in net.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.5)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_rollouts_have_no_dropout(dropper: Model, pool: LatentPool, kind: str) -> None:
    """The same weights and seed visit the same states, whatever torch's global generator holds."""
    collected = []
    for seed in (1, 2):
        trainer = make(kind, dropper, pool)
        if kind == "lcm-lora":
            drop_adapters(trainer.net)
        torch.manual_seed(seed)
        states, aggregated = trainer.source.draw(0)
        assert aggregated == 4
        assert all(module.training for module in trainer.net.modules())
        collected.append(states)
    for a, b in zip(collected[0].columns(), collected[1].columns(), strict=True):
        assert torch.equal(a, b)


def test_backward_simulation_and_what_a_critic_learns_from_have_no_dropout(dropper: Model, pool: LatentPool) -> None:
    trainer = make("dmd2", dropper, pool, ddil=False)
    losses = []
    with evaluating(trainer.critic):  # which is trained, and so has dropout of its own
        for seed in (1, 2):
            torch.manual_seed(seed)
            states = trainer.source.draw(0)[0]
            losses.append((states.z, next(trainer._critic_losses(states, 1)).detach()))
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_a_loras_target_has_no_dropout_and_its_training_has(dropper: Model, pool: LatentPool) -> None:
    trainer = make("lcm-lora", dropper, pool)
    drop_adapters(trainer.net)
    states, _ = trainer.source.draw(0)
    s = trainer.table[states.transition][:, 1]
    said, trained = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        told = trainer.student_condition(states.row, states.guidance)
        said.append(trainer._target(states.target, s, told))
        trained.append(trainer.student(states.z, trainer.times[states.transition], told).detach())
    assert torch.equal(*said) and not torch.equal(*trained)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_with_dropout_depends_on_its_number_alone(dropper: Model, pool: LatentPool, kind: str) -> None:
    """And it leaves torch's global generator where it was."""
    weights = []
    for seed in (1, 2):
        trainer = make(kind, dropper, pool)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        trainer.update(0)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append([p.detach() for p in trainer.net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


RUNS: dict[str, tuple[type[Stage], dict[str, Any]]] = {
    "pd": (ProgressiveStage, {"stages": [{"steps": 4, "updates": 4}]}),
    "lcm-lora": (ConsistencyStage, {"updates": 4} | LORA),
    "dmd2": (MatchingStage, {"updates": 4, "critic_updates": 1, "teacher_steps": 4, "gan": {}}),
}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize(("kind", "dtype"), [("pd", "float32"), ("lcm-lora", "float32"), ("dmd2", "bfloat16")])
def test_a_run_with_dropout_is_resumed_exactly(
    dropping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    owner, more = RUNS[kind]
    told = {"batch_size": 5, "pool": 12, "warmup": 0, "save_every": 2, "student_dtype": dtype, "ddil": DDIL} | more
    config = METHODS[kind.split("-")[0]].config.model_validate(told)
    distill(str(dropping), "shapes", config, tmp_path / "whole", device="cpu")
    update = owner.update

    def dies(stage: Stage, step: int) -> Any:
        if step == 3:
            raise Killed
        return update(stage, step)

    with monkeypatch.context() as patched:
        patched.setattr(owner, "update", dies)
        with pytest.raises(Killed):
            distill(str(dropping), "shapes", config, tmp_path / "killed", device="cpu")
    torch.manual_seed(99)
    distill(str(dropping), "shapes", config, tmp_path / "killed", device="cpu")
    ours, theirs = (
        load_file(tmp_path / name / "student/unet/diffusion_pytorch_model.safetensors") for name in ("killed", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_every_module_gets_its_own_mode_back() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.Dropout()).train()
    net[2].eval()
    with pytest.raises(ZeroDivisionError), evaluating(net):
        assert not any(module.training for module in net.modules())
        raise ZeroDivisionError
    assert [module.training for module in net] == [True, True, False]


def test_slices_hold_every_row_once() -> None:
    for count, size in ((7, 3), (6, 3), (2, 5), (0, 4)):
        parts = [list(range(count))[rows] for rows in slices(count, size)]
        assert [row for part in parts for row in part] == list(range(count))
        assert all(0 < len(part) <= size for part in parts)


@contextmanager
def rows_seen(*nets: nn.Module, with_gradient: bool = False) -> Iterator[list[int]]:
    """The rows of every evaluation of some networks: those without gradient, unless all are wanted."""
    seen: list[int] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if with_gradient or not torch.is_grad_enabled():
            seen.append(len(args[0]))

    hooks = [net.register_forward_pre_hook(look) for net in nets]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("ddil", "parts"), [(True, 2), (False, 1)], ids=["DDIL", "data"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_evaluation_without_gradient_takes_more_states(
    model: Model, pool: LatentPool, kind: str, ddil: bool, parts: int
) -> None:
    """A guided teacher evaluates two rows of a state."""
    trainer = make(kind, model, pool, ddil, teacher_batch_size=SIZE, gradient_accumulation=parts)
    others = [trainer.net] if trainer.ema is None else [trainer.net, trainer.ema.module]
    others += [trainer.unwrapped(trainer.critic).denoiser.net] if kind == "dmd2" else []
    with rows_seen(trainer.teacher.network.net, with_gradient=True) as teacher, rows_seen(*others) as untrained:
        for step in range(2):
            trainer.update(step)
    assert max(teacher) == 2 * SIZE
    assert max(untrained, default=0) <= SIZE


def test_nor_does_one_for_a_conversion_or_a_regressions_pairs(model: Model, pool: LatentPool, tmp_path: Path) -> None:
    config = ProgressiveConfig.model_validate(
        {"stages": [{"steps": 4, "updates": 1}], "batch_size": 8, "teacher_batch_size": SIZE}
    )
    teacher = GuidedDenoiser(model.denoiser)
    convert = ConversionStage(teacher, model.nothing(), pool, ConvertConfig(updates=2), config, CPU)
    with rows_seen(model.denoiser.net, with_gradient=True) as seen:
        convert.update(0)
    assert (max(seen), sum(seen)) == (SIZE, 8)
    told = {"updates": 1, "batch_size": 8, "teacher_batch_size": SIZE}
    pairs = MatchingConfig.model_validate(told | {"regression": {"pairs": 8, "teacher_steps": 2, "updates": 1}})
    with rows_seen(model.denoiser.net, with_gradient=True) as seen:
        encode_pairs(model.guided(3.0), pool, pairs, tmp_path / "pairs.safetensors", CPU)
    assert (max(seen), sum(seen)) == (2 * SIZE, 8 * 2 * 2)


@pytest.mark.parametrize("kind", ["lcm", "dmd2"])
def test_the_bound_does_not_change_what_is_learnt(model: Model, pool: LatentPool, kind: str) -> None:
    losses = [
        float(make(kind, model, pool, ddil, teacher_batch_size=size).update(0)["loss"])
        for ddil in (True, False)
        for size in (SIZE, 64)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[2] == pytest.approx(losses[3], rel=1e-4)
