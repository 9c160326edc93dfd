"""Tiny real pipelines in Stable Diffusion's layout: the shapes world's sizes with few channels, untrained."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

TEACHER = {"solver": "ddim", "steps": None, "guidance_scale": 3.0}
STUDENT = {"solver": "ddim", "steps": 4, "guidance_scale": 1.0}


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    from ddil_core.shapes.training.architecture import MAX_TOKENS

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tiny_second_text_encoder(tokenizer: CLIPTokenizer) -> Any:
    """With the projection that SDXL and SD3 pool."""
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(tiny_text_encoder(tokenizer).config)


def tiny_autoencoder(**more: Any) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    from ddil_core.shapes.training.architecture import LATENT_CHANNELS

    shape: dict[str, Any] = {
        "block_out_channels": (8,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return AutoencoderKL(**(shape | more))


def tiny_unet(**more: Any) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    from ddil_core.shapes.training.architecture import LATENT_CHANNELS, LATENT_SIZE

    shape: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": (16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(shape | more))


def tiny_transformer(**more: Any) -> Any:
    from diffusers import SD3Transformer2DModel

    from ddil_core.shapes.training.architecture import LATENT_CHANNELS, LATENT_SIZE

    shape: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "patch_size": 2,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,  # T5's width, above that of the two CLIP encoders together, as SD3 has it
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**(shape | more))


def tiny_t5(folder: Path, place: str = "_3", width: int = 40) -> dict[str, Any]:
    """A T5 text encoder and its tokenizer, on the words of the shapes world: SD3's third, FLUX's second, PixArt's only one."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    from ddil_core.shapes.training.architecture import caption_words

    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz▁"]
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((f"▁{word}", -3.0) for word in caption_words()),
        *letters,
    ]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    tokenizer.save_pretrained(folder)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    parts = {"tokenizer": T5TokenizerFast.from_pretrained(folder), "text_encoder": T5EncoderModel(config)}
    return {name + place: part for name, part in parts.items()}


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def build(
    layout: str,
    words: Path,
    *,
    prediction: str = "epsilon",
    seed: int = 1,
    frame_seed: int = 0,
    t5: bool = False,
    distilled: bool = False,
) -> Any:
    """An untrained pipeline of one of diffusers' layouts with the scheduler that such models are published with.

    SD3's comes with or without its T5 encoder, as diffusers allows; FLUX's is dev, or schnell where it is ``distilled``.

    ``seed`` decides the denoising network, ``frame_seed`` the text encoders and the autoencoder, which distillation leaves alone.
    """
    import diffusers
    import torch

    from ddil_core.shapes.training.architecture import write_tokenizer
    from tests.transformers import BUILDERS

    if layout in BUILDERS:
        return BUILDERS[layout](words, seed, frame_seed, distilled)
    tokenizer = write_tokenizer(words)
    torch.manual_seed(frame_seed)
    parts: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": tiny_text_encoder(tokenizer)}
    flow = layout == "StableDiffusion3Pipeline"
    shift = {"shift_factor": 0.06, "scaling_factor": 1.5, "use_quant_conv": False, "use_post_quant_conv": False}
    parts["vae"] = tiny_autoencoder(**(shift if flow else {}))
    if layout in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline"):
        parts |= {"tokenizer_2": tokenizer, "text_encoder_2": tiny_second_text_encoder(tokenizer)}
    if flow:  # its first encoder is pooled too
        parts |= {"text_encoder": tiny_second_text_encoder(tokenizer)}
        parts |= tiny_t5(words / "t5") if t5 else {"tokenizer_3": None, "text_encoder_3": None}
    torch.manual_seed(seed)
    if flow:
        parts |= {
            "transformer": tiny_transformer(),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        }
    elif layout == "StableDiffusionXLPipeline":
        sized = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        wide = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 6 * 8 + 16}
        parts["unet"] = tiny_unet(**sized, **wide, use_linear_projection=True)
        parts["scheduler"] = diffusers.EulerDiscreteScheduler(
            **BETAS, prediction_type=prediction, timestep_spacing="leading", steps_offset=1
        )
    else:
        told = layout == "LatentConsistencyModelPipeline"
        parts["unet"] = tiny_unet(**({"time_cond_proj_dim": 256} if told else {}))
        kind = diffusers.LCMScheduler if told else diffusers.PNDMScheduler
        more = {} if told else {"skip_prk_steps": True}
        parts["scheduler"] = kind(**BETAS, prediction_type=prediction, steps_offset=1, **more)
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, layout)(**parts)


def tell_apart(pipeline: Any) -> Any:
    """Widen the second text encoder of SDXL's tiny pipeline, and its U-Net. Return the pipeline.

    diffusers tells the encoders in a single file apart by their width, 768 and 1280 in the real ones.
    """
    wide = copy.deepcopy(pipeline.text_encoder_2.config)
    wide.hidden_size = 24
    unet = tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=40,
        projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
    )  # fmt: skip
    pipeline.register_modules(text_encoder_2=type(pipeline.text_encoder_2)(wide), unet=unet)
    return pipeline


def save_pipeline(
    folder: Path,
    sampling: Mapping[str, object] | None,
    *,
    seed: int,
    frame_seed: int = 0,
    layout: str = "StableDiffusionPipeline",
    prediction: str = "v_prediction",
    t5: bool = False,
) -> Path:
    """A pipeline for 64-pixel pictures and latents [8, 8, 8], float32, with ``ddil.json`` beside it where ``sampling`` is given.

    Stable Diffusion's layout gets the scheduler of this project's students, the others that of ``build``.
    """
    from diffusers import DDIMScheduler

    from ddil_core.models.sampling import SYSTEM_FILE

    pipeline = build(layout, folder / "words", prediction=prediction, seed=seed, frame_seed=frame_seed, t5=t5)
    if layout == "StableDiffusionPipeline":
        pipeline.register_modules(
            scheduler=DDIMScheduler(
                **BETAS, prediction_type=prediction, clip_sample=False, steps_offset=1, timestep_spacing="trailing"
            )
        )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    if sampling is not None:
        (folder / "pipeline" / SYSTEM_FILE).write_text(json.dumps(dict(sampling)))
    return folder / "pipeline"


def save_lora(folder: Path, pipeline: Any, *, seed: int = 3) -> Path:
    """A random LoRA for the U-Net of a pipeline, in the file that ``load_lora_weights`` takes; the pipeline is left as it was."""
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.unet.delete_adapters("default")
    type(pipeline).save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided teacher that takes any number of steps."""
    return save_pipeline(tmp_path_factory.mktemp("teacher"), TEACHER, seed=1)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of four steps without guidance: another U-Net in the teacher's frame."""
    return save_pipeline(tmp_path_factory.mktemp("student"), STUDENT, seed=2)


def plain_step(pipeline: Any, z: Tensor, prompt: str, t: int, s: int | None, guidance_scale: float) -> Tensor:
    """One guided DDIM step t → s (None: clean) of a v-predicting pipeline, z [1, C, H, W], written out by itself.

    Guidance is taken in ε, and nothing of this project is used.
    """
    import torch

    squares = pipeline.scheduler.alphas_cumprod.double()
    alpha, sigma = squares[t].sqrt().item(), (1 - squares[t]).sqrt().item()
    alpha_s, sigma_s = (1.0, 0.0) if s is None else (squares[s].sqrt().item(), (1 - squares[s]).sqrt().item())
    ids = pipeline.tokenizer([prompt, ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipeline.text_encoder(ids).last_hidden_state
        v = pipeline.unet(torch.cat([z, z]), t, text).sample
    something, nothing = (sigma * z + alpha * v).chunk(2)
    eps = nothing + guidance_scale * (something - nothing)
    return alpha_s * (z - sigma * eps) / alpha + sigma_s * eps


def plain_picture(pipeline: Any, z: Tensor) -> Tensor:
    """float64 [1, 3, H, W] in [0, 1] of scaled latents, not rounded."""
    import torch

    with torch.no_grad():
        pixels = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
    return ((pixels.double() + 1) / 2).clamp(0, 1)


def spoilt(pipeline: Path, to: Path, component: str, value: float = float("nan")) -> Path:
    """A copy of a pipeline, one of whose components has ``value`` in all entries of its last weight."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(pipeline, to)
    (path,) = (to / component).glob("*.safetensors")
    weights = load_file(path)
    (name,) = (name for name in weights if name.endswith(LAST[component]))
    save_file(weights | {name: weights[name] * 0 + value}, path, {"format": "pt"})
    return to


LAST = {"unet": "conv_out.weight", "vae": "decoder.conv_out.weight", "text_encoder": "final_layer_norm.weight"}
"""The end of the name of a weight that all depends on which its component gives."""


def without_weights(pipeline: Path) -> Path:
    """Replace every file of a pipeline's weights by a few bytes, and return the pipeline."""
    for path in pipeline.rglob("*.safetensors"):
        path.write_bytes(b"no weights")
    return pipeline


def edited(pipeline: Path, to: Path, file: str, **keys: Any) -> Path:
    """A copy of a pipeline with other values in one of its JSON files; a key of value ``...`` is taken out."""
    import shutil

    shutil.copytree(pipeline, to)
    told = json.loads((to / file).read_text()) | keys
    (to / file).write_text(json.dumps({key: value for key, value in told.items() if value is not ...}))
    return to
