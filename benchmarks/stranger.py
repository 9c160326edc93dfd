"""A small teacher that this project has never seen: train it, distil it by every method, choose settings, and measure.

    python -m benchmarks.stranger --out runs/stranger [--updates 1500] [--csv FILE]

The teacher and its pictures are those of ``benchmarks.stranger_world``. Each method is tried with a few settings. They
are compared on the captions of ``OUT/choose``, and the best of each method is measured on those of ``OUT/test``, which
nothing was chosen on. All of it takes about an hour on a quiet core. After an interruption, the same command goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor, nn

from benchmarks import stranger_world as world
from benchmarks.printing import show
from ddil_core.diffusion.schedule import Schedule
from ddil_core.distillation.distill import distill
from ddil_core.distillation.loop import Ema
from ddil_core.models.sampling import SYSTEM_FILE
from ddil_core.shapes.training.architecture import use_plain_attention
from ddil_core.shapes.training.stage import run_stage
from ddil_core.support.ending import in_a_sentence
from ddil_core.support.protocol import read_yaml
from ddil_core.support.resources import protocols
from ddil_eval.cli.options import quiet_libraries
from ddil_eval.experiments.systems import SystemsConfig, compare_systems
from ddil_eval.report.records import Record

CAPTION_DROPOUT = 0.1
PICTURES = {"train": 4000, "choose": 1000, "test": 1000}
METRIC = "fd_efflite0"
TEACHER, UNDISTILLED = "teacher, 32 steps", "teacher, 4 steps"


def pictures(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Return pictures, float32 [N, 3, 32, 32] in [-1, 1], and their captions."""
    rng = np.random.default_rng(seed)
    drawn = [world.picture(rng) for _ in range(count)]
    pixels = np.stack([np.asarray(image) for image, _ in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, [caption for _, caption in drawn]


def train_autoencoder(pixels: Tensor, out: Path, steps: int) -> Any:
    torch.manual_seed(0)
    vae = world.autoencoder()

    def losses(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = pixels[torch.randint(len(pixels), (16,), generator=generator)]
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - x
        loss = error.abs().mean() + 10 * error.square().mean() + 2e-6 * posterior.kl().mean()
        return {"loss": loss, "mse": error.square().mean()}

    run_stage("autoencoder", vae, losses, out=out, steps=steps, lr=2e-3, weight_decay=1e-4)
    return vae.eval()


def train_teacher(x0: Tensor, tokens: Tensor, no_caption: Tensor, out: Path, steps: int) -> nn.ModuleDict:
    """Train the U-Net and its text encoder on the squared error of ε. Return the averaged weights."""
    torch.manual_seed(1)
    words = world.tokenizer()
    model = nn.ModuleDict({"unet": world.unet(), "text_encoder": world.text_encoder(words)}).train()
    use_plain_attention(*model.values())
    ema, schedule = Ema(model, 0.999), Schedule.stable_diffusion()

    def losses(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(x0), (32,), generator=generator)
        dropped = torch.rand(len(rows), 1, generator=generator) < CAPTION_DROPOUT
        t = torch.randint(len(schedule), (len(rows),), generator=generator)
        eps = torch.randn(x0[rows].shape, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = model["text_encoder"](torch.where(dropped, no_caption, tokens[rows])).last_hidden_state
            predicted = model["unet"](schedule.add_noise(x0[rows], eps, t), t, text).sample
        return {"loss": (predicted.float() - eps).square().mean()}

    run_stage("teacher", model, losses, out=out, steps=steps, lr=1e-3, ema=ema)
    return ema.module


def make_teacher(out: Path, autoencoder_steps: int, teacher_steps: int, guidance: float) -> None:
    """Write the pictures, and train the teacher where it is not yet there."""
    for seed, (name, count) in enumerate(PICTURES.items()):
        if not (out / name / "metadata.jsonl").is_file():
            world.write_pictures(out / name, count, seed)
    if (out / "teacher" / SYSTEM_FILE).is_file():
        return
    pixels, captions = pictures(PICTURES["train"], 0)
    vae = train_autoencoder(pixels, out, autoencoder_steps)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(250)])
    scale = float(1 / latents.std())
    words = world.tokenizer()
    tokens = words([*captions, ""], padding="max_length", return_tensors="pt").input_ids
    model: Any = train_teacher(scale * latents, tokens[:-1], tokens[-1], out, teacher_steps)
    vae.register_to_config(scaling_factor=scale)
    world.save_teacher(out / "teacher", vae, model["unet"], model["text_encoder"], words)
    sampling = {"solver": "ddim", "steps": None, "guidance_scale": guidance}
    (out / "teacher" / SYSTEM_FILE).write_text(json.dumps(sampling) + "\n", encoding="utf-8")


def candidates(updates: int, guidance: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the protocols to try, by the method's title and the name of the settings.

    "published" is what LCM's authors use for Stable Diffusion, at a learning rate for a small network.
    """
    trained = {"guidance_range": [1.5, guidance], "guidance_scale": (1.5 + guidance) / 2}
    stages = [{"steps": steps, "updates": updates} for steps in (8, 4)]
    published = {"teacher_steps": 50, "weighting": "none"}
    tries: dict[str, dict[str, dict[str, Any]]] = {
        "PD": {"pd": {"stages": stages, "convert": {"updates": updates}}},
        "DMD2": {"dmd2": {"updates": max(1, updates // 5), "guidance_scale": (1 + guidance) / 2}},
    }
    for title, name, rate in (("LCM", "lcm", 5e-4), ("LCM-LoRA", "lcm-lora", 1e-4)):
        shared = {"updates": updates, "learning_rate": rate} | trained
        tries[title] = {
            name: shared,
            f"{name}-published": shared | published,
        }
    shapes = protocols() / "shapes"
    return {
        title: {
            name: read_yaml(shapes / f"{title.lower()}.yaml") | {"pool": PICTURES["train"], "watch": None} | changes
            for name, changes in rows.items()
        }
        for title, rows in tries.items()
    }


def measure(out: Path, pictures: str, rows: dict[str, tuple[Path, int | None]], count: int) -> list[Record]:
    """Measure models on the captions of a folder of pictures, each with its difference from 4 undistilled steps.

    Args:
        out: The folder of the benchmark.
        pictures: The name of the folder.
        rows: For each name the model, and its number of steps; None for its own.
        count: The number of images.
    """
    recipe = out / "recipe.yaml"
    reference = {"data": "folder", "images": PICTURES[pictures]}
    content = {"images": PICTURES[pictures], "reference": reference, "metrics": [METRIC]}
    recipe.write_text(yaml.safe_dump({"stranger": content}), encoding="utf-8")
    systems = [{"name": name, "model": str(model), "steps": steps} for name, (model, steps) in rows.items()]
    config = SystemsConfig.model_validate(
        {
            "data": f"folder:{out / pictures}",
            "recipe": str(recipe),
            "systems": systems,
            "differences": [[name, UNDISTILLED] for name in rows if name not in (TEACHER, UNDISTILLED)],
            "num_prompts": count,
        }
    )
    return compare_systems(config, out / f"results-{pictures}")


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/stranger"), show_default=True
)
@click.option("--autoencoder-steps", default=2000, show_default=True)
@click.option("--teacher-steps", default=6000, show_default=True)
@click.option("--guidance", default=3.0, show_default=True, help="The teacher's guidance scale.")
@click.option("--updates", default=1500, show_default=True, help="The updates of a stage; DMD2 has a fifth.")
@click.option("--num-images", "count", default=1000, show_default=True, help="The number of images of a row.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path, dir_okay=False), default=None)
def main(
    out: Path, autoencoder_steps: int, teacher_steps: int, guidance: float, updates: int, count: int,
    csv_path: Path | None,
) -> None:  # fmt: skip
    """Train the teacher, distil it, choose settings, and print the table."""
    quiet_libraries()
    with in_a_sentence():
        make_teacher(out, autoencoder_steps, teacher_steps, guidance)
        teacher = out / "teacher"
        rows: dict[str, tuple[Path, int | None]] = {TEACHER: (teacher, 32), UNDISTILLED: (teacher, 4)}
        chosen = dict(rows)
        for title, tries in candidates(updates, guidance).items():
            runs = {name: out / "runs" / name for name in tries}
            for name, protocol in tries.items():
                distill(str(teacher), f"folder:{out / 'train'}", protocol, runs[name])
            tried = measure(out, "choose", rows | {name: (run, None) for name, run in runs.items()}, count)
            values = {
                record.cell["name"]: record.metrics[METRIC].estimate.value
                for record in tried
                if record.cell["kind"] == "system"
            }
            show(
                pd.DataFrame([{"settings": name, METRIC: values[name]} for name in runs]),
                None,
                title=f"{title}, to choose",
            )
            chosen[title] = (runs[min(runs, key=lambda name: values[name])], None)
        show(table(measure(out, "test", chosen, count)), csv_path, title="captions that nothing was chosen on")


def table(records: list[Record]) -> pd.DataFrame:
    """Return the table: each system with its interval, and its difference from 4 undistilled steps."""
    rows = []
    for record in records:
        if record.cell["kind"] not in ("system", "difference"):
            continue
        estimate = record.metrics[METRIC].estimate
        p_value = "" if estimate.p_value is None else f"{estimate.p_value:.3g}"
        rows.append(
            {"kind": record.cell["kind"], "name": record.cell["name"], METRIC: estimate.value}
            | {"low": estimate.low, "high": estimate.high, "p": p_value}
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
