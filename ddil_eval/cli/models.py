"""``ddil models``: list models, download them, and convert published pickles."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ddil_eval.cli import options
from ddil_eval.cli.listing import as_json, show_list


@click.group(invoke_without_command=True)
@as_json
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models that --model, --teacher and --student accept by name.

    The list shows the source, the revision and the licence ("unverified" if nobody has read it at the source), the size
    of the files on this machine, and what to do about missing files. The command downloads nothing.
    """
    if ctx.invoked_subcommand is not None:
        return
    from ddil_core.models.catalogue import list_models
    from ddil_core.models.hub import size_text

    rows = list_models()
    if not as_json:
        rows = [{**row, "size": size_text(row["bytes"]), "revision": row["revision"][:12]} for row in rows]
    show_list("Models", ("name", "description", "source", "revision", "licence", "size", "here"), rows, as_json)


@models.command()
@click.argument("references", metavar="MODEL", nargs=-1, required=True)
@options.variant_option
@click.option(
    "--config-only",
    is_flag=True,
    help="Download no weights, only the files that a single-file checkpoint needs beside it.",
)
@options.quiet_option
def download(references: tuple[str, ...], variant: str | None, config_only: bool) -> None:
    """Download the files of models from the hub, by a name of 'ddil models', by org/name, or by org/name@revision.

    The command prints the size first. It continues an interrupted download, and checks weights against the hub's
    SHA-256. It downloads only safetensors, JSON and text files of the components that it uses.
    """
    from ddil_core.models.fetch import fetch_model

    for reference in references:
        fetch_model(reference, variant, weights=not config_only)


@models.command()
@click.argument("source", type=options.INPUT)
@click.argument("out", type=options.OUTPUT)
@click.option(
    "--part", metavar="NAME", help="The set of weights to convert, if the file holds several, such as model or ema."
)
@as_json
def convert(source: Path, out: Path, part: str | None, as_json: bool) -> None:
    """Convert published weights (.bin, .ckpt, .pt, .pth) into safetensors: one file, or a folder with all its files.

    The command reads only tensors from a pickle. It refuses a pickle that contains anything else, and runs no code from
    it. The command writes OUT whole or not at all, and never overwrites files. Convert a file with several sets of
    weights one --part at a time.
    """
    from ddil_core.models.convert import convert_weights as run

    conversions = run(source, out, part)
    if as_json:
        options.emit([asdict(file) for file in conversions])
        return
    for file in conversions:
        options.say(f"{file.source}: {file.tensors} tensors")
        options.say(f"  SHA-256 {file.source_sha256}")
        if file.dropped:
            options.say(f"  left out: {', '.join(file.dropped)}")
        options.say(str(file.out))
        options.say(f"  SHA-256 {file.out_sha256}")
