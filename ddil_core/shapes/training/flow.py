"""Train the flow teacher of the shapes world: ``python -m ddil_core.shapes.training.flow --out DIR``.

The teacher is a small flow-matching transformer in Stable Diffusion 3's layout. Autoencoder and text encoder are those
of the shipped U-Net teacher, and stay as they are.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ddil_core.diffusion.schedule import FlowSchedule
from ddil_core.distillation.loop import Ema
from ddil_core.models.model import load_model
from ddil_core.models.sampling import SYSTEM_FILE
from ddil_core.shapes.training import architecture
from ddil_core.shapes.training.card import Words, measure_weights, read_training
from ddil_core.shapes.training.latents import SEED, TrainingPool, encode_training_pool
from ddil_core.shapes.training.stage import run_stage
from ddil_core.shapes.training.train import CAPTION_DROPOUT, copied
from ddil_core.support import ending
from ddil_core.support.checksums import with_checksum
from ddil_core.support.files import write_text
from ddil_core.support.lock import held

WIDTH = 128
LAYERS = 6
HEADS = 4
SHIFT = 3.0
"""The shift of the times, in training and in grids, as SD3 has it. Most times then lie where the layout is decided."""
GUIDANCE_SCALE = 2.0
STATE_SCALE = 1 / 64
"""Brings the text states, whose standard deviation is about 50, near 1, where the transformer learns well from them."""
LEARNING_RATE = 2e-3
WEIGHTS = Path(__file__).parents[1] / "weights" / "flow"
CARD = Words(
    title="The shapes world's flow teacher",
    about=(
        "`teacher/` is a small flow-matching transformer in Stable Diffusion 3's layout, without T5. Its autoencoder",
        "and its text encoder, which stands in both places, are those of the shipped U-Net teacher. `docs/shapes.md`",
        "says how diffusers draws with it. `python -m ddil_core.shapes.training.flow` trains such a teacher; the last",
        "paragraph says how this one was trained.",
    ),
    command="python -m ddil_core.shapes.training.flow --measure",
    solver="Euler",
)


def transformer() -> SD3Transformer2DModel:
    """Return an untrained transformer. An image has 16 tokens, of 2 × 2 latents each.

    At first each block changes nothing and the output is 0 (adaLN-Zero, 2212.09748), from where it learns faster.
    """
    network = SD3Transformer2DModel(
        sample_size=architecture.LATENT_SIZE,
        patch_size=2,
        in_channels=architecture.LATENT_CHANNELS,
        out_channels=architecture.LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * architecture.TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * architecture.TEXT_WIDTH,
        pos_embed_max_size=architecture.LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
    modulations = [part.linear for part in network.modules() if isinstance(part, AdaLayerNormZero)]
    for linear in (*modulations, network.norm_out.linear, network.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return network


@torch.no_grad()
def projected(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Return a text encoder in the form that SD3 reads: its states times ``STATE_SCALE``, and its pooled state.

    SD3 reads the states before the last layer, so one layer that changes nothing is added at the end. Each part that
    adds to the states is scaled, and the layer norms' eps with it, so that they give what they gave. The projection of
    the pooled state is the identity.
    """
    config: Any = copy.deepcopy(encoder.config)
    config.num_hidden_layers += 1
    config.layer_norm_eps *= STATE_SCALE**2
    found = CLIPTextModelWithProjection(config)
    text = found.text_model
    text.load_state_dict(encoder.state_dict(), strict=False)
    adding = list(text.embeddings.children())
    for layer in text.encoder.layers:
        adding += [layer.self_attn.out_proj, layer.mlp.fc2]
    for weight in nn.ModuleList(adding).parameters():
        weight.mul_(STATE_SCALE)
    for part in text.encoder.layers[-1].modules():
        if isinstance(part, nn.Linear):
            part.weight.zero_()
            part.bias.zero_()
    nn.init.eye_(found.text_projection.weight)
    return found.eval().requires_grad_(False)


def condition(encoder: CLIPTextModelWithProjection, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return what SD3's pipeline makes of tokens [B, L]: text states [B, L, 2 D] and pooled states [B, 2 D].

    Both of SD3's CLIP encoders are the same one here, and there is no T5.
    """
    with torch.no_grad():
        found = encoder(tokens, output_hidden_states=True)
    return found.hidden_states[-2].repeat(1, 1, 2), found.text_embeds.repeat(1, 2)


def train_flow(
    pool: TrainingPool,
    encoder: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    out: Path,
    device: torch.device,
    steps: int,
    batch_size: int = 32,
    lr: float = LEARNING_RATE,
) -> SD3Transformer2DModel:
    """Train a transformer on the squared error of the velocity ε − x₀; return the averaged weights.

    The times are logit-normal and shifted (2403.03206, section 3.1 and equation 23). They are spread evenly over a
    batch by their ranks, which makes the gradient less noisy (2107.00630, appendix I.1).

    Args:
        pool: The encoded images.
        encoder: The text encoder, which stays as it is.
        tokenizer: The tokenizer of the captions.
        out: The folder of the training.
        device: The device of the training.
        steps: The number of updates.
        batch_size: The number of images in an update.
        lr: The peak of the learning rate.
    """
    torch.manual_seed(SEED)
    model = transformer().to(device).train()
    text: nn.Module = encoder  # the ``to`` of transformers' own classes has no types
    text.to(device)
    ema = Ema(model, 0.999)
    schedule = FlowSchedule.straight(SHIFT)
    no_caption = tokenizer("", padding="max_length", return_tensors="pt").input_ids

    def losses(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x0, tokens = pool.draw(batch_size, generator)
        dropped = torch.rand(batch_size, 1, generator=generator) < CAPTION_DROPOUT
        states, pooled = condition(encoder, torch.where(dropped, no_caption, tokens).to(device))
        ranks = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        s = schedule.shifted(torch.special.ndtri(ranks).sigmoid())
        eps = torch.randn(x0.shape, generator=generator)
        z = torch.lerp(x0, eps, s.view(-1, 1, 1, 1)).to(device)
        velocity = model(
            hidden_states=z,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=len(schedule) * s.to(device),
        ).sample
        return {"loss": (velocity - (eps - x0).to(device)).square().mean()}

    run_stage("flow", model, losses, out=out, steps=steps, lr=lr, ema=ema)
    return ema.module


def export_flow(
    vae: AutoencoderKL,
    encoder: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    model: SD3Transformer2DModel,
    folder: Path,
) -> None:
    """Write the teacher as a pipeline in Stable Diffusion 3's layout, with the settings for sampling it.

    Networks of diffusers are stored in half precision, as in ``train.export_teacher``.
    """
    pipeline = StableDiffusion3Pipeline(
        transformer=model.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.half(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    sampling = {"solver": "flow_euler", "spacing": "flow", "steps": None, "guidance_scale": GUIDANCE_SCALE}
    with with_checksum(folder) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        write_text(temporary / SYSTEM_FILE, json.dumps(sampling, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/shapes-flow"), show_default=True
)
@click.option("--device", default=None, help="cpu or cuda; by default cuda where there is one.")
@click.option("--steps", default=20000, show_default=True, help="The number of updates.")
@click.option("--lr", default=LEARNING_RATE, show_default=True, help="The peak of the learning rate.")
@click.option("--pool", "pool_size", default=49152, show_default=True, help="The number of images to train on.")
@click.option("--captions", default=1000, show_default=True, help="The number of held-out captions for the card.")
@click.option(
    "--measure", "measure_only", is_flag=True, help="Only measure the weights of the package, and write their card."
)
def main(
    out: Path, device: str | None, steps: int, lr: float, pool_size: int, captions: int, measure_only: bool
) -> None:
    """Train the flow teacher of the shapes world into OUT/weights, measure it, and write its card.

    This takes some hours on one CPU core. Run the same command again to go on after an interruption.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if measure_only:
        measure_weights(WEIGHTS, chosen, captions, read_training(WEIGHTS), CARD)
        return
    with ending.in_a_sentence(), held(out):
        shipped = load_model("shapes", "cpu").pipeline
        tokenizer = architecture.write_tokenizer(out / "tokenizer")
        vae = copied(shipped.vae, architecture.autoencoder()).to(chosen).eval()
        scale = shipped.vae.config.scaling_factor
        encoder = projected(copied(shipped.text_encoder, architecture.text_encoder(tokenizer)))
        pool = encode_training_pool(vae, tokenizer, out, chosen, pool_size, scale)
        model = train_flow(pool, encoder, tokenizer, out, chosen, steps, lr=lr)
        vae.register_to_config(scaling_factor=scale, shift_factor=0.0)  # SD3's pipeline adds the shift, so it needs one
        export_flow(vae, encoder, tokenizer, model, out / "weights" / "teacher")
        measure_weights(out / "weights", chosen, captions, {"updates": steps, "peak of the learning rate": lr}, CARD)


if __name__ == "__main__":
    ending.listen()
    main()
