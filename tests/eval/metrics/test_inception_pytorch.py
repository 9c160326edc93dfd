"""FID as pytorch-fid has it: the same network and input as clean-fid's copy of that package, with random weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddil_core.support.errors import DdilError
from ddil_eval.metrics import METRICS, inception_pytorch
from ddil_eval.metrics.inception import INCEPTION
from tests.coco import photograph

pytest.importorskip("cleanfid", reason="clean-fid is not installed")
PICTURES = np.stack([photograph(2 * place)[:60, :60] for place in range(2)])


def published() -> dict[str, torch.Tensor]:
    """A state dict with the names of pytorch-fid's file: the features' and the last layer's."""
    torch.manual_seed(0)
    state = inception_pytorch.architecture().state_dict()
    return state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def test_features_are_those_of_clean_fids_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cleanfid import inception_pytorch as cleanfid_copy
    from cleanfid.resize import build_resizer

    state = published()
    monkeypatch.setattr(cleanfid_copy, "load_state_dict_from_url", lambda *args, **kwargs: state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clean-fid's copy calls torchvision the old way
        copy = cleanfid_copy.InceptionV3([3], resize_input=False, normalize_input=True).eval()
        resized = np.stack([build_resizer("legacy_pytorch")(picture) for picture in PICTURES])
    with torch.no_grad():
        expected = copy(torch.from_numpy(resized).permute(0, 3, 1, 2) / 255)[0].flatten(1).numpy()

    save_file(state, tmp_path / inception_pytorch.WEIGHTS.file)
    monkeypatch.setitem(inception_pytorch.WEIGHTS.__dict__, "place", lambda: tmp_path / inception_pytorch.WEIGHTS.file)
    found = METRICS["fid_pytorch"].network.open_on("cpu")(PICTURES, ["", ""])
    assert found.shape == (2, 2048)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_a_file_with_another_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / inception_pytorch.WEIGHTS.file
    save_file({"a": torch.zeros(1)}, path)
    monkeypatch.setitem(inception_pytorch.WEIGHTS.__dict__, "place", lambda: path)
    with pytest.raises(DdilError) as error:
        METRICS["fid_pytorch"].network.open_on("cpu")
    assert str(error.value) == f"{path} does not hold pytorch-fid's Inception; delete it and get it again"


def test_the_published_pickle_becomes_safetensors(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "published.pth")
    inception_pytorch.convert_fid_weights(tmp_path / "published.pth", tmp_path / "out.safetensors")
    from safetensors.torch import load_file

    assert load_file(tmp_path / "out.safetensors")["a"].tolist() == [0, 1, 2]


def test_patch_fid_uses_the_network_of_fid() -> None:
    patch = METRICS["patch_fid"]
    assert patch.weights == INCEPTION.weights and patch.network.name != INCEPTION.name
    assert patch.statistic is METRICS["fid"].statistic
