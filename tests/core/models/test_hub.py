"""Hub models through the real ``huggingface_hub``, against a hub on 127.0.0.1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ddil_core.models.catalogue import list_models
from ddil_core.models.fetch import fetch_model
from ddil_core.models.hub import Repository, download_files, pipeline_files_on_hub, plan_download, size_text
from ddil_core.models.model import Model, load_model
from ddil_core.models.references import hub_parts, is_here, resolve
from ddil_core.models.system_specs import PIPELINE_FILES
from ddil_core.support.errors import DdilError, WrongCommand
from tests.hub import Hub, serve
from tests.single_file import single_file

UNET = "unet/diffusion_pytorch_model.safetensors"
NAME = "org/tiny"


@contextmanager
def no_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda n: None


def get(reference: str = NAME, variant: str | None = None) -> list[str]:
    """Fetch a reference. Return the lines that announced the download."""
    said: list[str] = []
    fetch_model(reference, variant, said.append, no_bar)
    return said


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the tiny pipeline and the other files that such repositories hold, and an empty cache."""
    published = tmp_path / "published"
    shutil.copytree(folder, published)
    half = {name: weight.half() for name, weight in load_file(published / UNET).items()}
    save_file(half, published / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for name in (
        "whole.safetensors",
        "unet/diffusion_pytorch_model.non_ema.bin",
        "unet/model.py",
        "other/model.safetensors",
    ):
        path = published / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not asked for")
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.add(NAME, published)
        yield hub


def blobs(pattern: str = "*") -> list[Path]:
    return sorted((Repository(NAME).storage / "blobs").glob(pattern))


def blob_of(hub: Hub, path: str) -> Path:
    sha = next(row["lfs"]["oid"] for row in hub.tree(NAME) if row["path"] == path)  # type: ignore[index]
    return Repository(NAME).storage / "blobs" / str(sha)


# What is fetched


def test_a_hub_model_is_fetched_once_asked_for_and_loads_offline(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WrongCommand) as error:
        load_model(NAME)
    assert str(error.value) == (
        f"the model {NAME!r} is no folder, and as a model of the hub it is not here; get it with: ddil models download "
        f"{NAME}, or add --download (in Python: download=True)"
    )
    assert hub.asked == []
    said = get()
    commit = hub.revisions[NAME]["main"]
    assert said[0].startswith(f"{NAME} at {commit[:12]}: ") and " files to fetch, " in said[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ours, theirs = load_model(NAME), load_model(str(folder))
    for name, weight in ours.pipeline.unet.state_dict().items():
        assert torch.equal(weight, theirs.pipeline.unet.state_dict()[name])
    assert is_here(NAME) and not blobs("*.incomplete")


def test_python_loads_a_hub_model_in_one_call(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(NAME, "cpu", download=True)
    assert model.reference == NAME and is_here(NAME)
    assert " files to fetch, " in capsys.readouterr().err
    hub.asked.clear()
    load_model(NAME, "cpu", download=True)
    assert hub.asked == []


def test_only_what_the_pipeline_uses_is_asked_for(hub: Hub) -> None:
    get()
    asked = {path for path, _, _ in hub.asked}
    assert UNET in asked and "model_index.json" in asked
    assert asked & {"whole.safetensors", "other/model.safetensors", "unet/model.py", "ddil.json"} == set()
    assert not any(path.endswith((".bin", ".py")) or "fp16" in path for path in asked)


def test_a_second_download_asks_for_no_file(hub: Hub) -> None:
    get()
    hub.asked.clear()
    (said,) = get()
    assert said.endswith("are here")
    assert hub.asked == []


def test_a_variant_is_taken_where_a_component_has_it(hub: Hub) -> None:
    get(variant="fp16")
    asked = {path for path, _, _ in hub.asked}
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in asked and UNET not in asked
    assert "vae/diffusion_pytorch_model.safetensors" in asked  # it has no other
    model = load_model(NAME)  # the only files that are here
    whole = load_file(hub.folders[NAME] / UNET)
    assert all(torch.equal(w, whole[name].half().float()) for name, w in model.pipeline.unet.state_dict().items())
    assert load_model(NAME, dtype=torch.bfloat16).pipeline.unet.dtype == torch.bfloat16
    with pytest.raises(WrongCommand, match=r"^the hub model org/tiny has no weights of the variant 'fp8'$"):
        get(variant="fp8")


def test_a_pinned_revision_is_the_one_that_is_fetched_and_found(hub: Hub) -> None:
    commit = hub.revisions[NAME]["main"]
    get(f"{NAME}@{commit}")
    assert resolve(f"{NAME}@{commit}").folder.name == commit
    assert not is_here(f"{NAME}@v1")
    get(f"{NAME}@v1")
    assert is_here(f"{NAME}@v1")


# What goes wrong


def test_an_interrupted_file_goes_on_where_it_stopped(hub: Hub) -> None:
    content = (hub.folders[NAME] / UNET).read_bytes()
    partial = blob_of(hub, UNET).with_name(blob_of(hub, UNET).name + ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content[:10_000])
    with pytest.raises(
        WrongCommand, match=r"the hub it is here in part \(9.77 KiB of an interrupted download\); get it"
    ):
        resolve(NAME)
    get()
    assert hub.sent(UNET) == [(UNET, "bytes=10000-", len(content) - 10_000)]
    assert blob_of(hub, UNET).read_bytes() == content and not blobs("*.incomplete")
    assert is_here(NAME)


def test_an_interrupted_file_that_is_too_long_starts_again(hub: Hub) -> None:
    blob = blob_of(hub, UNET)
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.incomplete").write_bytes((hub.folders[NAME] / UNET).read_bytes() + b"more")
    get()
    assert [span for _, span, _ in hub.sent(UNET)] == [None]
    assert is_here(NAME) and not blobs("*.incomplete")


def test_a_file_that_is_not_what_the_hub_says_is_refused_and_fetched_again(hub: Hub) -> None:
    content = (hub.folders[NAME] / UNET).read_bytes()
    hub.lies[UNET] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(
        DdilError, match=rf"^the file {UNET} of the hub model org/tiny came with the SHA-256 .*run the command"
    ):
        get()
    assert not blob_of(hub, UNET).exists() and not blobs("*.incomplete")
    hub.lies.clear()
    get()
    assert is_here(NAME)


def test_a_file_cut_short_in_the_cache_is_refused_and_fetched_again(hub: Hub) -> None:
    get()
    blob = blob_of(hub, UNET)
    blob.write_bytes(blob.read_bytes()[:5000])
    with pytest.raises(DdilError) as error:
        load_model(NAME)
    message = str(error.value)
    assert message.startswith(f"the weights {resolve(NAME).folder / UNET} are cut short or damaged (")
    assert message.endswith(f"; get it again with: ddil models download {NAME}")
    get()
    assert load_model(NAME) is not None


def test_a_snapshot_that_lacks_a_file(hub: Hub) -> None:
    get()
    (resolve(NAME).folder / UNET).unlink()
    with pytest.raises(
        DdilError, match=r"^the component unet of the model 'org/tiny' has no weights in .*models download"
    ):
        load_model(NAME)
    get()
    assert is_here(NAME)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("org/none", r"^the hub at http://127.0.0.1:\d+ has no public model org/none$"),
        (f"{NAME}@v9", r"^the hub model org/tiny has no revision 'v9'$"),
        ("org/bare", r"^the hub model org/bare is no pipeline in diffusers' layout, as it has no model_index.json$"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path, reference: str, sentence: str) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    hub.add("org/bare", tmp_path / "bare")
    with pytest.raises(WrongCommand, match=sentence):
        get(reference)


def test_a_model_of_pickles_alone_is_not_fetched(hub: Hub) -> None:
    weights = hub.folders[NAME] / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(DdilError) as error:
        get()
    assert str(error.value) == (
        "the hub model org/tiny has the weights of its component vae only as a pickle (diffusion_pytorch_model.bin), "
        "which is not fetched because it can run code; get a copy by hand and turn it into safetensors with: ddil "
        "models convert FOLDER OUT"
    )
    assert {path for path, _, _ in hub.asked} == {"model_index.json"}


def test_offline_nothing_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DdilError, match="^HF_HUB_OFFLINE is set, so nothing is fetched; unset HF_HUB_OFFLINE to"):
        get()
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        DdilError, match="^org/tiny could not be fetched from http://127.0.0.1:9: .*run the command again$"
    ):
        get()


def test_a_disk_that_is_too_small(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plan_download(Repository(NAME), PIPELINE_FILES)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DdilError, match="has 0.98 KiB free; make room, or set HF_HOME to a larger disk$"):
        download_files(wanted, no_bar)
    assert hub.sent(UNET) == []


# Systems


def test_a_system_fetches_its_base_and_its_own_file(hub: Hub, tmp_path: Path) -> None:
    assert [str(part.repository) for part in hub_parts("lcm-lora")] == [
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "latent-consistency/lcm-lora-sdv1-5",
    ]
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file({"lora": torch.zeros(2)}, lora / "pytorch_lora_weights.safetensors")
    hub.add("stable-diffusion-v1-5/stable-diffusion-v1-5", hub.folders[NAME])
    hub.add("latent-consistency/lcm-lora-sdv1-5", lora)
    rows = {row["name"]: row for row in list_models()}
    assert rows["lcm-lora"]["here"] is False and rows["lcm-lora"]["bytes"] == 0
    assert rows["lcm-lora"]["needs"] == (
        "is not here: it needs stable-diffusion-v1-5/stable-diffusion-v1-5 and pytorch_lora_weights.safetensors of "
        "latent-consistency/lcm-lora-sdv1-5 of the hub; get it with: ddil models download lcm-lora, or add --download "
        "(in Python: download=True)"
    )
    get("lcm-lora")
    files = resolve("lcm-lora")
    assert files.system is not None and files.system.title == "LCM-LoRA (SD 1.5)"
    assert files.lora is not None and files.lora.name == "pytorch_lora_weights.safetensors"
    assert files.folder == resolve("sd15").folder
    rows = {row["name"]: row for row in list_models()}
    assert (rows["sd15"]["here"], rows["sd15"]["needs"], rows["sd15"]["revision"]) == (True, "", "unverified")
    taken = sum(path.stat().st_size for path in files.folder.rglob("*") if path.is_file())
    assert rows["lcm-lora"]["bytes"] == taken + files.lora.stat().st_size


def test_a_single_file_as_a_system_fetches_its_configuration_alone(hub: Hub, model: Model, tmp_path: Path) -> None:
    one = tmp_path / "one.safetensors"
    save_file(single_file(model.pipeline), one)
    hub.add("stable-diffusion-v1-5/stable-diffusion-v1-5", hub.folders[NAME])
    with pytest.raises(WrongCommand, match="get it with: ddil models download sd15 --config-only, or name"):
        resolve(str(one))
    get(f"sd15:{one}")
    assert not [path for path, _, _ in hub.asked if path.endswith(".safetensors")]
    for reference in (f"sd15:{one}", str(one)):
        assert is_here(reference)
        loaded = load_model(reference)
        assert loaded.sampling.solver == "dpmpp_2m"
        ours, theirs = (each.pipeline.unet.state_dict() for each in (loaded, model))
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert not is_here("sd15")


def test_a_system_that_is_published_as_a_pickle_is_got_by_hand(hub: Hub) -> None:
    hub.add("stabilityai/stable-diffusion-xl-base-1.0", hub.folders[NAME])
    with pytest.raises(DdilError) as error:
        get("dmd2")
    assert is_here("sdxl")
    assert str(error.value) == (
        "the model 'dmd2' is published as a pickle, dmd2_sdxl_4step_unet.bin of tianweiy/DMD2, which is never fetched "
        "because it can run code; get it by hand, turn it into safetensors with: ddil models convert "
        "dmd2_sdxl_4step_unet.bin dmd2_sdxl_4step_unet.safetensors, and name the model "
        "dmd2:dmd2_sdxl_4step_unet.safetensors"
    )
    own = hub.folders[NAME] / UNET
    files = resolve(f"dmd2:{own}")
    assert (files.unet, files.lora, files.folder) == (own, None, resolve("sdxl").folder)


def test_a_rows_own_choice_of_files_is_kept(hub: Hub) -> None:
    chosen = plan_download(Repository(NAME), ("model_index.json", "unet/*"))
    assert {file.path for file in chosen.files} == {"model_index.json", "unet/config.json", UNET}
    single = plan_download(Repository(NAME), UNET)
    assert [file.path for file in single.missing] == [UNET]
    for name, sentence in {
        "unet/none.safetensors": "has no file",
        "unet/model.py": "is not fetched: only .safetensors",
    }.items():
        with pytest.raises(DdilError, match=sentence):
            plan_download(Repository(NAME), name)


# Names of files


def test_the_files_of_sharded_weights_and_variants() -> None:
    index = {
        "_class_name": "X",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "image_encoder": [None, None]}
    stem = "unet/diffusion_pytorch_model"
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    plain, other = f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"
    frame = ["model_index.json", "unet/config.json"]
    names = [
        *frame,
        "scheduler/scheduler_config.json",
        "safety_checker/model.safetensors",
        *shards,
        *half,
        plain,
        other,
    ]
    wanted = set(pipeline_files_on_hub(names, index, NAME))
    assert wanted == {*frame, "scheduler/scheduler_config.json", *shards, plain}
    wanted = set(pipeline_files_on_hub(names, index, NAME, "fp16"))
    assert wanted == {*frame, "scheduler/scheduler_config.json", *half, other}
    assert set(pipeline_files_on_hub(names, index, NAME, weights=False)) == {*frame, "scheduler/scheduler_config.json"}
    with pytest.raises(DdilError, match="^the hub model org/tiny has no weights for its component unet$"):
        pipeline_files_on_hub(frame, index, NAME)


@pytest.mark.parametrize("reference", ["a", "a/b/c", "a b/c", "../b", "a/b@", "a//b", "", "a/-b", "a--b/c", "@v1"])
def test_what_is_no_hub_id(reference: str) -> None:
    assert Repository.parse(reference) is None


def test_hub_ids() -> None:
    assert Repository.parse("org/name-1.5_x") == Repository("org/name-1.5_x")
    assert Repository.parse("org/name@refs/pr/3") == Repository("org/name", "refs/pr/3")


def test_sizes_in_words() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 10_240, 12_900_000, 4_265_380_000)] == [
        "0 B", "999 B", "0.98 KiB", "10.0 KiB", "12.3 MiB", "3.97 GiB",
    ]  # fmt: skip


def test_the_listing_is_json(hub: Hub) -> None:
    assert json.loads(json.dumps(list_models()))[0]["name"] == "shapes"


# Interruptions that really happen


def test_a_download_that_is_stopped_goes_on_from_its_last_byte(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of the U-Net: the next run asks only for the rest."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)

    @contextmanager
    def stopping(title: str, total: int) -> Iterator[Callable[[int], None]]:
        received = 0

        def advance(n: int) -> None:
            nonlocal received
            received += n
            if received > 100_000:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        fetch_model(NAME, None, print, stopping)
    (partial,) = blobs("*.incomplete")
    kept = partial.stat().st_size
    assert 0 < kept < 100_000 and not is_here(NAME)
    listed = {blob_of(hub, str(row["path"])).name: row for row in hub.tree(NAME) if "lfs" in row}
    path, size = str(listed[partial.stem]["path"]), int(str(listed[partial.stem]["size"]))
    hub.asked.clear()
    get()
    assert hub.sent(path) == [(path, f"bytes={kept}-", size - kept)]
    assert is_here(NAME) and not blobs("*.incomplete")


def test_a_connection_that_drops_is_taken_up_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.drops[UNET] = 205_000
    get()
    assert [span for _, span, _ in hub.sent(UNET)] == [None, "bytes=200000-"]  # whole pieces are kept
    assert is_here(NAME)
