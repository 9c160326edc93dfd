"""A LoRA by every method: what is trained, what is shared, what is saved, and a killed run that goes on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from click.testing import Result
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import nn

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import Condition
from ddil_core.distillation.adapters import own_copy, take_base, with_lora
from ddil_core.distillation.autocast import rounded_for_autocast
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.distill import distill
from ddil_core.distillation.lora_config import LoraConfig
from ddil_core.distillation.matching import MatchingStage
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.distillation.regression import RegressionStage
from ddil_core.distillation.stage import Stage
from ddil_core.models.loading import load_pipeline
from ddil_core.models.model import Model, load_model
from ddil_core.models.system_specs import Files
from ddil_core.support.errors import WrongCommand
from ddil_core.support.plain_yaml import load_plain
from tests.core.closed_form import distance, normal
from tests.core.distillation.kills import killed_after, same_weights
from tests.pipelines import TEACHER, save_pipeline

SMALL = {"rank": 2, "alpha": 4}
DDIL = {"uses": 2, "collect_every": 3, "capacity": 512, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]}
BASE = {"batch_size": 4, "pool": 12, "warmup": 2, "save_every": 2, "learning_rate": 1e-3, "lora": SMALL}
STAGES = [{"steps": 4, "updates": 3}, {"steps": 2, "updates": 3}]
RUNS: dict[str, dict[str, Any]] = {
    "pd": {"method": "pd", "stages": STAGES, "keep_stages": True, "ddil": DDIL},
    "pd-eps": {"method": "pd", "stages": STAGES},
    "dmd2": {
        "method": "dmd2",
        "updates": 3,
        "critic_updates": 1,
        "teacher_steps": 4,
        "gan": {},
        "regression": {"pairs": 8, "teacher_steps": 2, "updates": 3},
        "ddil": DDIL,
    },
}
KILLS: dict[str, list[tuple[type[Stage], int | str]]] = {
    "pd": [(ProgressiveStage, 1)],
    "dmd2": [(RegressionStage, "regression"), (MatchingStage, "dmd2")],
}
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def teachers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    eps = save_pipeline(tmp_path_factory.mktemp("eps"), TEACHER, seed=1, prediction="epsilon")
    return lambda name: eps if name == "pd-eps" else folder


@pytest.fixture(scope="module", params=list(RUNS))
def finished(
    request: pytest.FixtureRequest, teachers: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("adapters") / request.param
    distill(str(teachers(request.param)), "shapes", BASE | RUNS[request.param], out, device="cpu")
    return request.param, out


def adapters(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in net.named_parameters() if "lora_" in name}


def pointers(net: nn.Module, *, trained: bool) -> set[int]:
    return {weight.data_ptr() for name, weight in net.named_parameters() if ("lora_" in name) == trained}


def matching(model: Model, pool: LatentPool, **more: Any) -> MatchingStage:
    told = {"updates": 4, "critic_updates": 1, "batch_size": 4, "warmup": 0, "learning_rate": 1e-2, "gan": {}}
    config = MatchingConfig.model_validate(told | {"lora": SMALL} | more)
    assert config.lora is not None
    start = with_lora(model.denoiser.net, config.lora)
    return MatchingStage(model.guided(3.0), pool, config, Accelerator(cpu=True), start, model.denoiser.net)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generator_and_critic_are_two_adapters_on_one_base(dtype: str, model: Model, pool: LatentPool) -> None:
    trainer = matching(model, pool, student_dtype=dtype)
    net, critic = trainer.net, trainer.critic.denoiser.net
    assert pointers(net, trained=False) == pointers(critic, trained=False)
    assert not pointers(net, trained=True) & pointers(critic, trained=True)
    shared = pointers(net, trained=False) & pointers(model.denoiser.net, trained=False)
    assert shared == (pointers(net, trained=False) if dtype == "float32" else set())  # a rounded base is no teacher
    teacher = {name: weight.detach().clone() for name, weight in model.denoiser.net.named_parameters()}
    base = {name: weight.detach().clone() for name, weight in net.named_parameters() if "lora_" not in name}
    assert {weight.dtype for weight in base.values()} == {getattr(torch, dtype)}
    before = {name: weight.detach().clone() for name, weight in trainer.weights[trainer.critic].weights.items()}
    assert all("lora_" in name or name.startswith("head.") for name in before)
    for step in range(2):
        trainer.update(step)
    after = dict(net.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in base.items())
    assert all(torch.equal(weight, teacher[name]) for name, weight in model.denoiser.net.named_parameters())
    assert not any(weight.requires_grad or weight.grad is not None for name, weight in after.items() if name in base)
    moved = [name for name, w in trainer.weights[trainer.critic].weights.items() if not torch.equal(w, before[name])]
    assert any("lora_B" in name for name in moved) and any(name.startswith("head.") for name in moved)
    ours = adapters(net)
    assert not any(torch.equal(ours[name], weight) for name, weight in adapters(critic).items() if "lora_B" in name)
    kept = {part: set(state.state_dict()) for part, state in trainer.stateful().items() if part in ("net", "critic")}
    assert all("lora_" in name or name.startswith("head.") for names in kept.values() for name in names)


@pytest.mark.parametrize(("method", "dtype"), [("lcm", "fp32"), ("tcd", "bf16"), ("dmd2", "bf16")])
def test_a_run_has_the_teachers_weights_once_in_memory(folder: Path, tmp_path: Path, method: str, dtype: str) -> None:
    """Also where both are bfloat16. The finished LoRA is merged into weights that nothing has rounded."""
    shared, begin = list[bool](), Stage.__init__

    def watched(stage: Stage, *args: Any, **more: Any) -> None:
        begin(stage, *args, **more)
        shared.append(pointers(stage.net, trained=False) == pointers(stage.teacher.network.net, trained=False))

    told = RUNS["dmd2"] if method == "dmd2" else {"method": method, "updates": 1}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stage, "__init__", watched)
        distill(str(folder), "shapes", BASE | {"dtype": dtype} | told, tmp_path / "run", device="cpu")
    assert shared == [True] * (2 if method == "dmd2" else 1)
    teacher, student = (load_model(str(path)).denoiser.net.state_dict() for path in (folder, tmp_path / "run"))
    equal = {name for name in teacher if torch.equal(teacher[name], student[name])}
    assert "conv_in.weight" in equal and "mid_block.resnets.0.conv1.bias" in equal
    assert "mid_block.resnets.0.conv1.weight" not in equal


def test_a_base_that_is_rounded_for_autocast_gives_the_same_bits(model: Model) -> None:
    """Outputs and gradients, as of a float32 base. It has the memory of a teacher that is rounded for autocast."""
    net = with_lora(model.denoiser.net, LoraConfig(rank=2, alpha=4))
    for weight in adapters(net).values():
        nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    teacher, rounded = rounded_for_autocast(copy.deepcopy(model.denoiser.net)), own_copy(net)
    take_base(rounded, teacher, autocast=True)
    assert pointers(rounded, trained=False) == pointers(teacher, trained=False)
    z, t = normal(2, *model.latent_shape), torch.tensor([999, 259])
    condition = Condition({"encoder_hidden_states": normal(2, 20, 16)})
    found = []
    for each in (net, rounded):
        with torch.autocast("cpu", torch.bfloat16):
            output = type(model.denoiser)(each, model.denoiser.schedule, "v_prediction").output(z, t, condition)
        output.float().square().sum().backward()
        found.append([output, *(weight.grad for weight in adapters(each).values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_plain_network_shares_nothing_with_its_copy(model: Model) -> None:
    copied = own_copy(model.denoiser.net)
    assert not pointers(copied, trained=False) & pointers(model.denoiser.net, trained=False)


def test_a_critic_starts_as_its_teacher(model: Model, pool: LatentPool) -> None:
    trainer = matching(model, pool)
    z, t = normal(2, *model.latent_shape), torch.tensor([999, 259])
    condition = trainer.condition(torch.tensor([0, 1]))
    with torch.no_grad():
        assert torch.equal(trainer.fake(z, t, condition), model.denoiser(z, t, condition))
        assert torch.equal(trainer.student(z, t, condition), model.denoiser(z, t, condition))


@pytest.mark.parametrize("finished", list(KILLS), indirect=True)
def test_a_killed_run_ends_with_the_same_weights(
    teachers: Callable[[str], Path], finished: tuple[str, Path], tmp_path: Path
) -> None:
    name, whole = finished

    def go() -> None:
        distill(str(teachers(name)), "shapes", BASE | RUNS[name], tmp_path / "killed", device="cpu")

    for kind, index in KILLS[name]:
        with killed_after(kind, 2, index):
            go()
    go()
    for file in (LORA, "unet/diffusion_pytorch_model.safetensors"):
        assert same_weights(file, tmp_path / "killed", whole)


def test_the_adapter_fits_the_original_teacher(teachers: Callable[[str], Path], finished: tuple[str, Path]) -> None:
    """Also after several stages: one adapter for all of them, which predicts what its base predicts."""
    name, out = finished
    teacher = teachers(name)
    student, own = load_model(str(out)), load_model(str(teacher))
    assert student.denoiser.prediction == own.denoiser.prediction == ("epsilon" if name == "pd-eps" else "v_prediction")
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    z, t, text = normal(2, *own.latent_shape), torch.tensor([999, 249]), normal(2, 20, 16)
    with torch.no_grad():
        before = pipeline.unet(z, t, text).sample
        pipeline.load_lora_weights(out / "student")
        adapted, whole = (net(z, t, text).sample for net in (pipeline.unet, student.denoiser.net))
    assert distance(adapted, whole) < 1e-5 and distance(before, whole) > 1e-5
    with safe_open(out / "student" / LORA, framework="pt") as file:
        metadata = file.metadata()
    told = json.loads(metadata["lora_adapter_metadata"])
    assert told["unet.base_model_name_or_path"] == str(teacher)
    assert metadata["ddil.base_sha256"] == own.weights_sha256()
    assert (out / "stages" / "4-steps" / LORA).is_file() == (name == "pd")


@pytest.mark.parametrize("finished", ["pd"], indirect=True)
def test_another_base_of_the_same_shapes_is_told(
    folder: Path, finished: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, layout = finished[1] / "student" / LORA, "StableDiffusionPipeline"
    merged = load_pipeline(Files(folder, lora=lora), "teacher", layout, torch.float32).unet.state_dict()
    whole = load_model(str(finished[1])).denoiser.net.state_dict()
    assert all(torch.allclose(merged[name], whole[name], rtol=0, atol=1e-6) for name in whole)
    other = save_pipeline(tmp_path / "other", TEACHER, seed=2)
    assert "warning" not in capsys.readouterr().err
    load_pipeline(Files(other, lora=lora), "other", layout, torch.float32)
    trained, here = (load_model(str(path)).weights_sha256()[:12] for path in (folder, other))
    assert (
        f"warning: the LoRA {lora} was trained on weights with the SHA-256 {trained}…, and those of 'other' have "
        f"{here}…: they are another base, or another variant or file format of the same\n"
    ) in capsys.readouterr().err


def test_the_next_teacher_is_the_base_with_the_adapter(folder: Path, model: Model, tmp_path: Path) -> None:
    seen: list[tuple[Any, Any]] = []
    begin = ProgressiveStage.__init__

    def watched(stage: ProgressiveStage, teacher: Any, *rest: Any) -> None:
        begin(stage, teacher, *rest)
        seen.append((teacher.network.net, rest[-1]))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ProgressiveStage, "__init__", watched)
        distill(str(folder), "shapes", BASE | {"method": "pd", "stages": STAGES}, tmp_path / "run", device="cpu")
    (first, start), (second, later) = seen
    z, t, text = normal(2, *model.latent_shape), torch.tensor([999, 249]), normal(2, 20, 16)
    with torch.no_grad():
        outputs = [net(z, t, text).sample for net in (first, start, second, later)]
    assert pointers(start, trained=False) == pointers(first, trained=False) == pointers(later, trained=False)
    merged = {name for name, weight in second.named_parameters() if not torch.equal(weight, first.get_parameter(name))}
    assert merged == {name.partition(".lora_")[0] + ".weight" for name in adapters(later)}
    assert torch.equal(outputs[0], outputs[1]) and distance(outputs[2], outputs[3]) < 1e-5
    assert distance(outputs[1], outputs[2]) > 1e-5 and not adapters(second) and adapters(later)


@pytest.mark.parametrize("method", ["pd", "dmd2"])
def test_a_flow_transformer_gets_adapters_too(method: str, tmp_path: Path) -> None:
    layout = "StableDiffusion3Pipeline"
    teacher = save_pipeline(tmp_path / "teacher", None, seed=1, layout=layout)
    more = {"stages": STAGES[:1]} if method == "pd" else {"updates": 2, "critic_updates": 1, "gan": {}}
    distill(str(teacher), "shapes", BASE | {"method": method} | more, tmp_path / "run", device="cpu")
    pipeline = DiffusionPipeline.from_pretrained(teacher, text_encoder_3=None, tokenizer_3=None)
    plain = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(tmp_path / "run" / "student")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    whole, fused = load_model(str(tmp_path / "run")).denoiser.net.state_dict(), pipeline.transformer.state_dict()
    assert whole.keys() == fused.keys() == plain.keys()
    assert all(torch.allclose(whole[name], fused[name], rtol=0, atol=1e-6) for name in whole)
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


def test_targets_are_data(model: Model) -> None:
    net = with_lora(model.denoiser.net, LoraConfig(rank=2, alpha=2, targets=("to_q", "conv1")))
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapters(net)}
    assert layers == {"to_q", "conv1"}


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="so nothing is converted; set convert to null"):
        ProgressiveConfig.model_validate({"stages": STAGES, "convert": {"updates": 1}, "lora": {}})
    for reference, told, message in (
        (str(folder), {"lora": {"targets": ["to_x"]}}, "lora.targets names 'to_x', and the network of"),
        (
            "gaussians",
            {"student": {}},
            "a LoRA adapts the layers of a U-Net or a transformer, which 'gaussians' has not",
        ),
    ):
        for run in ("pd", "dmd2"):
            with pytest.raises(WrongCommand, match=message):
                distill(reference, "shapes", BASE | RUNS[run] | told, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_configurations_without_a_lora_are_written_as_before() -> None:
    for config in (
        ProgressiveConfig.model_validate({"stages": STAGES}),
        MatchingConfig(updates=1),
    ):
        assert "lora" not in config.model_dump(mode="json")
    lcm = ConsistencyConfig.model_validate({"updates": 1, "lora": {}}).model_dump(mode="json")
    assert lcm["lora"] == {"rank": 64, "alpha": 64}
    assert ConsistencyConfig(updates=1).model_dump(mode="json")["lora"] is None
    told = ProgressiveConfig.model_validate({"stages": STAGES, "lora": {"targets": ["to_q"]}})
    assert ProgressiveConfig.model_validate(told.model_dump(mode="json")) == told


def test_the_command_leaves_out_what_a_lora_has_no_use_for(cli: Callable[..., Result], folder: Path) -> None:
    for method, convert in (("pd", True), ("dmd2", False), ("tcd", False)):
        printed = cli("distill", "--method", method, "--teacher", folder, "--lora", "--print-protocol")
        assert printed.exit_code == 0, printed.stderr
        told = load_plain(printed.stdout)
        assert told["lora"]["rank"] == 64 and told.get("w_embedding") is None
        assert ("convert" in told) == convert and told.get("convert") is None
    guided = cli("distill", "--method", "dmd2", "--teacher", folder, "--lora", "--guidance", 2, "--print-protocol")
    assert load_plain(guided.stdout)["guidance_scale"] == 2
