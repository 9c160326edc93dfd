"""``ddil sample``"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ddil_eval.cli import choices, options


@click.command()
@click.option("--model", "reference", default="shapes", show_default=True, help=options.MODEL_HELP)
@click.option("--prompt", "prompts", multiple=True, required=True, help="A prompt.")
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
@click.option("--seed", type=options.SEED, default=0, show_default=True, help="The seed of the noise.")
@click.option("--out", type=options.OUTPUT_FOLDER, required=True, help="The folder for the images.")
@options.compute_options()
@options.variant_option
@options.download_option
@options.device_option
@options.json_option
def sample(
    reference: str,
    prompts: tuple[str, ...],
    steps: int | None,
    solver: str | None,
    guidance_scale: float | None,
    reflection: str | None,
    num_images: int,
    seed: int,
    out: Path,
    variant: str | None,
    download: bool,
    device: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate images from prompts: one PNG file for each image, and a grid of all images.

    An image depends only on its prompt, its number, the seed and the model's settings. The command never overwrites
    images.
    """
    options.quiet_libraries()
    from PIL import Image

    from ddil_core.models.generate import announce_sampling, require_prompts, resolve_sampling
    from ddil_core.models.generate import sample as generate
    from ddil_core.models.model import load_model
    from ddil_core.support.compute import FP32
    from ddil_core.support.errors import WrongCommand
    from ddil_core.support.files import replacing
    from ddil_core.support.lock import held
    from ddil_eval.report import figures

    require_prompts(prompts)
    sampling: Any = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale, "reflection": reflection}
    with held(out):
        existing = [path for path in (out / "grid.png", *out.glob("0*.png")) if path.exists()]
        if existing:
            raise WrongCommand(f"the folder {out} holds images already ({existing[0].name}); choose another --out")
        options.fetch_missing([reference], download, variant)
        model = load_model(reference, options.choose_device(device), variant=variant, compute=FP32.override(**settings))
        resolved = resolve_sampling(model, **sampling)
        announce_sampling(model, prompts, resolved)
        images = generate(model, prompts, num_images=num_images, seed=seed, **sampling)
        with ExitStack() as undo:  # write all images or none, so that the same command can run again
            paths = []
            for row, images_of_prompt in enumerate(images):
                for number, image in enumerate(images_of_prompt):
                    path = out / f"{row:03d}-{number:02d}.png"
                    undo.callback(path.unlink, missing_ok=True)
                    with replacing(path) as temporary:
                        Image.fromarray(image).save(temporary)
                    paths.append(str(path))
            columns = [f"no. {n}" for n in range(num_images)]
            grid = figures.image_grid(images, list(prompts), columns, out / "grid.png")
            undo.pop_all()
    if as_json:
        return options.emit({"images": paths, "grid": str(grid), "sampling": resolved.effective()})
    click.echo(f"{len(paths)} {'image' if len(paths) == 1 else 'images'} and {grid}")
