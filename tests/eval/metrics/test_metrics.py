"""Metrics on pictures whose answer is known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from ddil_core.shapes import scorer
from ddil_core.shapes.batches import ShapesBatch, draw_batch
from ddil_core.shapes.scene import IMAGE_SIZE
from ddil_core.shapes.training.architecture import MAX_TOKENS, write_tokenizer
from ddil_core.support.environment import full_precision
from ddil_core.support.errors import DdilError
from ddil_eval.metrics import METRICS, Extractor, efflite0, shapes_world
from ddil_eval.metrics.on_cpu import fold_batch_norms
from ddil_eval.statistics import estimate_mean, frechet_distance

OUTSIDE = ["a photo of a dog"]


@pytest.fixture(scope="module")
def batch() -> ShapesBatch:
    return draw_batch(12, 0, split="validation", seed=5)


@pytest.fixture(scope="module")
def scorer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer")
    torch.manual_seed(0)
    scorer.save_scorer(scorer.build_scorer(), write_tokenizer(folder), folder)
    return folder


@pytest.fixture(scope="module")
def extract_efflite0() -> Extractor:
    problem = METRICS["fd_efflite0"].missing()
    if problem is not None:
        pytest.skip(problem)
    return METRICS["fd_efflite0"].network.open_on("cpu")


def test_the_table_names_each_metric_with_its_direction() -> None:
    rows = {name: (metric.name, metric.direction, metric.kind) for name, metric in METRICS.items()}
    lower = {"fid", "fid_infinity", "kid", "fd_dinov2", "cmmd", "fd_efflite0"}
    sets = lower | {"precision", "recall", "density", "coverage"}
    groups, alone = {"lpips_diversity", "lpips_efflite0"}, {"vendi_dinov2", "vendi_efflite0"}
    means = {"clip_score", "clip_score_s34b", "hps_v2", "clip_score_shapes", "drawn_right"}
    kinds = {
        name: kind
        for kind, names in (("set", sets), ("group", groups), ("alone", alone), ("mean", means))
        for name in names
    }
    expected = {name: (name, "lower" if name in lower else "higher", kind) for name, kind in kinds.items()}
    assert rows.items() >= expected.items()
    assert all((metric.statistic is not None) == (metric.kind in ("set", "alone")) for metric in METRICS.values())


def test_metrics_of_one_network_share_its_name_and_no_other_does() -> None:
    networks = {metric.network.name: metric.network for metric in METRICS.values()}
    assert all(networks[metric.network.name] is metric.network for metric in METRICS.values())


def test_the_statistic_of_a_metric_takes_the_reference() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30, 4))

    def value(name: str, features: np.ndarray, reference: np.ndarray | None = None) -> float:
        statistic = METRICS[name].statistic
        assert statistic is not None
        return float(statistic(reference).values(features)[METRICS[name].column])

    assert value("fd_efflite0", x, y) == frechet_distance(x, y)
    assert value("vendi_efflite0", x) == pytest.approx(value("vendi_efflite0", -2 * x), rel=1e-9)
    assert value("recall", x, y) == value("precision", y, x)


def test_no_interval_passes_the_bounds_of_its_metric() -> None:
    """Also of few pictures whose scores lie next to a bound."""
    for metric in METRICS.values():
        low, high = metric.bounds
        # the first two are unbiased, so that they may fall a little below 0; a likelihood has no bounds
        assert (low > -np.inf) or metric.name in {"kid", "energy_distance", "log_likelihood"}
        if metric.statistic is None and low > -np.inf:
            scores = np.array([low, low + 0.01, low + 0.3] if high == np.inf else [high, high - 0.01, high - 0.3])
            found = estimate_mean(scores[:, None], [1], rate=metric.rate, lowest=low, highest=high)
            assert low <= found.low <= found.value <= found.high <= high


def test_the_table_of_metrics_needs_no_torch() -> None:
    code = (
        "import sys; from ddil_eval.metrics import METRICS\n"
        "for metric in METRICS.values(): metric.missing()\n"
        "print(len(METRICS), sorted({'torch', 'timm', 'open_clip', 'lpips', 'cleanfid'} & set(sys.modules)))"
    )
    assert run_python(code) == f"{len(METRICS)} []"


# drawn_right


def test_rendered_pictures_are_drawn_right(batch: ShapesBatch) -> None:
    extract = METRICS["drawn_right"].network.open_on("cpu")
    assert extract(batch.images, batch.captions).tolist() == [[1.0]] * 12
    assert shapes_world.attributes_right(batch.images, batch.captions).all()


def test_one_wrong_attribute_makes_a_picture_wrong(batch: ShapesBatch) -> None:
    caption = batch.captions[0]
    background = batch.scenes[0].meaning.background
    other = caption.replace(background, "white" if background != "white" else "black")
    right = shapes_world.attributes_right(batch.images[:1], [other])[0]
    wrong = [name for name, ok in zip(shapes_world.COLUMNS, right, strict=True) if not ok]
    assert wrong == ["background", "exact"]


def test_what_cannot_be_read_is_wrong(batch: ShapesBatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, batch.images.shape, dtype=np.uint8)
    assert METRICS["drawn_right"].network.open_on("cpu")(noise, batch.captions).sum() == 0


@pytest.mark.parametrize("metric", ["drawn_right", "clip_score_shapes"])
def test_captions_and_pictures_of_another_world_are_refused(
    metric: str, batch: ShapesBatch, scorer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "WEIGHTS", scorer_folder)
    extract = METRICS[metric].network.open_on("cpu")
    with pytest.raises(DdilError) as error:
        extract(batch.images[:1], OUTSIDE)
    assert str(error.value) == (
        f"{metric} cannot be measured: the caption 'a photo of a dog' is not of the shapes world; write it like "
        "'a small red circle left of a large blue star on a grey background'"
    )
    with pytest.raises(DdilError, match=rf"{metric} measures images of the shapes world, .* leave the metric out"):
        extract(np.zeros((1, 32, 32, 3), np.uint8), batch.captions[:1])


# clip_score_shapes


def test_scores_are_the_cosines_that_open_clip_gives_by_itself(
    batch: ShapesBatch, scorer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    name = f"local-dir:{scorer_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    with torch.no_grad():
        pictures = model.encode_image(torch.stack([preprocess(Image.fromarray(image)) for image in batch.images]))
        texts = model.encode_text(open_clip.get_tokenizer(name)(batch.captions))
    expected = torch.nn.functional.cosine_similarity(pictures, texts)[:, None].numpy()

    monkeypatch.setattr(scorer, "WEIGHTS", scorer_folder)
    extract = shapes_world.open_scorer("cpu")
    scores = extract(batch.images, batch.captions)
    assert scores.shape == (12, 1) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    alone = [extract(batch.images[i : i + 1], batch.captions[i : i + 1])[0] for i in range(12)]
    np.testing.assert_allclose(scores, alone, atol=1e-6)


def test_the_scorer_has_one_token_a_word_and_ends_where_open_clip_looks(
    batch: ShapesBatch, scorer_folder: Path
) -> None:
    _, _, tokenize = scorer.load_scorer(scorer_folder)
    text = scorer.scorer_config()["model_cfg"]["text_cfg"]
    tokens = tokenize(batch.captions)
    assert (text["vocab_size"], text["context_length"]) == (len(write_tokenizer(scorer_folder)), MAX_TOKENS)
    assert scorer.scorer_config()["model_cfg"]["vision_cfg"]["image_size"] == IMAGE_SIZE
    assert tokens.shape == (12, MAX_TOKENS)
    # The text tower reads its output at the first largest id: that must be the end of the text.
    assert tokens.argmax(1).tolist() == [1 + len(caption.split()) for caption in batch.captions]


def test_the_scorer_is_small_and_returns_unchanged(scorer_folder: Path) -> None:
    torch.manual_seed(0)
    built = scorer.build_scorer()
    loaded, preprocess, _ = scorer.load_scorer(scorer_folder)
    assert sum(parameter.numel() for parameter in built.parameters()) < 1.6e6
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in built.state_dict().items())
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert preprocess(np.full((1, 64, 64, 3), 255, np.uint8)).unique().tolist() == [1.0]


def test_an_absent_or_damaged_scorer_is_one_sentence(scorer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DdilError, match=r"lacks open_clip_config.json, .* install ddil again, or train"):
        scorer.load_scorer(tmp_path)
    for file in scorer_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DdilError, match=r"^the scorer in .* is damaged \(.*\); install ddil again$"):
        scorer.load_scorer(tmp_path)


# fd_efflite0


def test_efflite0_recognises_a_photograph(extract_efflite0: Extractor) -> None:
    """Names, padding, ε and normalisation together: the photograph of an officer is class 652, "military uniform"."""
    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image = np.asarray(Image.open(photograph).convert("RGB"))[None]
    probabilities = efflite0.load_efflite0(efflite0.installed_weights())(efflite0.prepare_efflite0(image)).softmax(-1)[
        0
    ]
    assert probabilities.argmax() == 652
    assert probabilities.max() == pytest.approx(0.463, abs=0.01)


def test_efflite0_names_are_those_of_timm(extract_efflite0: Extractor) -> None:
    import timm

    state = torch.load(efflite0.installed_weights(), map_location="cpu", weights_only=True)
    names = [efflite0.timm_name(name) for name in state]
    assert names == list(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict())


def test_efflite0_features_do_not_depend_on_the_batch(extract_efflite0: Extractor, batch: ShapesBatch) -> None:
    together = extract_efflite0(batch.images[:6], batch.captions[:6])
    alone = np.concatenate([extract_efflite0(image[None], [""]) for image in batch.images[:6]])
    assert together.shape == (6, 1280) and together.dtype == np.float32
    assert np.linalg.norm(together - alone) <= 1e-5 * np.linalg.norm(together)


def test_efflite0_on_a_cpu_is_the_network_without_folded_batch_norms(
    extract_efflite0: Extractor, batch: ShapesBatch
) -> None:
    """In parts of 8, and all at once with timm's own batch norms: features within 3e-6 in norm."""
    from timm.models.efficientnet import tf_efficientnet_lite0

    state = torch.load(efflite0.installed_weights(), map_location="cpu", weights_only=True)
    plain = tf_efficientnet_lite0(pretrained=False)
    plain.load_state_dict({efflite0.timm_name(name): value for name, value in state.items()})
    plain.eval()
    images = batch.images[:11]
    with torch.inference_mode():
        expected = plain.forward_head(plain.forward_features(efflite0.prepare_efflite0(images)), pre_logits=True)
    found = extract_efflite0(images, [""] * 11)
    assert np.linalg.norm(found - expected.numpy()) <= 3e-6 * np.linalg.norm(found)
    folded = efflite0.load_efflite0(efflite0.installed_weights())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


def test_a_batch_norm_without_a_convolution_is_not_folded() -> None:
    with pytest.raises(ValueError, match="no convolution stands before the batch norm '1'"):
        fold_batch_norms(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(3)).eval())


def test_efflite0_distance_grows_with_damage(extract_efflite0: Extractor) -> None:
    images, others = (draw_batch(24, index, seed=9).images for index in (0, 1))
    noise = np.random.default_rng(0).normal(size=images.shape)
    reference = extract_efflite0(others, [""] * 24)

    def damaged(strength: float) -> float:
        pictures = np.clip(images + strength * noise, 0, 255).astype(np.uint8)
        return frechet_distance(extract_efflite0(pictures, [""] * 24), reference)

    clean, little, much = damaged(0), damaged(8), damaged(40)
    assert clean < little < much


def test_pictures_are_resized_as_pillow_does_and_normalised() -> None:
    image = np.random.default_rng(1).integers(0, 256, (1, 512, 512, 3), dtype=np.uint8)
    by_pillow = np.asarray(Image.fromarray(image[0]).resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
    tensor = efflite0.prepare_efflite0(image)
    assert tensor.shape == (1, 3, 224, 224)
    np.testing.assert_allclose(tensor[0].permute(1, 2, 0), (by_pillow - 127) / 128, atol=1e-7)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "weights.pth"
    other.write_bytes(b"something else")
    with pytest.raises(DdilError, match=r"does not hold the weights of fd_efflite0 \(sha256 .*--force-reinstall"):
        efflite0.load_efflite0(other)


# The environment


def run_python(code: str, path: Path | None = None) -> str:
    root = Path(__file__).parents[3]
    search = os.pathsep.join(str(folder) for folder in (path, root) if folder is not None)
    environment = {**os.environ, "PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


CAUGHT = """
from ddil_core.support.environment import require_torchvision
from ddil_core.support.errors import DdilError
try:
    require_torchvision()
except DdilError as error:
    print(error)
"""


def test_a_torchvision_that_does_not_fit_torch_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    assert run_python(CAUGHT, tmp_path) == (
        "torchvision does not fit the installed torch (operator torchvision::nms does not exist); install the two of "
        "one build together: pip install --force-reinstall torch torchvision (same index)"
    )


def test_an_absent_torchvision_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise ModuleNotFoundError(name='torchvision')\n")
    expected = "torchvision is not installed; install it with: pip install torchvision"
    assert run_python(CAUGHT, tmp_path) == expected


def test_full_precision_ends_with_its_block() -> None:
    convolution, product = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolution.fp32_precision, product.fp32_precision
    with full_precision():
        assert (convolution.fp32_precision, product.fp32_precision) == ("ieee", "ieee")
    assert (convolution.fp32_precision, product.fp32_precision) == before
