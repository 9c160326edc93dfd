"""Train the shapes world's networks from nothing: ``python -m ddil_core.shapes.training --out DIR``.

The four stages are the autoencoder, the two-tower scorer, the text encoder, and the teacher. The text encoder learns
the image's layout from the caption. The teacher is a U-Net with that text encoder; it predicts v, and dropped captions
allow guidance. An interrupted stage goes on at its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ddil_core.diffusion.schedule import Schedule
from ddil_core.distillation.loop import Ema
from ddil_core.models.model import load_model
from ddil_core.models.sampling import SYSTEM_FILE
from ddil_core.shapes.batches import draw_batch
from ddil_core.shapes.scene import nearly
from ddil_core.shapes.scorer import build_scorer, save_scorer
from ddil_core.shapes.training import architecture
from ddil_core.shapes.training.card import measure_weights, read_training
from ddil_core.shapes.training.latents import SEED, TrainingPool, encode_training_pool
from ddil_core.shapes.training.stage import run_stage
from ddil_core.support import ending
from ddil_core.support.checksums import with_checksum
from ddil_core.support.files import write_text
from ddil_core.support.lock import held

M = TypeVar("M", bound=nn.Module)

WEIGHTS = Path(__file__).parents[1] / "weights"
GUIDANCE_SCALE = 2.6
CAPTION_DROPOUT = 0.1
HIGH_NOISE = 700
"""The lowest t in the first eighth of the teacher's training. At such t only the caption says what lies where.

With lower noise from the start, the U-Net relies on its input; it had learned no relation after 2,500 updates.
"""


def train_autoencoder(
    out: Path, device: torch.device, steps: int, batch_size: int = 16, lr: float = 2e-3
) -> AutoencoderKL:
    """Train the autoencoder on reconstruction (L1 and squared error) with a light KL term.

    Args:
        out: The folder of the training.
        device: The device of the training.
        steps: The number of updates.
        batch_size: The number of images in an update.
        lr: The peak of the learning rate.
    """
    torch.manual_seed(SEED)
    vae = architecture.autoencoder().to(device)

    def losses(step: int) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(step)
        pixels = draw_batch(batch_size, step, seed=SEED).pixels().to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded.float() - pixels
        kl = posterior.kl().float().mean()
        loss = error.abs().mean() + 10 * error.square().mean() + 2e-6 * kl
        return {"loss": loss, "mse": error.square().mean(), "kl": kl}

    run_stage("autoencoder", vae, losses, out=out, steps=steps, lr=lr, weight_decay=1e-4)
    return vae.eval()


def train_text_encoder(
    pool: TrainingPool,
    tokenizer: CLIPTokenizer,
    out: Path,
    device: torch.device,
    steps: int,
    batch_size: int = 128,
    lr: float = 1e-3,
) -> CLIPTextModel:
    """Train a text encoder to predict an image's coarse latents from the caption, which takes under 500 updates.

    From the first update of the U-Net, the text states then say which object lies where.

    Args:
        pool: The encoded images.
        tokenizer: The tokenizer of the captions.
        out: The folder of the training.
        device: The device of the training.
        steps: The number of updates.
        batch_size: The number of images in an update.
        lr: The peak of the learning rate.
    """
    torch.manual_seed(SEED)
    text_encoder = architecture.text_encoder(tokenizer)
    model = nn.ModuleDict({"text_encoder": text_encoder, "layout": architecture.LayoutHead()}).to(device).train()
    architecture.use_plain_attention(*model.values())
    coarse = architecture.LATENT_SIZE // 4

    def losses(step: int) -> dict[str, Tensor]:
        x0, tokens = pool.draw(batch_size, torch.Generator().manual_seed(step))
        target = (coarse * F.avg_pool2d(x0.to(device), coarse)).flatten(2).transpose(1, 2)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            predicted = model["layout"](model["text_encoder"](tokens.to(device)).last_hidden_state)
        loss = (predicted.float() - target).square().mean()
        return {"loss": loss}

    run_stage("text encoder", model, losses, out=out, steps=steps, lr=lr)
    return text_encoder


def train_teacher(
    pool: TrainingPool,
    tokenizer: CLIPTokenizer,
    out: Path,
    device: torch.device,
    steps: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    *,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel | None = None,
) -> nn.ModuleDict:
    """Train a U-Net and its text encoder together on the squared error of v; return the averaged weights.

    Args:
        pool: The encoded images.
        tokenizer: The tokenizer of the captions.
        out: The folder of the training.
        device: The device of the training.
        steps: The number of updates.
        batch_size: The number of images in an update.
        lr: The peak of the learning rate.
        text_encoder: The text encoder to train further.
        unet: The U-Net to train further; None for a new one.
    """
    torch.manual_seed(SEED)
    model = nn.ModuleDict({"unet": unet or architecture.unet(), "text_encoder": text_encoder}).to(device).train()
    architecture.use_plain_attention(*model.values())
    ema = Ema(model, 0.999)
    schedule = Schedule.stable_diffusion().to(device)
    no_caption = tokenizer("", padding="max_length", return_tensors="pt").input_ids

    def losses(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x0, tokens = pool.draw(batch_size, generator)
        dropped = torch.rand(batch_size, 1, generator=generator) < CAPTION_DROPOUT
        tokens = torch.where(dropped, no_caption, tokens)
        lowest = HIGH_NOISE if unet is None and step < steps // 8 else 0
        t = lowest + (len(schedule) - lowest) * torch.rand(batch_size, generator=generator) ** 0.6
        t = t.long().to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        x0 = x0.to(device)
        alpha, sigma = schedule.at(t, x0)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            context = model["text_encoder"](tokens.to(device)).last_hidden_state
            v = model["unet"](alpha * x0 + sigma * eps, t, context).sample
        loss = (v.float() - (alpha * eps - sigma * x0)).square().mean()
        return {"loss": loss}

    run_stage("teacher", model, losses, out=out, steps=steps, lr=lr, ema=ema)
    return ema.module


def train_scorer(
    tokenizer: CLIPTokenizer, out: Path, device: torch.device, steps: int, batch_size: int = 96, lr: float = 1e-3
) -> nn.Module:
    """Train the two towers by CLIP's contrastive loss.

    Each caption stands beside a copy with one word changed, so that the towers learn every attribute.

    Args:
        tokenizer: The tokenizer of the captions.
        out: The folder of the training.
        device: The device of the training.
        steps: The number of updates.
        batch_size: The number of images in an update.
        lr: The peak of the learning rate.
    """
    torch.manual_seed(SEED)
    model = build_scorer().to(device)

    def losses(step: int) -> dict[str, Tensor]:
        batch = draw_batch(batch_size, step, seed=SEED + 3)
        rng = np.random.default_rng([SEED, 3, step])
        captions = batch.captions + [nearly(scene.meaning, rng).caption for scene in batch.scenes]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            images = model.encode_image(batch.pixels().to(device), normalize=True)
            texts = model.encode_text(tokens, normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * images.float() @ texts.float().T
        matching = torch.arange(batch_size, device=device)
        loss = (F.cross_entropy(logits, matching) + F.cross_entropy(logits[:, :batch_size].T, matching)) / 2
        return {"loss": loss, "accuracy": (logits.argmax(1) == matching).float().mean()}

    run_stage("scorer", model, losses, out=out, steps=steps, lr=lr, beta2=0.98, weight_decay=0.05)
    return model


def export_teacher(
    vae: AutoencoderKL, model: nn.ModuleDict, tokenizer: CLIPTokenizer, scale: float, folder: Path
) -> None:
    """Write the teacher as a pipeline in Stable Diffusion's layout, with the settings for sampling it.

    The U-Net and the autoencoder are stored in half precision, the text encoder in float32: diffusers loads its
    networks as float32, transformers keeps the stored dtype, and a plain ``from_pretrained`` must give one dtype.

    Args:
        vae: The autoencoder.
        model: The "unet" and the "text_encoder".
        tokenizer: The tokenizer.
        scale: The factor that scales latents.
        folder: The pipeline's folder.
    """
    vae.register_to_config(scaling_factor=scale)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # diffusers requires it; trailing spacing does not use it
        timestep_spacing="trailing",
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=model["text_encoder"].float(),
        tokenizer=tokenizer,
        unet=model["unet"].half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    sampling = {"solver": "ddim", "steps": None, "guidance_scale": GUIDANCE_SCALE}
    with with_checksum(folder) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        write_text(temporary / SYSTEM_FILE, json.dumps(sampling, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/shapes"), show_default=True)
@click.option("--device", default=None, help="cpu or cuda; by default cuda where there is one.")
@click.option("--autoencoder-steps", default=7000, show_default=True)
@click.option("--text-encoder-steps", default=2000, show_default=True)
@click.option("--teacher-steps", default=16000, show_default=True)
@click.option("--teacher-lr", default=1e-3, show_default=True, help="The peak of the teacher's learning rate.")
@click.option("--scorer-steps", default=2500, show_default=True)
@click.option(
    "--pool", "pool_size", default=49152, show_default=True, help="The number of images for the teacher's training."
)
@click.option("--captions", default=1000, show_default=True, help="The number of held-out captions for the card.")
@click.option(
    "--measure",
    "measure_only",
    is_flag=True,
    help="Only measure the weights of the package, and write their card.",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=None,
    help="A folder of weights. Its autoencoder and scorer are kept; only text encoder and U-Net are trained.",
)
@click.option("--only-scorer", is_flag=True, help="Train the scorer alone, and write no card.")
@click.option(
    "--further", is_flag=True, help="Train the text encoder and the U-Net of --init further, in place of new ones."
)
def main(
    out: Path,
    device: str | None,
    autoencoder_steps: int,
    text_encoder_steps: int,
    teacher_steps: int,
    teacher_lr: float,
    scorer_steps: int,
    pool_size: int,
    captions: int,
    measure_only: bool,
    init: Path | None,
    only_scorer: bool,
    further: bool,
) -> None:
    """Train the shapes world's networks from nothing into OUT/weights, measure them, and write their card.

    This takes some hours on two CPU cores. Run the same command again to go on after an interruption.
    """
    if further and init is None:
        raise click.UsageError("--further needs --init with the weights to train further")
    if only_scorer and (measure_only or init is not None):
        raise click.UsageError("--only-scorer trains anew: leave out --measure, --init and --further")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if measure_only:
        measure_weights(WEIGHTS, chosen, captions, read_training(WEIGHTS))
        return
    with ending.in_a_sentence(), held(out):
        weights = out / "weights"
        tokenizer = architecture.write_tokenizer(out / "tokenizer")
        if only_scorer:
            save_scorer(train_scorer(tokenizer, out, chosen, scorer_steps), tokenizer, weights / "scorer")
            click.echo(f"The scorer is in {weights / 'scorer'}")
            return
        training: dict[str, object] = {"teacher steps": teacher_steps}
        start: Any = None if init is None else load_model(str(init / "teacher"), "cpu").pipeline
        if init is None:
            vae = train_autoencoder(out, chosen, autoencoder_steps)
            save_scorer(train_scorer(tokenizer, out, chosen, scorer_steps), tokenizer, weights / "scorer")
            training |= {"autoencoder steps": autoencoder_steps, "scorer steps": scorer_steps}
        else:
            vae = copied(start.vae, architecture.autoencoder()).to(chosen).eval()
            shutil.copytree(init / "scorer", weights / "scorer", dirs_exist_ok=True)  # with its own tokenizer
            training |= {"autoencoder and scorer": "those of the weights before"}
        pool = encode_training_pool(
            vae, tokenizer, out, chosen, pool_size, start.vae.config.scaling_factor if further else 0.0
        )
        if further:
            unet = copied(start.unet, architecture.unet())
            text_encoder = copied(start.text_encoder, architecture.text_encoder(tokenizer))
            training |= {"text encoder and U-Net": "trained further from the weights before"}
        else:
            unet = None
            text_encoder = train_text_encoder(pool, tokenizer, out, chosen, text_encoder_steps)
            training |= {"text encoder steps": text_encoder_steps}
        model = train_teacher(
            pool, tokenizer, out, chosen, teacher_steps, lr=teacher_lr, text_encoder=text_encoder, unet=unet
        )
        export_teacher(vae, model, tokenizer, pool.scaling_factor, weights / "teacher")
        measure_weights(weights, chosen, captions, training)


def copied(source: nn.Module, target: M) -> M:
    """Copy the weights of a loaded network into ``target``, which has float32 and a clean configuration; return it."""
    target.load_state_dict(source.state_dict())
    return target
