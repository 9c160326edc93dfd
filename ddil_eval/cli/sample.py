"""``ddil sample``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddil_eval.cli import choices, options

if TYPE_CHECKING:
    from ddil_core.data.base import Prompt


@click.command()
@click.option("--model", "reference", default="shapes", show_default=True, help=options.MODEL_HELP)
@click.option("--prompt", "prompts", multiple=True, help="A prompt. The option may be given several times.")
@click.option("--prompts", "prompt_list", type=options.INPUT, default=None, metavar="FILE",
              help="A list of prompts (.txt, .jsonl, .csv) in place of --prompt.")  # fmt: skip
@click.option(
    "--steps",
    type=options.COUNT,
    default=None,
    help="The number of solver steps. The default is the number that the model was distilled for, or 32.",
)
@click.option("--solver", type=choices.SOLVER, default=None, help="The solver. The default is the model's own.")
@options.guidance_option
@options.reflection_option
@click.option(
    "--num-images", type=options.COUNT, default=1, show_default=True, help="The number of images for each prompt."
)
@options.size_options
@click.option("--seed", type=options.SEED, default=0, show_default=True, help="The seed of the noise.")
@click.option("--out", type=options.OUTPUT_FOLDER, required=True, help="The folder for the images.")
@options.compute_options()
@options.deterministic_option
@options.variant_option
@options.download_option
@options.device_option
@options.show_option
@options.quiet_option
@options.json_option
def sample(
    reference: str,
    prompts: tuple[str, ...],
    prompt_list: Path | None,
    steps: int | None,
    solver: str | None,
    guidance_scale: float | None,
    reflection: str | None,
    num_images: int,
    height: int | None,
    width: int | None,
    seed: int,
    out: Path,
    variant: str | None,
    download: bool,
    device: str | None,
    show: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate images from prompts: one PNG file for each image, an index of them, and a grid to look at.

    An image depends only on its prompt, its number, the seed and the model's settings. The command never overwrites
    images. The folder is a data set, folder:OUT, and 'ddil eval score' measures it.
    """
    protocol = options.picture_protocol(show, as_json)
    options.quiet_libraries()
    from ddil_core.data.folder import OVERVIEW
    from ddil_core.models.generate import announce_sampling, require_prompts, resolve_sampling
    from ddil_core.models.generate import sample as generate
    from ddil_core.models.model import load_model
    from ddil_core.support.compute import chosen_compute
    from ddil_core.support.lock import held
    from ddil_core.support.size import WantedSize
    from ddil_eval.experiments.image_sources import INDEX, write_sample
    from ddil_eval.experiments.system_configs import image_origin

    chosen = _prompts(prompts, prompt_list)
    prompts = tuple(prompt.text for prompt in chosen)
    require_prompts(prompts)
    sampling: Any = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale, "reflection": reflection}
    with held(out):
        _require_empty(out)
        options.fetch_missing([reference], download, variant)
        compute = chosen_compute(**settings)
        size = WantedSize(height=height, width=width)
        model = load_model(reference, options.choose_device(device), variant=variant, compute=compute, **size)
        model.require_pictures("draw them in Python with ddil_core.sample, which returns them as an array")
        resolved = resolve_sampling(model, **sampling)
        announce_sampling(model, prompts, resolved)
        images = generate(model, prompts, num_images=num_images, seed=seed, **sampling)
        origin = image_origin(model, resolved, seed, with_weights=False)  # a hash of large weights takes long
        paths, shown = write_sample(images, chosen, origin, out)
    grid = out / OVERVIEW
    if as_json:
        files = {"images": [str(path) for path in paths], "grid": str(grid), "index": str(out / INDEX)}
        return options.emit(files | {"sampling": resolved.effective()})
    of_the_first = f" of the first {shown}" if shown < len(paths) else ""
    options.say(f"{len(paths)} {'image' if len(paths) == 1 else 'images'} and {grid}{of_the_first}")
    options.show_pictures([grid], protocol)


def _prompts(prompts: Sequence[str], prompt_list: Path | None) -> list[Prompt]:
    """Return the prompts of ``--prompt``, with their places as ids, or those of the list.

    Raises:
        WrongCommand: There are prompts of both options or of neither, or the list cannot be read.
    """
    from ddil_core.data.base import Prompt
    from ddil_core.support.errors import WrongCommand
    from ddil_eval.experiments.prompts import read_prompts

    if bool(prompts) == (prompt_list is not None):
        raise WrongCommand("the command needs prompts; give each with --prompt, or a list of them with --prompts FILE")
    if prompt_list is not None:
        return read_prompts(prompt_list)
    return [Prompt(f"{place:03d}", text) for place, text in enumerate(prompts)]


def _require_empty(out: Path) -> None:
    """Refuse a folder with images, or with files that the command would overwrite.

    Raises:
        WrongCommand: The folder holds one. The message names it.
    """
    from ddil_core.data.folder import OVERVIEW
    from ddil_core.support.errors import WrongCommand
    from ddil_eval.experiments.image_sources import INDEX, ORIGIN

    existing = [path for path in (out / OVERVIEW, out / INDEX, out / ORIGIN, *out.glob("0*.png")) if path.exists()]
    if existing:
        raise WrongCommand(f"the folder {out} holds images already ({existing[0].name}); choose another --out")
