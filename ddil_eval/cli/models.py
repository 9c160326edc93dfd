"""``ddil models``: what there is and what is here; fetching it, and converting published pickles."""

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

    Each with its source, revision and licence ("unverified" where they were not read there), the size of its files on this
    machine, and what to do where some are missing. Nothing is fetched.
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
@click.option("--config-only", is_flag=True, help="Fetch no weights: what a single-file checkpoint needs beside it.")
def download(references: tuple[str, ...], variant: str | None, config_only: bool) -> None:
    """Fetch the files of models from the hub: by a name of 'ddil models', or org/name, or org/name@revision.

    The size is said before. An interrupted download goes on where it stopped, and weights are checked against the hub's
    SHA-256. Only safetensors, JSON and text files are fetched, of the components that are used.
    """
    from ddil_core.models.fetch import fetch_model

    for reference in references:
        fetch_model(reference, variant, weights=not config_only)


@models.command()
@click.argument("source", type=options.INPUT)
@click.argument("out", type=options.OUTPUT)
@click.option("--part", metavar="NAME", help="Which weights to take of a file that holds several, as in model or ema.")
@as_json
def convert(source: Path, out: Path, part: str | None, as_json: bool) -> None:
    """Turn published weights (.bin, .ckpt, .pt, .pth) into safetensors: a file, or a folder with all that it holds.

    The pickle is read for its tensors alone: one that asks for more is refused, and no code of it is run. OUT is written whole or
    not at all, and never over something else. A file with several sets of weights is converted one --part at a time.
    """
    from ddil_core.models.convert import convert_weights as run

    done = run(source, out, part)
    if as_json:
        options.emit([asdict(one) for one in done])
        return
    for one in done:
        click.echo(f"{one.source}: {one.tensors} tensors\n  SHA-256 {one.source_sha256}")
        if one.dropped:
            click.echo(f"  left out: {', '.join(one.dropped)}")
        click.echo(f"{one.out}\n  SHA-256 {one.out_sha256}")
