"""Any text as a reference to a model or a data set: it gives local files, or a message of one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ddil_core.data.datasets import open_data
from ddil_core.models.convert import convert_weights
from ddil_core.models.hub import Repository
from ddil_core.models.references import hub_parts, resolve
from ddil_core.models.weights import read_json
from ddil_core.support.errors import DdilError, WrongCommand

PIECES = st.sampled_from(
    [
        "", "~", "~nobody-1", "loop", "pipe", "dir", "file", "a/b", "@", ":", "/", "..", "\0", "z" * 300, "é", "{0..9}", "[", "*",
        "sd15", "sdxl", "lcm-lora", "folder", "coco2014", "coco2017", "webdataset", "http://", "pipe:", "x.tar", "x.safetensors",
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(st.characters(), max_size=4), max_size=5).map("".join)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "x.safetensors").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("look", [resolve, hub_parts, open_data])
def test_any_reference_fits_or_is_refused(look: Callable[[str], Any], here: Path) -> None:
    @settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
    @given(TEXTS.filter(lambda text: text != "shapes"))
    @example("sd15:~nobody-1/x.safetensors")
    @example("a/b@" + "z" * 5000)
    @example("z" * 10_000)
    def check(text: str) -> None:
        try:
            look(text)
        except DdilError as error:
            assert str(error)

    check()


def test_a_long_name_is_cut(here: Path) -> None:
    with pytest.raises(WrongCommand) as error:
        resolve("z" * 10_000)
    assert (
        str(error.value)
        == f"the model '{'z' * 200}'… (10,000 characters) cannot be used: File name too long; name another"
    )


@pytest.mark.parametrize("revision", ["..", "../x", "/etc/passwd", "a/../b", "a//b", "a\0", "z" * 97, ".hidden", "a b"])
def test_a_revision_stays_in_the_cache(revision: str) -> None:
    assert Repository.parse(f"org/name@{revision}") is None


@pytest.mark.parametrize("revision", ["main", "fp16", "refs/pr/1", "v1.0", "feature_x-2", "f" * 40])
def test_revisions_that_there_may_be(revision: str) -> None:
    assert Repository.parse(f"org/name@{revision}") == Repository("org/name", revision)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000])
def test_a_description_that_is_damaged(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model_index.json"
    path.write_bytes(content)
    sentence = r"^the file .* of the model is (damaged|nested more than .*); fetch or make the model again$"
    with pytest.raises(DdilError, match=sentence):
        read_json(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_shards_that_is_damaged(content: str, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "published"
    folder.mkdir()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(DdilError, match=r"^the index .*/pytorch_model\.bin\.index\.json is damaged; fetch or make "):
        convert_weights(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
