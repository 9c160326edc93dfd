"""``ddil models``: the list, downloads and conversions, as a user sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ddil_core.models.system_specs import load_systems
from tests.hub import serve

Cli = Callable[..., Result]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_every_system_is_listed_with_what_it_needs(cli: Cli) -> None:
    rows = {row["name"]: row for row in json.loads(cli("models", "--json").stdout)}
    assert list(rows) == ["shapes", "shapes-flow", "gaussians", *load_systems()]
    assert set(rows["sd15"]) == {"name", "description", "source", "revision", "licence", "bytes", "here", "needs"}
    result = cli("models")
    assert (result.exit_code, result.stderr) == (0, "")
    sentence = "sdxl: is not here: it needs stabilityai/stable-diffusion-xl-base-1.0 of"
    assert any(line.startswith(sentence) for line in result.stdout.splitlines())
    assert "unverified" in result.stdout.replace("\n", "")


def test_convert_tells_what_it_made(cli: Cli, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "note": "x"}, tmp_path / "w.bin")
    source, out = tmp_path / "w.bin", tmp_path / "w.safetensors"
    (done,) = json.loads(cli("models", "convert", source, out, "--json").stdout)
    assert (done["tensors"], done["dropped"], done["out"]) == (1, ["note"], str(out))
    again = cli("models", "convert", source, out)
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == f"error: {out} exists and is not overwritten; name another\n"
    out.unlink()
    assert cli("models", "convert", source, out).stdout == (
        f"{source}: 1 tensors\n  SHA-256 {done['source_sha256']}\n  left out: note\n"
        f"{out}\n  SHA-256 {done['out_sha256']}\n"
    )
    assert set(load_file(out)) == {"a"}


def test_a_part_of_a_checkpoint_is_chosen(cli: Cli, tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(2)}}, tmp_path / "w.pt")
    asked = cli("models", "convert", tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert (asked.exit_code, asked.stdout) == (2, "")
    assert asked.stderr == (
        f"error: {tmp_path / 'w.pt'} does not say which tensors are the weights; choose a part, as in --part model, of "
        "these (with their numbers of tensors): model (1), ema (1)\n"
    )
    done = cli("models", "convert", tmp_path / "w.pt", tmp_path / "w.safetensors", "--part", "ema")
    assert done.exit_code == 0 and "\n  left out: model\n" in done.stdout
    assert load_file(tmp_path / "w.safetensors")["a"].tolist() == [1, 1]


def test_what_cannot_be_fetched(cli: Cli, teacher: Path) -> None:
    for reference, sentence in {
        "shapes": "the model 'shapes' is not on a hub, so there is nothing to fetch",
        str(teacher): f"the model '{teacher}' is not on a hub, so there is nothing to fetch",
        "dmd": "the model 'dmd' has no public weights as far as known; name a folder in diffusers' pipeline layout, "
        "as in dmd:FOLDER",
    }.items():
        result = cli("models", "download", reference)
        assert (result.exit_code, result.stderr) == (2, f"error: {sentence}\n")


def test_a_user_fetches_a_model_and_draws_with_it(cli: Cli, teacher: Path, root: Path, tmp_path: Path) -> None:
    """In a process of its own, set up by the hub client's own environment variables; then offline."""
    with serve() as hub:
        hub.add("org/tiny", teacher)
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        env |= {"PYTHONPATH": str(root), "HF_HUB_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "ddil_eval.cli", "models", "download", "org/tiny"]
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert (run.returncode, run.stdout) == (0, "")
        first = run.stderr.splitlines()[0]
        assert first.startswith("org/tiny at ") and " files to fetch, " in first and "Traceback" not in run.stderr
    out = tmp_path / "pictures"
    result = cli(
        "sample", "--model", "org/tiny", "--prompt", "a", "--steps", 1, "--out", out, "--device", "cpu", "--download"
    )
    assert result.exit_code == 0  # all is here, so the hub, which is gone, is not asked
    assert (out / "000-00.png").is_file()


def test_download_on_a_command_says_the_size_and_fetches(
    cli: Cli, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = ("sample", "--model", "org/tiny", "--prompt", "a", "--steps", 1, "--device", "cpu")
    refused = cli(*draw, "--out", tmp_path / "a")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.endswith(
        "get it with: ddil models download org/tiny, or add --download (in Python: download=True)\n"
    )
    with serve() as hub:
        hub.add("org/tiny", teacher)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        result = cli(*draw, "--out", tmp_path / "b", "--download")
    assert result.exit_code == 0
    assert "org/tiny at " in result.stderr and " files to fetch, " in result.stderr


def test_sampling_in_another_dtype_and_variant(cli: Cli, teacher: Path, tmp_path: Path) -> None:
    draw = ("sample", "--model", teacher, "--prompt", "a", "--steps", 1, "--device", "cpu")
    assert cli(*draw, "--out", tmp_path / "a", "--dtype", "bf16").exit_code == 0
    result = cli(*draw, "--out", tmp_path / "b", "--variant", "fp16")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        2,
        f"error: the model '{teacher}' has no weights of the variant 'fp16' here; it has only the plain files",
    )


def test_the_doctor_estimates_whether_a_model_fits(cli: Cli, teacher: Path) -> None:
    document = json.loads(cli("doctor", "--json", "--model", teacher, "--device", "cpu", "--dtype", "bf16").stdout)
    checks = {check["name"]: check for check in document["checks"] if check["group"] == "memory"}
    distilling = ("distil", "distil with DMD2", "distil with DMD2 and optimizer 8bit")
    uses = ("sample in bf16", *(f"{use}, without activations" for use in distilling))
    assert list(checks) == [f"{teacher}: {use}" for use in uses]
    assert all(
        check["ok"] and check["found"].endswith(" free on cpu") and not check["cure"] for check in checks.values()
    )
    refused = cli("doctor", "--model", "org/none", "--device", "cpu")
    assert (refused.exit_code, refused.stdout) == (2, "")


def test_the_doctor_says_what_to_do_where_a_model_does_not_fit(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddil_core.models import memory
    from ddil_eval.cli import doctor

    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    sample, distil, *_ = doctor.memory(str(teacher), None, "fp32", "cpu", {})
    assert (sample.ok, sample.required) == (False, False)
    assert sample.found.endswith(" of 0.98 KiB free on cpu")
    assert sample.cure == "take half the memory with --dtype bf16, or use a device with more"
    assert distil.cure == "use a device with more, or distil a LoRA"


def test_a_lora_file_is_no_model(cli: Cli, tmp_path: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    result = cli("sample", "--model", tmp_path / "lora.safetensors", "--prompt", "a", "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert result.stderr.endswith("a U-Net or a LoRA goes onto a system, as in dmd2:FILE or lcm-lora:FILE\n")
