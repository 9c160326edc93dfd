"""``ddil doctor``: what it finds, what is missing, and its advice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from safetensors.numpy import save_file

from ddil_core.support.checksums import MANIFEST, sha256
from ddil_core.support.errors import DdilError
from ddil_eval.cli import doctor
from tests.pipelines import build, without_weights


@pytest.fixture(scope="module")
def checks() -> dict[str, doctor.Check]:
    found = [*doctor.machine(), *doctor.packages(), *doctor.devices(), *doctor.weights(), doctor.latex()]
    return {check.name: check for check in found}


def broken(package: str, line: str, root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the doctor where ``package`` is an installation that fails with ``line`` when it is imported."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(line)
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}"}
    command = [sys.executable, "-m", "ddil_eval.cli", "doctor", "--json"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_json_is_one_document_and_agrees_with_the_exit_status(cli: Callable[..., Result]) -> None:
    result = cli("doctor", "--json")
    document = json.loads(result.stdout)
    required = [check["ok"] for check in document["checks"] if check["required"]]
    assert document["ok"] is all(required)
    assert result.exit_code == (0 if document["ok"] else 1)
    assert {check["group"] for check in document["checks"]} == {"machine", "packages", "devices", "weights", "tools"}


def test_what_is_wrong_has_a_cure_and_what_is_well_has_none(checks: dict[str, doctor.Check]) -> None:
    assert [check.name for check in checks.values() if check.ok == bool(check.cure)] == []


def test_the_table_ends_with_a_verdict(cli: Callable[..., Result]) -> None:
    result = cli("doctor")
    verdict = {
        0: "Everything that ddil requires works.",
        1: "Something that ddil requires is missing or broken: see above.",
    }
    assert result.stdout.splitlines()[-1] == verdict[result.exit_code]


def test_every_declared_package_is_looked_for(checks: dict[str, doctor.Check]) -> None:
    names = [Requirement(requirement).name for requirement in doctor.declared()[1]]
    assert {"torch", "torchvision", "diffusers", "transformers"} <= set(names)
    assert set(names) <= set(checks)
    assert checks["torch"].found == f"{metadata.version('torch')} (>=2.11)"


def test_a_missing_package_names_the_command_that_installs_it() -> None:
    check = doctor._package("no-such-package", SpecifierSet(">=1.5"))
    assert (check.ok, check.found, check.cure) == (False, "missing (>=1.5)", 'pip install "no-such-package>=1.5"')


def test_a_package_that_is_too_old_names_the_command_that_replaces_it() -> None:
    check = doctor._package("click", SpecifierSet(">=999"))
    assert (check.ok, check.cure) == (False, 'pip install "click>=999"')


def test_a_mismatched_torchvision_is_one_sentence_with_the_cure(root: Path, tmp_path: Path) -> None:
    line = "raise RuntimeError('operator torchvision::nms does not exist')"
    run = broken("torchvision", line, root, tmp_path)
    assert run.returncode == 1 and run.stderr == ""
    (check,) = [check for check in json.loads(run.stdout)["checks"] if check["name"] == "torch with torchvision"]
    assert not check["ok"]
    assert "operator torchvision::nms does not exist" in check["cure"]
    assert "pip install --force-reinstall torch torchvision" in check["cure"]


def test_a_torchvision_whose_library_cannot_be_loaded_is_one_sentence_with_the_cure(root: Path, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    library = tmp_path / "torchvision" / "_C.so"
    library.write_bytes(b"no library")
    (tmp_path / "torchvision" / "__init__.py").touch()
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    command = [sys.executable, "-m", "ddil_eval.cli", "doctor", "--json"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stderr == ""
    (check,) = [check for check in json.loads(run.stdout)["checks"] if check["name"] == "torch with torchvision"]
    assert check["cure"].startswith(f"torchvision does not fit the installed torch ({library}: ")
    assert "pip install --force-reinstall torch torchvision" in check["cure"]


@pytest.mark.parametrize(("theirs", "fits"), [(13000, True), (12060, False), (-1, True)])
def test_torch_and_torchvision_for_different_cuda_do_not_fit(
    theirs: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchvision's own rule: builds for one major version of CUDA, or torchvision for CPUs."""
    import torch

    from ddil_core.support.environment import check_torchvision

    check_torchvision()  # loads the library before its version is replaced
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.ops.torchvision, "_cuda_version", lambda: theirs)
    if fits:
        check_torchvision()
    else:
        with pytest.raises(DdilError, match=r"\(torch is for CUDA 13\.2, torchvision for CUDA 12\)"):
            check_torchvision()


def test_a_torch_that_cannot_be_loaded_is_reported_without_traceback(root: Path, tmp_path: Path) -> None:
    run = broken("torch", "raise ImportError('libcudart.so.13: no such file')", root, tmp_path)
    assert run.returncode == 1 and run.stderr == ""
    (check,) = [check for check in json.loads(run.stdout)["checks"] if check["group"] == "devices"]
    assert check["found"] == "cannot be loaded: libcudart.so.13: no such file"
    assert check["cure"] == "pip install --force-reinstall torch torchvision"


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_memory_and_capability(checks: dict[str, doctor.Check]) -> None:
    import torch

    gpu = torch.cuda.get_device_properties(0)
    assert checks["cuda:0"].found.startswith(f"{gpu.name}, ")
    assert checks["cuda:0"].found.endswith(f"capability {gpu.major}.{gpu.minor}")


def test_shipped_weights_are_found_missing_or_damaged(tmp_path: Path) -> None:
    assert doctor._shipped("teacher", tmp_path, "index.json").found == f"missing: {tmp_path}"
    file = tmp_path / "unet" / "model.safetensors"
    file.parent.mkdir()
    save_file({"w": np.ones((256, 1024), np.float32)}, file)
    assert not doctor._shipped("teacher", tmp_path, "index.json").ok
    (tmp_path / "index.json").write_text("{}")
    assert doctor._shipped("teacher", tmp_path, "index.json").found == "1 files, 1.0 MiB"
    whole = file.read_bytes()
    (tmp_path / MANIFEST).write_text(json.dumps({"unet/model.safetensors": sha256(file)}))
    file.write_bytes(whole[:-1] + b"\x01")  # the header does not show it
    check = doctor._shipped("teacher", tmp_path, "index.json")
    assert not check.ok and check.found.startswith(f"damaged: the file {file} of teacher does not match its checksum")
    file.write_bytes(whole[:-4])
    check = doctor._shipped("teacher", tmp_path, "index.json")
    assert not check.ok and check.found.startswith(f"damaged: {file} (") and "git checkout" in check.cure


@pytest.mark.weights
def test_the_shipped_weights_are_whole(checks: dict[str, doctor.Check]) -> None:
    assert all(checks[f"shapes {part}"].ok for part in ("teacher", "flow teacher", "scorer"))


def test_a_weights_file_is_checked_against_the_hash_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "net-2cf24dba.pth"
    file.write_bytes(b"hello")  # SHA-256 2cf24dba5fb0a30e…
    assert doctor.named_by_its_hash(file)
    file.write_bytes(b"hell")
    assert not doctor.named_by_its_hash(file)


def test_efficientnet_is_installed_and_whole(checks: dict[str, doctor.Check]) -> None:
    assert checks["EfficientNet-Lite0"].ok


@pytest.mark.parametrize("name", ["sd15", "lcm", "sd21", "sdxl"])
def test_known_sizes_are_those_of_the_published_configurations(name: str) -> None:
    """The networks are built from their configurations on the meta device, which allocates nothing."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ddil_core.models.known_sizes import ARCHITECTURES

    def clip(kind: Any, width: int, layers: int, heads: int) -> Any:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return kind(CLIPTextConfig(**sizes, num_attention_heads=heads, projection_dim=width, vocab_size=49408))

    with torch.device("meta"):
        networks: dict[str, Any] = {"unet": UNet2DConditionModel(**ARCHITECTURES[name].unet)}
        networks["vae"] = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        wide = name == "sd21"
        networks["text_encoder"] = clip(CLIPTextModel, 1024 if wide else 768, 23 if wide else 12, 16 if wide else 12)
        if name == "sdxl":
            networks["text_encoder_2"] = clip(CLIPTextModelWithProjection, 1280, 32, 20)
    found = {part: sum(weight.numel() for weight in network.parameters()) for part, network in networks.items()}
    assert found == ARCHITECTURES[name].parameters


def test_a_known_system_without_its_files_is_estimated(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stable Diffusion 1.5, as docs/distillation.md has it: DMD2 takes 2 P + 32 P bytes, 29 GB or 27.2 GiB."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = cli("doctor", "--model", "sd15", "--dtype", "bf16", "--json", "--device", "cpu")
    found = {
        check["name"]: check["found"] for check in json.loads(result.stdout)["checks"] if check["group"] == "memory"
    }
    dmd2 = found["sd15: distil with DMD2, without activations"]
    assert dmd2.startswith(f"{34 * 859_520_964 / 2**30:.1f} GiB of ")
    assert dmd2.endswith(", by its architecture; its files are not here")
    unknown = cli("doctor", "--model", "ssd1b")
    assert unknown.exit_code == 2
    assert unknown.stderr.endswith("; without its files the size of 'ssd1b' is not known here\n")


def test_a_known_system_with_its_files_is_not_estimated_without_them(
    cli: Callable[..., Result], student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    storage = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (storage / "refs").mkdir(parents=True)
    (storage / "snapshots").mkdir()
    (storage / "refs" / "main").write_text("0" * 40)
    (storage / "snapshots" / ("0" * 40)).symlink_to(student)
    result = cli("doctor", "--model", "sd15", "--variant", "fp16", "--device", "cpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == (
        "error: the model 'sd15' has no weights of the variant 'fp16' here; it has only the plain files"
    )


@pytest.mark.weights
def test_a_distillation_is_estimated_component_by_component(cli: Callable[..., Result]) -> None:
    result = cli("doctor", "--model", "shapes", "--method", "pd", "--set", "batch_size=2", "--json")
    found = {
        check["name"].removeprefix("shapes, pd: "): check["found"]
        for check in json.loads(result.stdout)["checks"]
        if check["group"] == "memory"
    }
    assert [*found] == [
        "teacher", "student", "optimizer", "average", "autoencoder", "aggregated dataset", "gradients", "activations",
        "in all, on each GPU", "24 GiB", "48 GiB", "80 GiB",
    ]  # fmt: skip
    assert found["teacher"] == found["student"] == "25.3 MiB" and found["24 GiB"] == "enough"


def test_what_describes_a_distillation_needs_its_method_and_a_method_its_model(cli: Callable[..., Result]) -> None:
    for words, says in (
        (("--model", "shapes", "--set", "batch_size=2"), "--lora, --protocol, --set and --processes describe a"),
        (("--method", "pd"), "--method estimates the distillation of a model; name it with --model"),
        (("--model", "shapes", "--method", "pd", "--processes", 3), "is not divisible by 3 processes"),
        (("--height", 64), "--height and --width are of the images of a model; name it with --model"),
        (
            ("--model", "sd15", "--width", 500),
            "of a width of 500: its autoencoder takes sides in multiples of 8 pixels",
        ),
    ):
        result = cli("doctor", *words)
        assert (result.exit_code, result.stdout) == (2, "") and says in result.stderr


def found(result: Result) -> dict[str, str]:
    """What a command found of memory, by the last words of each line."""
    assert result.exit_code == 0, result.stderr
    checks = json.loads(result.stdout)["checks"]
    return {check["name"].rpartition(": ")[2]: check["found"] for check in checks if check["group"] == "memory"}


def test_the_estimates_are_of_the_size_that_is_asked_for(cli: Callable[..., Result], teacher: Path) -> None:
    """A state of the dataset has twice 8 · 8 · 8 numbers of 4 bytes, and at another size 6 times as many."""
    told = ("--method", "lcm", "--set", "ddil.capacity=8192", "--set", "batch_size=2", "--json")
    own, asked = (
        found(cli("doctor", "--model", teacher, *told, *size))["aggregated dataset"]
        for size in ((), ("--height", 128, "--width", 192))
    )
    assert (own, asked) == ("32.0 MiB", "192 MiB")


def test_a_distillation_is_estimated_and_refused_without_weights(cli: Callable[..., Result], tmp_path: Path) -> None:
    for name, distilled in (("schnell", True), ("dev", False)):
        build("FluxPipeline", tmp_path / "words", distilled=distilled).save_pretrained(tmp_path / name)
        without_weights(tmp_path / name)
    told = ("--method", "lcm", "--height", 64, "--width", 96, "--set", "updates=1", "--json")
    settings = ("w_embedding=null", "teacher_steps=48", "batch_size=2")
    words = (*told, *(word for setting in settings for word in ("--set", setting)))
    assert found(cli("doctor", "--model", tmp_path / "schnell", *words))["24 GiB"] == "enough"
    result = cli("doctor", "--model", tmp_path / "dev", *words)
    assert (result.exit_code, result.stdout) == (1, "") and "reads its guidance scale" in result.stderr
