"""Networks of metrics against the packages that define them, on small or random weights where the real ones are not here.

Inception's real features cannot be checked without its weights: a TorchScript of the same interface with random weights
checks the path (place, resizing, normalisation, layers), and nothing about FID's published values.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ddil_core.shapes.batches import draw_batch
from ddil_core.support.errors import DdilError
from ddil_eval.experiments.measurement import Cells
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.recipes import Clip, load_recipe
from ddil_eval.metrics import METRICS, WeightsFile, clip_embedding, clip_towers, dinov2, efflite0, lpips_alexnet
from ddil_eval.metrics.lpips_alexnet import mean_distance
from ddil_eval.metrics.weights_file import weights_folder
from tests.pixels import add_metric

CAPTIONS = ["a red circle", "a blue star on grey", "two squares", "nothing at all", "a dog", "a cat"]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Six smooth pictures, 48 × 64."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 6, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((64, 48), Image.Resampling.BICUBIC)) for image in small])


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDIL_CACHE", str(tmp_path / "cache"))
    weights_folder().mkdir(parents=True)
    return weights_folder()


# Inception


class RandomInception(torch.nn.Module):
    """The interface of NVIDIA's TorchScript: ``layers`` takes normalised pictures [B, 3, 299, 299] to [B, 2048, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 7, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4),
            torch.nn.Flatten(), torch.nn.Linear(128, 2048), torch.nn.Unflatten(1, (2048, 1, 1)),
        )  # fmt: skip

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.layers((x - 128) / 128)


@pytest.fixture
def random_inception(own_cache: Path) -> Path:
    torch.manual_seed(0)
    path = own_cache / "inception-2015-12-05.pt"
    torch.jit.script(RandomInception().eval()).save(str(path))
    return path


def test_inception_s_path_is_clean_fid_s_own(random_inception: Path, images: np.ndarray, tmp_path: Path) -> None:
    """Pictures as PNG through clean-fid's folder reader and model wrapper, against ours: random weights, same features."""
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    model = InceptionV3W(str(random_inception.parent), download=False)
    theirs = get_folder_features(
        str(folder), model, num_workers=0, mode="clean", device=torch.device("cpu"), verbose=False
    )
    ours = METRICS["fid"].network.open_on("cpu")(images, [""] * 6)
    assert ours.shape == (6, 2048) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    alone = np.concatenate([METRICS["fid"].network.open_on("cpu")(image[None], [""]) for image in images])
    np.testing.assert_allclose(ours, alone, atol=1e-5)


def test_metrics_on_inception_extract_once(random_inception: Path, images: np.ndarray) -> None:
    names = ("fid", "fid_infinity", "kid", "precision", "recall", "density", "coverage")
    extractors = Extractors(names, "cpu")
    features = extractors(images, [""] * 6)
    assert list(features) == ["inception"] and extractors.metrics == names
    cells = Cells({"inception": features["inception"]}, {"it": np.arange(6)}, dict(features), metrics=names)
    found = cells.estimates(cells.single())["it"]
    assert list(found) == list(names)
    assert found["fid"].value == pytest.approx(0, abs=1e-9) and found["precision"].value == 1
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in found.values())
    assert found["fid"].low >= 0 and found["recall"].high <= 1


def test_a_file_that_is_no_torchscript_is_one_sentence(own_cache: Path) -> None:
    (own_cache / "inception-2015-12-05.pt").write_bytes(b"no network")
    with pytest.raises(
        DdilError, match="inception-2015-12-05.pt is not the TorchScript of Inception; get it again with"
    ):
        METRICS["fid"].network.open_on("cpu")


# open_clip


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A random model of open_clip with a name and a file of weights, of 336 × 336 pixels as CMMD's."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 336, "patch_size": 84, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "tiny-clip-of-a-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip-of-a-test.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip-of-a-test")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "tiny.safetensors")
    return "tiny-clip-of-a-test", folder / "tiny.safetensors"


def by_open_clip(tiny_clip: tuple[str, Path], images: np.ndarray, captions: list[str]) -> np.ndarray:
    import open_clip

    name, path = tiny_clip
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(path))
    model.eval()
    with torch.no_grad():
        pictures = model.encode_image(torch.stack([preprocess(Image.fromarray(image)) for image in images]))
        texts = model.encode_text(open_clip.get_tokenizer(name)(captions))
    return torch.nn.functional.cosine_similarity(pictures, texts)[:, None].numpy()


def test_a_clip_score_is_open_clip_s_own_cosine(tiny_clip: tuple[str, Path], images: np.ndarray) -> None:
    name, path = tiny_clip
    extract = clip_towers.open_cosine(name, WeightsFile("tiny", place=lambda: path))("cpu")
    scores = extract(images, CAPTIONS)
    np.testing.assert_allclose(scores, by_open_clip(tiny_clip, images, CAPTIONS), atol=1e-6)
    alone = np.concatenate([extract(images[i : i + 1], CAPTIONS[i : i + 1]) for i in range(6)])
    np.testing.assert_allclose(scores, alone, atol=1e-6)
    assert scores.shape == (6, 1) and scores.dtype == np.float32 and scores.std() > 1e-4


def test_a_recipe_s_prefix_stands_before_what_reads_it(
    tiny_clip: tuple[str, Path], images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    name, path = tiny_clip
    weights = WeightsFile("tiny", place=lambda: path)
    for metric, prefixed in (("with_prefix", True), ("without", False)):
        network = clip_towers.cosine_network(metric, name, weights, "tiny", prefixed=prefixed)
        add_metric(monkeypatch, replace(METRICS["clip_score"], name=metric, network=network))
    clip = Clip(model=name, weights="tiny", prefix="A photo depicts ")
    recipe = load_recipe("shapes").model_copy(update={"clip": clip})
    features = Extractors(["with_prefix", "without"], "cpu", recipe)(images, CAPTIONS)
    prefixed = by_open_clip(tiny_clip, images, [f"A photo depicts {caption}" for caption in CAPTIONS])
    np.testing.assert_allclose(features["with_prefix"], prefixed, atol=1e-6)
    np.testing.assert_allclose(features["without"], by_open_clip(tiny_clip, images, CAPTIONS), atol=1e-6)
    assert METRICS["clip_score"].network.prefixed and not METRICS["hps_v2"].network.prefixed


def test_damaged_towers_are_one_sentence(tiny_clip: tuple[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(tiny_clip[1].read_bytes()[:1000])
    with pytest.raises(DdilError, match=r"damaged.safetensors does not hold the weights of tiny-clip-of-a-test"):
        clip_towers.load_clip_towers(tiny_clip[0], damaged, "cpu")


def test_embeddings_for_cmmd_are_unit_vectors_of_clip(
    tiny_clip: tuple[str, Path], images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_embedding, "ARCHITECTURE", tiny_clip[0])
    monkeypatch.setattr(clip_embedding, "WEIGHTS", WeightsFile("tiny", place=lambda: tiny_clip[1]))
    extract = clip_embedding.open_embeddings("cpu")
    features = extract(images, [""] * 6)
    assert features.shape == (6, 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(features[2:3], extract(images[2:3], [""]), atol=1e-6)


def test_pictures_for_cmmd_are_resized_by_the_antialiased_bicubic_in_float() -> None:
    """PIL's filter, which has the same kernel (a = −1/2), channel by channel in float."""
    image = np.random.default_rng(1).integers(0, 256, (500, 400, 3), dtype=np.uint8)
    channels = [
        Image.fromarray(image[:, :, c].astype(np.float32)).resize((336, 336), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    mean, std = (np.array(numbers)[:, None, None] for numbers in (clip_embedding.MEAN, clip_embedding.STD))
    expected = (np.stack(channels) / 255 - mean) / std
    np.testing.assert_allclose(clip_embedding.prepare_cmmd(image[None])[0], expected, atol=2e-4)


# DINOv2


def test_position_embeddings_are_interpolated_as_dinov2_does() -> None:
    """A ramp stays nearly a ramp: patch i of 16 stands at (i + ½) · 37 / 16.1 − ½ of the 37, not at that of 37 / 16."""
    ramp = torch.arange(37.0).expand(37, 37).reshape(1, 37 * 37, 1)
    embeddings = torch.cat([torch.full((1, 1, 1), -7.0), ramp], dim=1)
    found = dinov2.interpolate(embeddings, 16)
    assert found.shape == (1, 257, 1) and found[0, 0, 0] == -7
    rows = found[0, 1:, 0].reshape(16, 16)
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(rows[8, 1:-1], expected[1:-1], atol=0.05, rtol=0)  # this bicubic bends a line by 0.05
    assert 14.5 * 37 / 16 - 0.5 - rows[8, 14] > 0.1
    assert torch.equal(dinov2.interpolate(found, 16), found)


def test_a_dinov2_of_timm_reads_pictures_of_224(
    tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small architecture with random weights in the published layout, 37 × 37 positions."""
    import timm

    torch.manual_seed(0)
    published = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0)
    save_file(published.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(DdilError, match="small.safetensors does not hold the weights of vit_base_patch14_dinov2"):
        dinov2.load_vit(tmp_path / "small.safetensors", "cpu", "vit_base_patch14_dinov2")
    monkeypatch.setattr(dinov2, "ARCHITECTURE", "vit_small_patch14_dinov2")
    monkeypatch.setattr(dinov2, "WEIGHTS", WeightsFile("small", place=lambda: tmp_path / "small.safetensors"))
    extract = dinov2.open_dinov2("cpu")
    features = extract(images[:2], [""] * 2)
    assert features.shape == (2, 384) and features.dtype == np.float32
    np.testing.assert_allclose(features[1:], extract(images[1:2], [""]), atol=1e-4)
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, dynamic_img_size=True)
    model.load_state_dict(published.state_dict())  # timm's own way to other sizes, which antialiases
    theirs = model.eval().forward_features(dinov2.prepare_dinov2(images[:2]))[:, 0].detach().numpy()
    assert 0 < np.linalg.norm(features - theirs) < 0.05 * np.linalg.norm(theirs)


def test_pictures_for_dinov2_are_resized_as_pillow_does(images: np.ndarray) -> None:
    pixels = dinov2.prepare_dinov2(images)
    by_pillow = np.asarray(Image.fromarray(images[0]).resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
    assert pixels.shape == (6, 3, 224, 224)
    expected = (by_pillow / 255 - np.array(dinov2.MEAN)) / np.array(dinov2.STD)
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0), expected, atol=1e-6)


# LPIPS


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def alexnet(shared: Path) -> Path:
    path = shared / "weights" / "lpips_alexnet_features.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path


def test_lpips_is_the_package_s_on_real_layers(alexnet: Path, own_cache: Path) -> None:
    """0.7219 and 0.1376 between the three pictures, as the package gives them; ours is the mean over all pairs."""
    import lpips

    (own_cache / "lpips_alexnet_features.safetensors").symlink_to(alexnet)
    reference, first, second = (picture(alexnet.parent / f"lpips_{name}.png") for name in ("ref", "p0", "p1"))
    extract = METRICS["lpips_diversity"].network.open_on("cpu")
    assert extract(np.stack([reference, first]), [""] * 2)[0, 0] == pytest.approx(0.7219, abs=5e-5)
    assert extract(np.stack([reference, second]), [""] * 2)[0, 0] == pytest.approx(0.1376, abs=5e-5)

    theirs = lpips_alexnet.load_lpips(alexnet)
    assert isinstance(theirs, lpips.LPIPS)
    tensors = [
        torch.from_numpy(p.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for p in (reference, first, second)
    ]
    with torch.no_grad():
        pairs = [float(theirs(tensors[a], tensors[b])) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert extract(np.stack([reference, first, second]), [""] * 3)[0, 0] == pytest.approx(np.mean(pairs), rel=1e-5)


def test_lpips_takes_the_package_s_heads(own_cache: Path, images: np.ndarray) -> None:
    """On random layers, so that it runs where AlexNet's are not: the package's own forward against ours."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), own_cache / "alexnet.pth")
    path = own_cache / "lpips_alexnet_features.safetensors"
    lpips_alexnet.convert_lpips_weights(own_cache / "alexnet.pth", path)
    theirs = lpips_alexnet.load_lpips(path)
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        pairs = [float(theirs(tensors[a][None], tensors[b][None])) for a in range(6) for b in range(a)]
    found = METRICS["lpips_diversity"].network.open_on("cpu")(images, [""] * 6)
    assert found.shape == (1, 1) and found[0, 0] == pytest.approx(np.mean(pairs), rel=1e-5)


def test_the_mean_distance_of_unit_vectors_has_its_closed_form() -> None:
    """Two layers: orthogonal vectors are 2 apart, opposite ones 4; parallel ones, of any length, 0."""
    along, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    layers = [
        torch.stack([along, 5 * along, across])[:, :, None, None].expand(3, 2, 4, 4),
        torch.stack([along, -along, along])[:, :, None, None].expand(3, 2, 1, 1),
    ]
    ones = [torch.ones(2), torch.ones(2)]
    assert mean_distance(layers, ones) == pytest.approx((0 + 2 + 2 + 4 + 0 + 4) / 3, rel=1e-6)
    assert mean_distance(layers, [torch.zeros(2), ones[1]]) == pytest.approx(8 / 3, rel=1e-6)
    with pytest.raises(DdilError, match="at least two images; ask for more images for each prompt"):
        mean_distance([layer[:1] for layer in layers], ones)


def test_lpips_efflite0_grows_with_difference_and_forgets_the_order() -> None:
    if efflite0.WEIGHTS.missing() is not None:
        pytest.skip(efflite0.WEIGHTS.missing() or "")
    extract = METRICS["lpips_efflite0"].network.open_on("cpu")
    pictures = draw_batch(4, 0, seed=3).images
    noise = np.random.default_rng(0).normal(size=pictures[:1].shape)
    equal, near, apart = (
        np.concatenate([pictures[:1], np.clip(pictures[:1] + s * noise, 0, 255).astype(np.uint8)]) for s in (0, 4, 60)
    )
    distances = [extract(pair, [""] * 2)[0, 0] for pair in (equal, near, apart)]
    assert distances[0] == 0 < distances[1] < distances[2] <= 4 * 5
    whole = extract(pictures, [""] * 4)[0, 0]
    assert extract(pictures[::-1], [""] * 4)[0, 0] == pytest.approx(whole, rel=1e-5)
    pairs = [extract(pictures[[a, b]], [""] * 2)[0, 0] for a in range(4) for b in range(a)]
    assert whole == pytest.approx(np.mean(pairs), rel=1e-5)


def test_pictures_of_a_prompt_are_scored_together() -> None:
    if efflite0.WEIGHTS.missing() is not None:
        pytest.skip(efflite0.WEIGHTS.missing() or "")
    extractors = Extractors(["lpips_efflite0", "drawn_right"], "cpu", images_per_prompt=2)
    batch = draw_batch(4, 0, seed=3)
    groups = batch.images.reshape(2, 2, 64, 64, 3)
    features = extractors.groups(groups, batch.captions[::2])
    assert {name: value.shape for name, value in features.items()} == {"lpips_efflite0": (2, 1)}
    both = extractors(batch.images, batch.captions)
    assert {name: value.shape for name, value in both.items()} == {"lpips_efflite0": (2, 1), "drawn_right": (2, 1)}
    np.testing.assert_array_equal(both["lpips_efflite0"], features["lpips_efflite0"])
