"""How much of a caption does PH2P find with the exchange of words, and what does the exchange cost?

    python -m benchmarks.ph2p_exchange [--protocol shapes/table5.yaml] [--set KEY=VALUE] [--num-images 16] [--first 64]
        [--csv FILE]

PH2P runs with a protocol's settings, in its two parts: the gradient rounds, of which the best prompt by the loss on
common noise is taken, and the exchange of its words. ``--set`` changes a setting of PH2P, as in ``tokens=14`` or
``exchange.sweeps=6``. The images are held out, and by default none of them is in Table 5. ``held_out_loss`` is the loss
on noise that is used for nothing else. ``cpu_s`` is the processor time of each part, for an image.

The first row is the floor: what random prompts of as many words recover, as a mean over 300 prompts of each image. With
``--floor-only`` nothing else is measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pandas as pd
from torch import Tensor

from benchmarks.ph2p_winners import subjects
from benchmarks.printing import show
from ddil_core.inversion.ph2p import PH2PSettings, exchanged, judging_losses, judging_noise, search, winner
from ddil_core.inversion.problem import InversionProblem
from ddil_core.inversion.words import model_words
from ddil_core.models.model import load_model
from ddil_core.shapes.training.architecture import caption_words
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.protocol import override, read_yaml, validate
from ddil_core.support.resources import find_protocol
from ddil_eval.cli.options import quiet_libraries
from ddil_eval.experiments.caption_recall import caption_recall


@click.command(help=__doc__)
@click.option("--protocol", default="shapes/table5.yaml", show_default=True)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="A setting of PH2P.")
@click.option("--num-images", default=16, show_default=True)
@click.option("--first", default=64, show_default=True, help="The first image; Table 5 has the images before 64.")
@click.option("--floor-only", is_flag=True, help="Measure random prompts alone.")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), default=None)
def main(
    protocol: str, changes: tuple[str, ...], num_images: int, first: int, floor_only: bool, csv: Path | None
) -> None:
    quiet_libraries()
    try:
        teacher_reference, chosen = settings(protocol, changes)
    except DdilError as error:
        raise click.UsageError(str(error)) from error
    ids, captions, images = subjects(first, num_images)
    title = f"PH2P with the exchange of words, {chosen.tokens} words, {num_images} images"
    floor = random_recall(captions, chosen.tokens)
    rows: list[dict[str, object]] = [
        {"after": "random words", "recovered": floor.mean(), "se": floor.std(ddof=1) / np.sqrt(num_images)}
    ]
    if floor_only:
        show(pd.DataFrame(rows), csv, ".3g", title=title)
        return
    teacher = load_model(teacher_reference, "cpu")
    problem = InversionProblem(teacher, model_words(teacher, tuple(caption_words())), images, ids, 0)
    denoiser, x0, generators = teacher.guided(1.0), problem.latents(), problem.generators("ph2p")
    held_out = judging_noise(x0, problem, chosen.model_copy(update={"judging": 16}), "held out")

    def measured(part: str, index: Tensor, seconds: float) -> dict[str, object]:
        shares = [caption_recall(*pair)["all"] for pair in zip(captions, problem.words.texts(index), strict=True)]
        return {
            "after": part,
            "recovered": np.mean(shares),
            "se": np.std(shares, ddof=1) / np.sqrt(num_images),
            "held_out_loss": float(judging_losses(problem, denoiser, index, held_out).mean()),
            "cpu_s": seconds / num_images,
        }

    begun = time.process_time()
    prompts = [
        one.index for _ in range(chosen.searches) for one in search(problem, denoiser, chosen, x0, generators, _nothing)
    ]
    best = winner(problem, denoiser, prompts, judging_noise(x0, problem, chosen))
    searched = time.process_time()
    index = exchanged(problem, denoiser, chosen, x0, best, _nothing)
    ended = time.process_time()
    rows += [measured("the rounds", best, searched - begun), measured("the exchange", index, ended - searched)]
    show(pd.DataFrame(rows), csv, ".3g", title=title)


def settings(protocol: str, changes: Sequence[str]) -> tuple[str, PH2PSettings]:
    """Return the teacher of a protocol and its settings of PH2P, changed, with one candidate.

    Raises:
        WrongCommand: there is no such protocol, it does not invert with PH2P, or a setting does not fit.
    """
    content = read_yaml(find_protocol(Path(protocol)))
    if "ph2p" not in content.get("inverters", {}):
        raise WrongCommand(f"the protocol {protocol} has no inverter ph2p; name one that has")
    told = override(content["inverters"]["ph2p"], changes) | {"candidates": 1}
    return str(content.get("teacher", "shapes")), validate(PH2PSettings, told, protocol)


def random_recall(captions: Sequence[str], tokens: int, draws: int = 300) -> np.ndarray:
    """Return for each caption the share of its words that random prompts hold, as a mean over ``draws`` prompts."""
    words, generator = caption_words(), np.random.default_rng(0)
    return np.array(
        [
            np.mean([caption_recall(caption, " ".join(generator.choice(words, tokens)))["all"] for _ in range(draws)])
            for caption in captions
        ]
    )


def _nothing() -> None:
    """No progress to be shown."""


if __name__ == "__main__":
    main()
