"""Recipes: complete, refused where they do not fit, and prepared bit for bit as the programs that they are from prepare."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import read_yaml
from ddil_core.support.resources import protocols
from ddil_eval.experiments.prompts import choose_prompts
from ddil_eval.experiments.reference_images import open_reference
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.recipes import Recipe, centre_crop, load_recipe, recipe_for, resize
from ddil_eval.metrics import METRICS
from tests.coco import photograph
from tests.pixels import add_metric
from tests.shards import save_shards

NAMES = ("gigagan", "dmd2-sdxl", "bk-sdm", "coco2017-5k", "folder-256", "shapes", "gaussians")


def zone_plate(size: int = 512) -> np.ndarray:
    """cos(π r² / size) in 8 bits: every frequency up to Nyquist at the edges."""
    square = (np.arange(size) - size / 2) ** 2
    plate = np.round(127.5 + 127.5 * np.cos(np.pi / size * (square[:, None] + square[None])))
    return np.repeat(plate.astype(np.uint8)[..., None], 3, axis=2)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def test_the_shipped_recipes_are_these() -> None:
    assert tuple(read_yaml(protocols() / "recipes.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_reads_and_asks_for_metrics_that_there_are(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.source
    assert set(recipe.metrics) <= set(METRICS)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_fid_reads_the_input_that_it_says(name: str) -> None:
    recipe = load_recipe(name)
    named = {"clean-fid": {"fid"}, "pytorch-fid": {"fid_pytorch"}, None: set()}[recipe.fid_input]
    assert {metric for metric in recipe.metrics if metric in ("fid", "fid_pytorch")} == named
    assert ("patch_fid" in recipe.metrics) == (recipe.patch is not None)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_clip_is_the_one_that_its_metric_reads(name: str) -> None:
    recipe = load_recipe(name)
    scores = [metric for metric in recipe.metrics if metric in ("clip_score", "clip_score_s34b")]
    if recipe.clip is None:
        assert scores == []
        return
    (weights,) = METRICS[scores[0]].weights
    assert recipe.clip.model in METRICS[scores[0]].needs
    assert recipe.clip.weights.replace("_", "-").lower() in weights.file.lower()


@pytest.mark.parametrize(
    ("name", "counts", "clip"),
    [
        ("gigagan", (30_000, "coco2014", 40_504), ("laion2b_s12b_b42k", "A photo depicts ")),
        ("dmd2-sdxl", (10_000, "coco2014", 10_000), ("laion2b_s12b_b42k", "A photo depicts ")),
        ("bk-sdm", (30_000, "coco2014", 40_504), ("laion2b_s34b_b88k", "")),
        ("coco2017-5k", (5_000, "coco2017", 5_000), ("laion2b_s12b_b42k", "A photo depicts ")),
    ],
)
def test_what_a_recipe_counts_and_reads(name: str, counts: tuple[int, str, int], clip: tuple[str, str]) -> None:
    recipe = load_recipe(name)
    assert (recipe.images, recipe.reference.data, recipe.reference.images) == counts
    assert recipe.clip is not None and (recipe.clip.weights, recipe.clip.prefix) == clip


@pytest.mark.parametrize("name", ["gigagan", "coco2017-5k", "dmd2-sdxl"])
@pytest.mark.parametrize("place", range(4))
def test_gigagans_preparation_is_torchvisions_crop_and_pillows_lanczos(name: str, place: int) -> None:
    from torchvision.transforms.functional import center_crop

    recipe, photo = load_recipe(name), Image.fromarray(photograph(place))
    expected = center_crop(photo, min(photo.size)).resize((recipe.size, recipe.size), Image.Resampling.LANCZOS)
    for generated in (False, True):
        found = recipe.preparation("fid", generated=generated)(np.asarray(photo))
        assert np.array_equal(found, np.asarray(expected))


def test_dmd2_looks_at_patches_of_the_raw_picture_and_at_256_px_with_clip() -> None:
    from torchvision.transforms.functional import center_crop

    recipe = load_recipe("dmd2-sdxl")
    picture = np.asarray(Image.fromarray(photograph(0)).resize((640, 401)))
    patch = recipe.preparation("patch_fid", generated=True)
    assert np.array_equal(patch(picture), np.asarray(center_crop(Image.fromarray(picture), 299)))
    assert np.array_equal(patch(picture[:200]), picture[:200])  # too small for a patch: whole
    square = center_crop(Image.fromarray(picture), 401)
    assert np.array_equal(
        recipe.preparation("clip_score", generated=True)(picture), np.asarray(square.resize((256, 256), Image.LANCZOS))
    )


def test_bk_sdm_squashes_and_stores_as_jpeg_twice() -> None:
    recipe, photo = load_recipe("bk-sdm"), Image.fromarray(photograph(1))
    real = jpeg(photo.resize((256, 256)), 75)  # what Pillow resizes and saves with when nothing is said
    assert np.array_equal(recipe.preparation("fid", generated=False)(np.asarray(photo)), np.asarray(real))
    made = jpeg(jpeg(photo, 75).resize((256, 256)), 75)
    assert np.array_equal(recipe.preparation("fid", generated=True)(np.asarray(photo)), np.asarray(made))
    assert not np.array_equal(np.asarray(real), np.asarray(made))


def test_the_shapes_worlds_pictures_stay_as_they_are() -> None:
    picture = photograph(2)
    assert load_recipe("shapes").preparation("fd_efflite0", generated=True)(picture) is picture


def test_what_fid_reads_of_a_prepared_picture_is_clean_fids_own_resize() -> None:
    pytest.importorskip("cleanfid", reason="clean-fid is not installed")
    from cleanfid.resize import build_resizer

    from ddil_eval.metrics.inception import prepare_inception

    seen = load_recipe("gigagan").preparation("fid", generated=False)(photograph(0))
    expected = build_resizer("clean")(np.asarray(Image.fromarray(seen)))
    assert np.array_equal(prepare_inception(seen[None])[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("height", "width", "side"), [(7, 4, 4), (4, 9, 4), (299, 304, 299), (12, 5, 5)])
def test_an_odd_rest_is_split_as_torchvision_splits_it(height: int, width: int, side: int) -> None:
    from torchvision.transforms.functional import center_crop

    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(centre_crop(image, side), np.asarray(center_crop(Image.fromarray(image), side)))


@pytest.mark.parametrize(
    ("other", "difference"), [("bicubic", 4.1), ("bilinear", 7.8), ("box", 15.2), ("nearest", 69.7)]
)
def test_another_filter_is_another_picture(other: Any, difference: float) -> None:
    plate = zone_plate()
    lanczos = resize(plate, 256, "lanczos").astype(float)
    assert np.abs(resize(plate, 256, other) - lanczos).mean() == pytest.approx(difference, abs=0.06)


def test_torchs_bicubic_is_far_from_pillows_without_antialias_and_near_it_with() -> None:
    import torch

    plate = zone_plate()
    pillow = resize(plate, 256, "bicubic").astype(float)
    pixels = torch.from_numpy(plate).permute(2, 0, 1)[None].float()

    def difference(antialias: bool) -> float:
        found = torch.nn.functional.interpolate(pixels, (256, 256), mode="bicubic", antialias=antialias)
        return float(np.abs(found[0].permute(1, 2, 0).numpy().clip(0, 255) - pillow).mean())

    assert difference(antialias=True) == pytest.approx(0.31, abs=0.01)
    assert difference(antialias=False) == pytest.approx(31.5, abs=0.1)


def test_a_row_prints_its_counts_where_they_are_not_the_recipes() -> None:
    recipe = load_recipe("gigagan")
    assert recipe.label(30_000, 40_504) == "gigagan"
    assert recipe.label(30_000, 5_000) == "gigagan (30,000 → 5,000)"
    assert recipe.label(8, 12) == "gigagan (8 → 12)"


@pytest.mark.parametrize(
    ("data", "name"),
    [("shapes", "shapes"), ("coco2014:x", "gigagan"), ("coco2017:x", "coco2017-5k"), ("folder:x", "folder-256")],
)
def test_a_data_set_has_its_recipe(data: str, name: str) -> None:
    assert recipe_for(data) == name


def test_shards_have_none(tmp_path: Path) -> None:
    shards = save_shards(tmp_path)
    with pytest.raises(WrongCommand) as error:
        recipe_for(shards)
    assert str(error.value) == f"no recipe belongs to the data set {shards!r}; name one with --recipe"


def test_the_recipe_of_plain_folders_takes_all_images_of_any_data_set(tmp_path: Path) -> None:
    for place in range(5):
        Image.fromarray(photograph(place)).save(tmp_path / f"{place}.png")
        (tmp_path / f"{place}.txt").write_text(f"photograph {place}")
    recipe, data, count = open_reference(f"folder:{tmp_path}", None, None)
    assert (recipe.name, count, len(choose_prompts(data, recipe.images, None).prompts)) == ("folder-256", 5, 5)
    assert open_reference(f"folder:{tmp_path}", None, 3)[2] == 3
    assert recipe.label(5, 5) == "folder-256 (5 → 5)"
    with pytest.raises(WrongCommand) as error:
        open_reference("shapes", "folder-256", None)
    assert str(error.value) == (
        "the recipe takes all images, and 'shapes' has no end; say how many with --num-images and --reference-images"
    )
    assert open_reference("shapes", "folder-256", 8)[2] == 8


def test_the_size_after_the_preparation_is_the_one_that_is_said() -> None:
    for name in NAMES:
        for metric in ("fd_efflite0", "patch_fid", "clip_score"):
            for place in range(3):
                preparation = load_recipe(name).preparation(metric, generated=True)
                image = photograph(place)
                assert preparation(image).shape[:2] == preparation.size_of(image.shape[:2])


def test_a_recipe_that_there_is_not() -> None:
    with pytest.raises(WrongCommand) as error:
        load_recipe("gigagans")
    assert str(error.value) == (
        f"the recipe 'gigagans' is not known; it may be one of {', '.join(NAMES)}, or a YAML file; did you mean 'gigagan'?"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"filtre": "box"}, "has the unknown key 'filtre'; did you mean 'filter'?"),
        ({"filter": None}, "has a value that does not fit: a recipe has both a size and a filter, or neither"),
        (
            {"jpeg": 101},
            "has a value that does not fit at 'jpeg': it takes a whole number from 1 to 100 (or null), not 101",
        ),
    ],
)
def test_a_recipe_of_ones_own_is_checked(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    mine = load_recipe("gigagan").model_dump(mode="json", exclude={"name"})
    path.write_text(yaml.safe_dump({"mine": mine}))
    assert load_recipe(str(path)) == Recipe.model_validate({"name": "mine"} | mine)
    path.write_text(yaml.safe_dump({"mine": mine | change}))
    with pytest.raises(WrongCommand) as error:
        load_recipe(str(path))
    assert str(error.value) == f"the recipe 'mine' of {path} {sentence}"


def test_a_recipe_of_ones_own_has_no_shipped_name_unless_it_is_that_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    shipped = read_yaml(protocols() / "recipes.yaml")["gigagan"]
    path.write_text(yaml.safe_dump({"gigagan": shipped}))
    assert load_recipe(str(path)) == load_recipe("gigagan")
    path.write_text(yaml.safe_dump({"gigagan": shipped | {"crop": "none"}}))
    with pytest.raises(WrongCommand) as error:
        load_recipe(str(path))
    assert str(error.value) == (
        f"{path} calls its recipe 'gigagan', and a different shipped recipe has this name; choose another name"
    )


def test_a_recipe_may_call_the_number_of_reference_images_by_its_former_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"gigagan": load_recipe("gigagan").model_dump(mode="json", exclude={"name"})}))
    assert "pictures: 40504" in path.read_text()  # hashes of earlier records have this name
    assert load_recipe(str(path)) == load_recipe("gigagan")


def test_a_file_holds_one_recipe(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("a: {}\nb: {}\n")
    with pytest.raises(WrongCommand) as error:
        load_recipe(str(path))
    assert str(error.value) == f"{path} holds 2 recipes, and a file must hold one; remove the others"


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (
            "patch_fid",
            "needs a recipe that cuts patches, and the recipe 'gigagan' cuts none; use the recipe 'dmd2-sdxl'",
        ),
        (
            "drawn_right",
            "reads images of the shapes world at their own size, and the recipe 'gigagan' resizes to 256 px; "
            "choose other metrics",
        ),
        (
            "fid_pytorch",
            "needs fid_input: pytorch-fid, and the recipe 'gigagan' has clean-fid; "
            "choose the metric that fits, or another recipe",
        ),
        (
            "clip_score_s34b",
            "needs clip: ViT-g-14 laion2b_s34b_b88k, and the recipe 'gigagan' has ViT-g-14 laion2b_s12b_b42k; "
            "choose the metric that fits, or another recipe",
        ),
        (
            "lpips_diversity",
            "needs several images of each prompt, and each prompt has one; with 'ddil eval systems', 'run' and 'score', "
            "add --set images_per_prompt=10",
        ),
    ],
)
def test_metrics_that_a_recipe_does_not_serve(metric: str, sentence: str) -> None:
    with pytest.raises(WrongCommand) as error:
        Extractors([metric], "cpu", load_recipe("gigagan"))
    assert str(error.value) == f"the metric {metric!r} {sentence}"


def test_patches_of_pictures_that_are_smaller_than_a_patch_are_looked_at_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []

    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        seen.append(images.shape)
        return images.mean(axis=(1, 2))

    network = replace(METRICS["patch_fid"].network, open_on=lambda device: extract, weights=(), lacks=lambda: None)
    add_metric(monkeypatch, replace(METRICS["patch_fid"], network=network))
    wide, whole = (np.random.default_rng(h).integers(0, 256, (h, 640, 3), dtype=np.uint8) for h in (200, 480))

    class Photographs:
        reference = "photographs"

        def images(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
            yield from (image[None] for image in (wide, whole)[:count])

    extractors = Extractors(["patch_fid"], "cpu", load_recipe("dmd2-sdxl"))
    (features,) = extractors.reference(Photographs(), 2).values()  # type: ignore[arg-type]
    assert seen == [(1, 200, 640, 3), (1, 299, 299, 3)]
    assert np.array_equal(features, [image.mean(axis=(0, 1)) for image in (wide, centre_crop(whole, 299))])


def test_a_prefix_stands_before_the_captions_of_networks_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each network sees the picture that its metric's preparation gives, in one batch."""
    seen: dict[str, tuple[list[str], tuple[int, ...]]] = {}

    def watched(name: str) -> Any:
        def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
            seen[name] = (captions, images.shape)
            return np.zeros((len(images), 1))

        return lambda device: extract

    for name, metric in (("clip_score", "clip_score"), ("patch_fid", "patch_fid"), ("fid", "fid")):
        network = replace(METRICS[metric].network, open_on=watched(name), weights=(), lacks=lambda: None)
        add_metric(monkeypatch, replace(METRICS[metric], network=network))
    extractors = Extractors(["fid", "patch_fid", "clip_score"], "cpu", load_recipe("dmd2-sdxl"))
    extractors(np.zeros((2, 600, 640, 3), np.uint8), ["a cat", "a dog"])
    assert seen == {
        "fid": (["a cat", "a dog"], (2, 512, 512, 3)),
        "patch_fid": (["a cat", "a dog"], (2, 299, 299, 3)),
        "clip_score": (["A photo depicts a cat", "A photo depicts a dog"], (2, 256, 256, 3)),
    }
