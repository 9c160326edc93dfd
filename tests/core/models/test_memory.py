"""The memory that a model needs, and decoding with little memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddil_core.models import memory
from ddil_core.models.catalogue import parameters
from ddil_core.models.memory import (
    MOST_DECODED,
    decode_batch,
    decode_bytes,
    estimate_memory,
    free_bytes,
    on_device,
    tiles,
)
from ddil_core.models.model import Model, assemble, load_model
from ddil_core.models.references import resolve
from tests.core.closed_form import normal

GIB = 2**30


def test_the_peak_of_stable_diffusions_decoder() -> None:
    vae = {"block_out_channels": [128, 256, 512, 512]}
    assert decode_bytes(vae, 512**2, 4) == GIB
    assert decode_bytes(vae, 1024**2, 2) == 2 * GIB


def test_what_sampling_and_training_need(folder: Path) -> None:
    _, counts = parameters(str(folder))
    text, unet, vae = (counts[name] for name in ("text_encoder", "unet", "vae"))
    decoding = 4 * 8 * 64**2 * 4  # four maps of 8 channels at 64², float32
    takes = estimate_memory(folder, counts, 4)
    assert takes.sampling == max(4 * (text + unet + vae), 4 * (unet + vae) + decoding)
    assert takes.training == (4 + 20) * unet
    assert (takes.matching, takes.matching_8bit) == ((4 + 2 * 16) * unet, (4 + 2 * 10) * unet)
    assert estimate_memory(folder, counts | {"text_encoder": 10**9}, 2).sampling == 2 * (10**9 + unet + vae)


@pytest.mark.parametrize(("images", "batch"), [(0.5, 0), (1.3, 1), (10, 8), (1e4, 32)])
def test_decoding_takes_what_memory_there_is(
    model: Model, monkeypatch: pytest.MonkeyPatch, images: float, batch: int
) -> None:
    vae = model.pipeline.vae
    one = decode_bytes(vae.config, 64**2, 4)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(images * one))
    assert decode_batch(vae, 8, 8, torch.device("cpu")) == batch


def test_a_picture_that_does_not_fit_is_decoded_in_tiles(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, z = model.pipeline.vae, normal(2, *model.latent_shape)
    whole, tiled, sides = model.decode(z), vae.tiled_decode, list[int]()

    def decode_tiles(part: torch.Tensor, **more: object) -> object:
        assert len(part) == 1  # one image at a time
        return tiled(part, **more)

    monkeypatch.setattr(vae, "tiled_decode", decode_tiles)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    hook = vae.decoder.register_forward_pre_hook(lambda _, args: sides.append(max(args[0].shape[-2:])))
    images = model.decode(z)
    hook.remove()
    assert images.shape == whole.shape
    assert len(sides) > 2 and max(sides) == model.latent_shape[-1] // 2
    monkeypatch.undo()
    assert not vae.use_tiling
    assert np.array_equal(model.decode(z), whole)


def test_an_autoencoder_without_tiles_decodes_one_image_at_a_time(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' AsymmetricAutoencoderKL has none."""
    z = normal(2, *model.latent_shape)
    whole = model.decode(z)
    monkeypatch.delattr(model.pipeline.vae, "use_tiling")
    with tiles(model.pipeline.vae, 8):
        assert not hasattr(model.pipeline.vae, "use_tiling")
    monkeypatch.undo()
    assert np.array_equal(model.decode(z), whole)


def test_pictures_do_not_depend_on_the_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    z = normal(3, *model.latent_shape)
    whole = model.decode(z)
    one = decode_bytes(model.pipeline.vae.config, 64**2, 4)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(1.5 * one))
    assert np.abs(model.decode(z).astype(int) - whole).max() <= 1  # rounding of a batch of one and of three


def test_the_machines_memory_is_what_is_free_on_the_cpu() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
    assert MOST_DECODED < 64  # where diffusers begins to copy


def test_a_visitor_stays_where_there_is_one_memory(model: Model) -> None:
    encoder = model.pipeline.text_encoder
    with on_device([encoder, None], torch.device("cpu")):
        assert next(encoder.parameters()).device.type == "cpu"
    assert next(encoder.parameters()).device.type == "cpu"


def test_the_last_of_several_users_moves_a_module_off() -> None:
    """Two contexts that overlap and are not nested, as those of two threads. A module that was there stays."""
    moves: list[str] = []

    class Moved(nn.Linear):
        def to(self, device: torch.device) -> Moved:  # type: ignore[override]
            moves.append(torch.device(device).type)
            return self

    elsewhere, there, gpu = Moved(1, 1, device="meta"), Moved(1, 1), torch.device("cuda")
    first, second = on_device([elsewhere], gpu), on_device([elsewhere, None], gpu)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert moves == ["cuda"]
    second.__exit__(None, None, None)
    assert moves == ["cuda", "cpu"]
    with pytest.raises(ValueError, match="stopped"), on_device([elsewhere], gpu):
        raise ValueError("stopped")
    assert moves == ["cuda", "cpu"] * 2
    with on_device([there], torch.device("cpu")):
        assert moves == ["cuda", "cpu"] * 2
    kept = weakref.ref(elsewhere)
    del elsewhere, first, second
    gc.collect()
    assert kept() is None  # nothing remembers a module that nobody uses


@pytest.mark.usefixtures("a_gpu")
def test_text_encoders_leave_the_gpu_after_encoding(folder: Path) -> None:
    model = assemble(str(folder), resolve(str(folder)), "cuda")
    encoder = model.pipeline.text_encoder
    with on_device([encoder], torch.device("cuda")):
        with on_device([encoder], torch.device("cuda")):
            assert next(encoder.parameters()).is_cuda
        assert next(encoder.parameters()).is_cuda
    assert not next(encoder.parameters()).is_cuda
    assert all(tensor.is_cuda for tensor in model.encode(["a red circle"]).tensors.values())
    assert not next(encoder.parameters()).is_cuda


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("room", [True, False])
def test_text_encoders_stay_where_there_is_room(folder: Path, room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sampling: while they take at most a quarter of what is free beside them."""
    model = load_model(str(folder), "cuda")
    encoder = model.pipeline.text_encoder
    size = sum(p.numel() * p.element_size() for p in encoder.parameters())
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * size - (not room))
    for _ in range(2):
        told = model.encode(["a red circle"])
        assert next(encoder.parameters()).is_cuda == room
        assert all(tensor.is_cuda for tensor in told.tensors.values())
    with on_device([encoder], torch.device("cuda")):
        assert next(encoder.parameters()).is_cuda
    assert not next(encoder.parameters()).is_cuda  # a use without "stay" needs the memory afterwards


@pytest.mark.gpu
def test_the_decoders_peak_is_near_the_estimate() -> None:
    """Stable Diffusion's autoencoder, untrained: the estimate for one more image is right within a factor of two."""
    from diffusers import AutoencoderKL

    channels = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    vae = vae.to("cuda").eval().requires_grad_(False)
    peaks = []
    for batch in (1, 2):
        torch.cuda.reset_peak_memory_stats()
        vae.decode(torch.randn(batch, 4, 64, 64, device="cuda"))
        peaks.append(torch.cuda.max_memory_allocated())
    assert 0.5 < (peaks[1] - peaks[0]) / decode_bytes(vae.config, 512**2, 4) < 2
