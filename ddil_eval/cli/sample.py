"""``ddil sample``"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ddil_eval.cli import options


@click.command()
@click.option("--model", "reference", default="shapes", show_default=True, help=options.MODEL_HELP)
@click.option("--prompt", "prompts", multiple=True, required=True, help="A prompt; give the option again for more.")
@click.option(
    "--steps",
    type=options.COUNT,
    default=None,
    help="Solver steps; by default what the model was made for, or 32.",
)
@click.option(
    "--solver", default=None, help="ddim, dpmpp_2m, lcm, euler, flow_euler or heun; by default the model's own."
)
@options.guidance_option
@options.reflection_option
@click.option("--num-images", type=options.COUNT, default=1, show_default=True, help="Pictures for each prompt.")
@click.option("--seed", type=options.SEED, default=0, show_default=True, help="The seed that the noise is drawn from.")
@click.option("--out", type=options.OUTPUT_FOLDER, required=True, help="The folder for the pictures.")
@options.dtype_option
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
    dtype: str,
    variant: str | None,
    download: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Draw pictures of prompts: one PNG each, and a grid of all.

    A picture depends on its prompt, its number, the seed and the model's settings alone. Existing pictures are not
    overwritten.
    """
    options.quiet_libraries()
    from PIL import Image

    from ddil_core.models.generate import require_prompts, resolve_sampling, sampling_warnings
    from ddil_core.models.generate import sample as draw
    from ddil_core.models.model import load_model
    from ddil_core.support.errors import WrongCommand
    from ddil_core.support.files import replacing
    from ddil_core.support.lock import held
    from ddil_core.support.progress import warn
    from ddil_eval.report import figures

    require_prompts(prompts)
    asked: Any = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale, "reflection": reflection}
    with held(out):
        taken = [path for path in (out / "grid.png", *out.glob("0*.png")) if path.exists()]
        if taken:
            raise WrongCommand(f"the folder {out} holds pictures already ({taken[0].name}); choose another --out")
        options.fetch_missing([reference], download, variant)
        model = load_model(reference, options.choose_device(device), options.torch_dtype(dtype), variant)
        for remark in sampling_warnings(model, prompts, resolve_sampling(model, **asked)):
            warn(remark)
        images = draw(model, prompts, num_images=num_images, seed=seed, **asked)
        with ExitStack() as undo:  # all pictures or none, so that the same command can be run again
            paths = []
            for row, pictures in enumerate(images):
                for number, picture in enumerate(pictures):
                    path = out / f"{row:03d}-{number:02d}.png"
                    undo.callback(path.unlink, missing_ok=True)
                    with replacing(path) as temporary:
                        Image.fromarray(picture).save(temporary)
                    paths.append(str(path))
            columns = [f"no. {number}" for number in range(num_images)]
            grid = figures.image_grid(images, list(prompts), columns, out / "grid.png")
            undo.pop_all()
    if as_json:
        options.emit({"pictures": paths, "grid": str(grid)})
    else:
        click.echo(f"{len(paths)} pictures and {grid}")
