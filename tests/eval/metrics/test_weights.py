"""Weights of metrics: where they lie, what is checked, and that nothing is fetched but on command."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from ddil_core.support.errors import DdilError
from ddil_eval.metrics import METRICS, WeightsFile, hps, lpips_alexnet
from ddil_eval.metrics.weights_file import read_weights


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.bin"
    path.write_bytes(b"the weights")
    return path


def pinned(path: Path, **rest: object) -> WeightsFile:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return WeightsFile(**{"file": "it.bin", "url": path.as_uri(), "sha256": digest} | rest)  # type: ignore[arg-type]


def test_weights_are_fetched_on_command_and_checked(cache: Path, published: Path) -> None:
    weights = pinned(published)
    assert weights.missing() == (
        f"the weights {cache}/weights/it.bin are not here; get them from {published.as_uri()} with: "
        "ddil metrics --get it.bin"
    )
    with pytest.raises(DdilError, match="are not here"):
        weights.checked()
    assert weights.get() == cache / "weights" / "it.bin" == weights.checked()
    assert weights.missing() is None and weights.digest() == weights.sha256
    assert sorted(file.name for file in (cache / "weights").iterdir()) == ["it.bin", "it.bin.sha256"]


def test_another_file_than_the_published_one_is_refused(cache: Path, published: Path) -> None:
    weights = pinned(published)
    published.write_bytes(b"something else")
    with pytest.raises(DdilError, match=r"is not the file that its source publishes \(sha256 .*…, expected .*…\)"):
        weights.get()
    with pytest.raises(DdilError, match="is not the file"):
        weights.add(published)
    assert list((cache / "weights").glob("*")) == []


def test_weights_that_change_under_way_are_noticed(cache: Path, published: Path) -> None:
    weights = pinned(published)
    place = weights.get()
    place.write_bytes(b"changed")
    with pytest.raises(
        DdilError, match=r"it.bin is not the file that its source publishes .*; delete the file and get it again"
    ):
        weights.checked()


def test_what_its_source_does_not_state_is_unverified(published: Path) -> None:
    assert pinned(published).check == "verified"
    assert pinned(published, sha256=None).check == "unverified"
    assert lpips_alexnet.WEIGHTS.check == "verified when fetched, not when added converted"
    assert pinned(published, sha256=None).get().read_bytes() == b"the weights"


def test_a_source_that_cannot_be_reached_is_one_sentence(tmp_path: Path, cache: Path) -> None:
    weights = WeightsFile("it.bin", url=(tmp_path / "nowhere").as_uri())
    with pytest.raises(
        DdilError,
        match=r"nowhere cannot be reached \(.*\); fetch it on another machine and add it with: ddil metrics --add it",
    ):
        weights.get()
    assert not (cache / "weights" / "it.bin").exists()
    with pytest.raises(DdilError, match="have no public source; add a local file with --add"):
        WeightsFile("own.bin").get()


@pytest.mark.parametrize("chunked", [True, False])
def test_a_connection_that_breaks_off_is_one_sentence(chunked: bool, cache: Path) -> None:
    """A source that says too little, or resets the connection: neither is taken for a fault of the disk."""

    class Breaking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", "100")))
            self.end_headers()
            self.wfile.write(b"64\r\nhalf" if chunked else b"half")
            self.wfile.flush()
            if not chunked:  # closed without lingering, the connection is reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())

        def log_message(self, *arguments: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Breaking)
    threading.Thread(target=server.handle_request, daemon=True).start()
    weights = WeightsFile("it.bin", url=f"http://127.0.0.1:{server.server_port}/it.bin")
    with pytest.raises(DdilError, match=r"^the connection to http://\S+/it.bin broke off \(.+\); try again$"):
        weights.get()
    server.server_close()
    assert not (cache / "weights" / "it.bin").exists()


def test_alexnet_is_converted_from_torchvision_s_layout(tmp_path: Path, cache: Path) -> None:
    from torchvision.models import alexnet

    torch.manual_seed(0)
    state = alexnet(weights=None).state_dict()
    torch.save(state, tmp_path / "alexnet.pth")
    lpips_alexnet.convert_lpips_weights(tmp_path / "alexnet.pth", tmp_path / "layers.safetensors")
    layers = load_file(tmp_path / "layers.safetensors")
    assert len(layers) == 10 and torch.equal(layers["slice4.8.weight"], state["features.8.weight"])
    lpips_alexnet.load_lpips(tmp_path / "layers.safetensors")
    with pytest.raises(DdilError, match="is not the file that its source publishes"):
        lpips_alexnet.WEIGHTS.add(tmp_path / "alexnet.pth")  # other numbers than torchvision's own


def test_a_checkpoint_of_hps_is_converted_without_running_it(tmp_path: Path, cache: Path) -> None:
    torch.save({"state_dict": {"visual.proj": torch.eye(3)}, "epoch": 1}, tmp_path / "hps.pt")
    weights = METRICS["hps_v2"].weights[0]
    assert torch.equal(load_file(weights.add(tmp_path / "hps.pt"))["visual.proj"], torch.eye(3))

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DdilError, match=r"evil.pt is not the checkpoint of HPS v2; fetch it again"):
        hps.convert_hps_weights(tmp_path / "evil.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.safetensors").exists()


# ddil metrics


def test_every_metric_s_weights_are_listed_with_their_place(cli: Callable[..., Result], cache: Path) -> None:
    rows = {row["name"]: row for row in json.loads(cli("metrics", "--json").stdout)}
    (inception,) = rows["fid"]["weights"]
    assert inception["place"] == str(cache / "weights" / "inception-2015-12-05.pt")
    assert (inception["here"], inception["check"], inception["sha256"]) == (False, "unverified", None)
    assert inception["source"].startswith("https://") and not rows["fid"]["here"]
    assert rows["drawn_right"]["weights"] == []
    assert not cache.exists()  # looking fetches nothing and makes nothing
    printed = cli("metrics").stdout.replace("\n", "")
    assert f"{inception['place']} (not here, unverified), from {inception['source']}" in printed


def test_weights_are_added_by_the_metric_s_name(cli: Callable[..., Result], cache: Path, tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "published.pt")
    done = cli("metrics", "--add", f"fid={tmp_path / 'published.pt'}", "--json")
    assert done.exit_code == 0 and "inception-2015-12-05.pt" in done.stderr
    assert METRICS["fid"].weights[0].checked().read_bytes() == (tmp_path / "published.pt").read_bytes()
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["fid"]["weights"][0]["here"] and rows["kid"]["weights"][0]["here"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--get", "drawn_right"], 2, "'drawn_right' is not a metric with weights; it may be one of fid, "),
        (["--add", "fid"], 2, "--add takes NAME=FILE with one file of weights for each name, not 'fid'"),
        (["--add", "fid=absent.pt"], 2, "absent.pt is not here; name the file that holds the weights inception"),
    ],
)
def test_a_wrong_name_is_one_sentence(
    cli: Callable[..., Result], arguments: list[str], status: int, words: str
) -> None:
    failed = cli("metrics", *arguments)
    assert (failed.exit_code, failed.stdout) == (status, "") and words in failed.stderr


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fid", "is no TorchScript file, as inception-2015-12-05.pt is; fetch it again"),
        ("clip_score", "is no safetensors file, or is cut short; fetch it again"),
        ("fd_dinov2", "is no safetensors file, or is cut short; fetch it again"),
        ("hps_v2", "is not the checkpoint of HPS v2; fetch it again"),
        ("fid_pytorch", "is not the file that its source publishes (sha256 "),
        ("lpips_diversity", "is not the file that its source publishes (sha256 "),
        ("fd_efflite0", "is not the file that its source publishes (sha256 "),
    ],
)
def test_a_file_of_another_kind_is_not_added(
    cli: Callable[..., Result], cache: Path, tmp_path: Path, name: str, kind: str
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("experiment: systems\n")
    failed = cli("metrics", "--add", f"{name}={bad}")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith(f"error: {bad} {kind}")
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_weights_of_another_network_are_not_added(cli: Callable[..., Result], cache: Path, tmp_path: Path) -> None:
    save_file({"visual.proj": torch.eye(3)}, tmp_path / "other.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle.pt")  # a zip file too, without code
    for name, file, what in (
        ("clip_score", "other.safetensors", "'token_embedding.weight'"),
        ("fd_dinov2", "other.safetensors", "'cls_token'"),
        ("fid", "pickle.pt", "is no TorchScript file"),
    ):
        failed = cli("metrics", "--add", f"{name}={tmp_path / file}")
        assert failed.exit_code == 1 and what in failed.stderr
    absent = cli("metrics", "--add", f"hps_v2={tmp_path / 'other.safetensors'}", "--add", "fid=absent.pt")
    assert absent.exit_code == 2
    assert not any(path.is_file() for path in cache.rglob("*"))  # not the first either


def test_the_table_of_weights_names_each_file_once() -> None:
    files = {weights.file: weights for metric in METRICS.values() for weights in metric.weights}
    assert all(metric.weights[0] is files[metric.weights[0].file] for metric in METRICS.values() if metric.weights)
    assert all(weights.url or weights.cure for weights in files.values())


def test_safetensors_are_taken_as_they_are(tmp_path: Path, cache: Path) -> None:
    save_file({"slice1.0.bias": torch.ones(3)}, tmp_path / "given.safetensors")
    place = lpips_alexnet.WEIGHTS.add(tmp_path / "given.safetensors")
    assert place.read_bytes() == (tmp_path / "given.safetensors").read_bytes()


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    """A ReLU turns −∞ into 0: the features are finite, and so is the metric."""
    path = tmp_path / "it.safetensors"
    save_file({"a.weight": torch.ones(2), "a.bias": torch.tensor([0.0, value])}, path)
    with pytest.raises(DdilError, match=r"holds weights that are not finite, first in a\.bias; delete it and get it"):
        read_weights(path)
    save_file({"a.weight": torch.ones(2), "places": torch.arange(3)}, path)
    assert set(read_weights(path)) == {"a.weight", "places"}
