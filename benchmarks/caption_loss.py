"""Why does PH2P miss a caption: because of its objective, or because of its search?

    python -m benchmarks.caption_loss INVERSIONS [--num-images 64] [--draws 16] [--csv FILE]

The benchmark compares the objective of the true captions with that of inverted prompts. INVERSIONS is the folder
``inversions`` that ``ddil eval run protocols/shapes/table5.yaml --out OUT`` leaves in OUT. The loss is PH2P's own: the
mean squared error of ε̂ at t = 500 … 899. The noise is the same for all prompts of an image, and no inverter has used
it.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch

from benchmarks.printing import show
from ddil_core.data.base import Prompt
from ddil_core.data.datasets import open_data
from ddil_core.inversion.ph2p import PH2PSettings, draw_noise, loss_and_gradient
from ddil_core.inversion.problem import InversionProblem
from ddil_core.inversion.words import model_words
from ddil_core.models.model import load_model
from ddil_core.shapes.training.architecture import caption_words
from ddil_eval.experiments.caption_recall import caption_recall


def inverted(folder: Path, name: str, prompts: list[Prompt]) -> list[str]:
    """Return the prompts that an inverter found, in the order of the images."""
    files = [json.loads(path.read_text()) for path in folder.glob(f"{name}-*/*.json")]
    by_id = {file["id"]: file["prompt"] for file in files}
    return [by_id[prompt.id] for prompt in prompts]


@click.command(help=__doc__)
@click.argument("inversions", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--num-images", default=64, show_default=True)
@click.option("--draws", default=16, show_default=True, help="Timesteps and noises of each image.")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), default=None)
def main(inversions: Path, num_images: int, draws: int, csv: Path | None) -> None:
    data, teacher = open_data("shapes"), load_model("shapes", "cpu")
    prompts, images = data.prompts(num_images), np.concatenate(list(data.images(num_images)))
    problem = InversionProblem(
        teacher, model_words(teacher, tuple(caption_words())), images, tuple(p.id for p in prompts), 0
    )
    noise = draw_noise(problem.latents(), problem, problem.generators("held out"), PH2PSettings(draws=draws))
    parts = list(zip(*(tensor.split(draws) for tensor in noise), strict=True))

    def losses(texts: list[str]) -> np.ndarray:
        found = []
        for text, part in zip(texts, parts, strict=True):
            index = torch.tensor([[problem.words.words.index(word) for word in text.split()]])
            found.append(float(loss_and_gradient(problem, teacher.guided(1.0), problem.words.table[index], *part)[0]))
        return np.array(found)

    captions = [prompt.text for prompt in prompts]
    of = {"true caption": captions} | {name: inverted(inversions, name, prompts) for name in ("ph2p", "pez", "random")}
    loss = {name: losses(texts) for name, texts in of.items()}
    rows = [
        {
            "prompts": name,
            "loss": loss[name].mean(),
            "worse_than_the_caption": (loss[name] > loss["true caption"]).mean(),
            "recovered": np.mean([caption_recall(*pair)["all"] for pair in zip(captions, texts, strict=True)]),
        }
        for name, texts in of.items()
    ]
    show(pd.DataFrame(rows), csv, ".3g", title=f"PH2P's loss, {num_images} images")


if __name__ == "__main__":
    main()
