"""``benchmarks.stranger``: the teacher that the project has never seen is what the page says, and the table comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline

from benchmarks import stranger
from benchmarks import stranger_world as world


def test_the_tokenizer_is_not_clips() -> None:
    """Whole words, padding and an end that it does not add; no start."""
    words = world.tokenizer()
    caption = world.picture(np.random.default_rng(0))[1]
    assert words.convert_ids_to_tokens(words(caption).input_ids) == caption.split()
    assert words.bos_token is None
    assert words("", padding="max_length").input_ids == [words.pad_token_id] * world.MAX_TOKENS


def test_a_picture_shows_what_its_caption_says() -> None:
    """The middle of a form without a hole has the form's colour, and the corner that of the ground."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        image, caption = world.picture(rng)
        _, colour, form, *_, ground, _ = caption.split()
        pixels = np.asarray(image).astype(float)
        assert np.abs(pixels[0, 0] - world.GROUNDS[ground]).max() < 40
        place = next(place for place in world.PLACES if place in caption)
        x, y = (round(world.SIZE * share) for share in world.PLACES[place])
        if form != "ring":
            assert np.abs(pixels[y, x] - world.COLOURS[colour]).max() < 40


def test_the_teacher_is_as_such_models_are_published(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = world.tokenizer()
    parts = world.autoencoder((8, 8, 8)), world.unet((16, 16), 16), world.text_encoder(words, 16, 1)
    folder = world.save_teacher(tmp_path / "teacher", *parts, words)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float16
    assert not (folder / "ddil.json").exists()


def test_all_candidates_fit_their_methods() -> None:
    from ddil_core.distillation.methods import read_config

    tries = stranger.candidates(1500, 3.0)
    configs = {name: read_config(protocol) for rows in tries.values() for name, protocol in rows.items()}
    assert {config.method for config in configs.values()} == {"pd", "lcm", "dmd2"}
    assert all(config.ddil is not None for config in configs.values())


@pytest.mark.slow
def test_the_benchmark_ends_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stranger, "PICTURES", {"train": 16, "choose": 12, "test": 12})
    monkeypatch.setattr(stranger, "candidates", lambda updates, guidance: {"PD": ALL(updates, guidance)["PD"]})
    few = ["--autoencoder-steps", "2", "--teacher-steps", "2", "--updates", "2", "--num-images", "12"]
    result = CliRunner().invoke(stranger.main, ["--out", str(tmp_path / "run"), *few, "--csv", str(tmp_path / "t.csv")])
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "t.csv").read_text().splitlines()[1:]  # the first names the machine
    assert lines[0] == "kind,name,fd_efflite0,low,high,p" and len(lines) == 5
    assert lines[-1].startswith('difference,"PD − teacher, 4 steps",')


ALL = stranger.candidates
