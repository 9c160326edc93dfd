"""Pickles to safetensors: the same tensors, no code run, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddil_core.models.convert import convert_weights, safetensors_path
from ddil_core.models.model import Model, load_model
from ddil_core.support.checksums import require_checksum
from ddil_core.support.errors import DdilError, WrongCommand


class Malicious:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_file_keeps_its_tensors_and_the_result_has_both_hashes(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "c": torch.arange(3)}
    torch.save(weights, tmp_path / "w.bin")
    (done,) = convert_weights(tmp_path / "w.bin", tmp_path / "w.safetensors")
    read = load_file(tmp_path / "w.safetensors")
    assert set(read) == set(weights)
    assert all(torch.equal(read[name], weight) and read[name].dtype == weight.dtype for name, weight in weights.items())
    assert (done.tensors, done.dropped) == (3, ())
    assert (done.source_sha256, done.out_sha256) == (sha256(done.source), sha256(done.out))


def test_what_is_converted_has_its_checksum(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "w.bin")
    convert_weights(tmp_path / "w.bin", tmp_path / "w.safetensors")
    assert require_checksum(tmp_path / "w.safetensors", "the weights", "convert them again")


def test_tensors_that_share_memory_are_all_kept(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    weights = {"whole": base, "tied": base, "row": base[1], "turned": base.T, "module": torch.nn.Parameter(base)}
    torch.save(weights, tmp_path / "w.pth")
    convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors")
    read = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())


def test_weights_inside_a_training_checkpoint_are_found_and_the_rest_is_named(tmp_path: Path) -> None:
    inner = {"layer.weight": torch.ones(2), "step": 3}
    torch.save({"epoch": 1, "state_dict": inner, "optimizer_states": [torch.zeros(2)]}, tmp_path / "w.ckpt")
    (done,) = convert_weights(tmp_path / "w.ckpt", tmp_path / "w.safetensors")
    assert (done.tensors, done.dropped) == (1, ("epoch", "optimizer_states", "step"))
    assert set(load_file(tmp_path / "w.safetensors")) == {"layer.weight"}


def test_a_tensor_beside_nested_weights_is_a_note_and_a_note_with_a_nested_name_is_no_weights(tmp_path: Path) -> None:
    for content, name, dropped in (
        ({"rng": torch.get_rng_state(), "state_dict": {"layer.weight": torch.ones(2)}}, "layer.weight", ("rng",)),
        ({"step": torch.tensor(7), "state_dict": {"layer.weight": torch.ones(2)}}, "layer.weight", ("step",)),
        ({"layer.weight": torch.ones(2), "params": {"lr": 0.1}}, "layer.weight", ("params",)),
    ):
        torch.save(content, tmp_path / "w.ckpt")
        (done,) = convert_weights(tmp_path / "w.ckpt", tmp_path / "w.safetensors")
        assert (set(load_file(tmp_path / "w.safetensors")), done.dropped) == ({name}, dropped)
        (tmp_path / "w.safetensors").unlink()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, legacy: bool) -> None:
    trap = tmp_path / "made-by-the-pickle"
    torch.save(
        {"a": torch.ones(2), "b": Malicious(trap)}, tmp_path / "w.bin", _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(DdilError) as error:
        convert_weights(tmp_path / "w.bin", tmp_path / "w.safetensors")
    assert str(error.value) == (
        f"{tmp_path / 'w.bin'} asks for the Python object {os.mkdir.__module__}.mkdir, which could run code, and "
        "weights need none; nothing was run or written: get a copy in safetensors, or a copy that its author saved "
        "with weights only"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["w.bin"]
    pickle.loads(pickle.dumps(Malicious(trap)))  # the trap is a real one
    assert trap.is_dir()


@pytest.mark.parametrize("content", [b"", b"not a pickle at all", b"PK\x03\x04 no zip either"])
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.bin").write_bytes(content)
    with pytest.raises(DdilError, match=rf"^{tmp_path / 'w.bin'} is .*damaged.*get it again$"):
        convert_weights(tmp_path / "w.bin", tmp_path / "w.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["w.bin"]


def test_a_checkpoint_that_is_cut_short(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(1000)}, tmp_path / "w.bin")
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:2000])
    with pytest.raises(DdilError, match="damaged"):
        convert_weights(tmp_path / "w.bin", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 1}, {"optimizer": {"state": {0: {1: torch.ones(1)}}}}, torch.ones(2)]
)
def test_what_holds_no_weights_by_name(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.bin")
    with pytest.raises(DdilError, match="holds no tensors by name, so there are no weights to convert$"):
        convert_weights(tmp_path / "w.bin", tmp_path / "w.safetensors")


ONES, TWOS = {"a.weight": torch.ones(3)}, {"a.weight": 2 * torch.ones(3)}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"model": ONES, "ema": TWOS}, {"model": 1, "ema": 2}),
        ({"state_dict": {"model": ONES, "ema": TWOS, "step": 3}}, {"state_dict.model": 1, "state_dict.ema": 2}),
        ({"epoch": 1, "generator": ONES, "critic": TWOS}, {"generator": 1, "critic": 2}),
        ({"net": ONES}, {"net": 1}),  # a name that no rule knows is not guessed
        (ONES | {"ema": TWOS}, {".": 1, "ema": 2}),
        ({"model": {"decay": 0.9, "params": ONES, "ema": TWOS}}, {"model.params": 1, "model.ema": 2}),
    ],
)
def test_one_of_several_sets_of_weights_is_chosen_by_name(
    tmp_path: Path, content: dict[str, object], parts: dict[str, int]
) -> None:
    source = tmp_path / "w.pt"
    torch.save(content, source)
    listed = ", ".join(f"{part} (1)" for part in parts)
    for wrong, asked in ((None, "does not say which tensors are the weights"), ("other", "has no part 'other'")):
        with pytest.raises(WrongCommand) as error:
            convert_weights(source, tmp_path / "w.safetensors", wrong)
        assert str(error.value) == (
            f"{source} {asked}; choose a part, as in --part {next(iter(parts))}, of these (with their numbers of "
            f"tensors): {listed}"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
    for part, value in parts.items():
        (done,) = convert_weights(source, tmp_path / f"{part}.safetensors", part)
        read = load_file(tmp_path / f"{part}.safetensors")
        assert set(read) == {"a.weight"} and bool((read["a.weight"] == value).all())
        assert done.tensors == 1 and len(done.dropped) >= len(content) - 1


def test_a_part_may_be_named_where_only_one_can_be_meant(tmp_path: Path) -> None:
    torch.save({"state_dict": ONES, "optimizer": {"state": {0: torch.ones(9)}}}, tmp_path / "w.pt")
    for part in (None, "state_dict"):
        (done,) = convert_weights(tmp_path / "w.pt", tmp_path / f"{part}.safetensors", part)
        assert (done.tensors, done.dropped) == (1, ("optimizer",))
    with pytest.raises(WrongCommand, match="--part belongs to one file"):
        convert_weights(tmp_path, tmp_path.parent / "out", "ema")


def test_wrong_names(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "w.bin")
    (tmp_path / "there.safetensors").write_text("mine")
    cases = {
        ("none.bin", "o.safetensors"): "there is no file or folder HERE/none.bin",
        ("w.bin", "o.bin"): "the file to write, HERE/o.bin, must end in .safetensors",
        ("there.safetensors", "o.safetensors"): "HERE/there.safetensors cannot be converted; name a file that "
        "ends in .bin, .ckpt, .pt, .pth, or a folder of such files",
        ("w.bin", "there.safetensors"): "HERE/there.safetensors exists and is not overwritten; name another",
    }
    for (source, out), sentence in cases.items():
        with pytest.raises(WrongCommand) as error:
            convert_weights(tmp_path / source, tmp_path / out)
        assert str(error.value).replace(str(tmp_path), "HERE") == sentence
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def pickled(folder: Path, out: Path) -> Path:
    """A pipeline of pickles as many were published: the U-Net in two shards, and code in the folder."""
    shutil.copytree(folder, out)
    for path in sorted(out.rglob("*.safetensors")):
        stem = "pytorch_model" if path.name == "model.safetensors" else "diffusion_pytorch_model"
        weights = load_file(path)
        if path.parent.name == "unet":
            names = sorted(weights)
            place = {name: f"{stem}-0000{1 + (i % 2)}-of-00002.bin" for i, name in enumerate(names)}
            for file in set(place.values()):
                torch.save({name: weights[name] for name in names if place[name] == file}, path.with_name(file))
            path.with_name(f"{stem}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
        else:
            torch.save(weights, path.with_name(f"{stem}.bin"))
        path.unlink()
    (out / "unet" / "model.py").write_text("raise SystemExit")
    return out


def test_a_folder_becomes_a_pipeline_that_loads(folder: Path, model: Model, tmp_path: Path) -> None:
    source = pickled(folder, tmp_path / "source")
    with pytest.raises(DdilError, match="ddil models convert"):
        load_model(str(source))
    torch.save(
        {"a": torch.ones(1)}, source / "whole.ckpt"
    )  # as many keep one beside the pipeline, which names it nowhere
    done = convert_weights(source, tmp_path / "out")
    assert sorted(Path(one.out).relative_to(tmp_path / "out").as_posix() for one in done) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".py")]
    made = load_model(str(tmp_path / "out"))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(one.pipeline, part).state_dict() for one in (made, model))
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert made.sampling == model.sampling


def test_a_folder_with_one_bad_pickle_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    source = pickled(folder, tmp_path / "source")
    torch.save({"a": Malicious(tmp_path / "trap")}, source / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(DdilError, match="asks for the Python object"):
        convert_weights(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_without_pickles_and_one_inside_itself(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongCommand, match=r"holds no .bin, .ckpt, .pt, .pth without a safetensors file beside it$"):
        convert_weights(folder, tmp_path / "out")
    source = pickled(folder, tmp_path / "source")
    with pytest.raises(WrongCommand, match="name a folder outside of it$"):
        convert_weights(source, source / "out")


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("pytorch_model.bin.index.json", "model.safetensors.index.json"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"),
        ("v1-5-pruned.ckpt", "v1-5-pruned.safetensors"),
    ],
)
def test_names_after_conversion(name: str, new: str) -> None:
    assert safetensors_path(Path("a") / name) == Path("a") / new
