"""The common part of the experiments' commands: read a protocol, run the experiment, print its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_eval.cli import options
from ddil_eval.cli.output import show

if TYPE_CHECKING:
    from ddil_eval.experiments.experiments import Experiment


def starting_protocol(
    experiment: Experiment, protocol: Path | None, settings: Sequence[str], teacher: str | None = None
) -> tuple[dict[str, Any], str]:
    """Read the protocol that a command starts from, with its ``--set`` settings, and return its name for messages too.

    Args:
        experiment: The experiment, which has a shipped protocol.
        protocol: The user's protocol, in place of the shipped one.
        settings: KEY=VALUE settings.
        teacher: The teacher that the user named. The shipped protocol of its world is taken, where there is one.
    """
    from ddil_core.distillation.shipped import world
    from ddil_core.support.protocol import override, read_yaml
    from ddil_core.support.resources import protocols

    path = protocol or protocols() / str(experiment.protocol)
    if protocol is None and teacher is not None:
        of_world = protocols() / world(teacher) / path.name
        path = of_world if of_world.is_file() else path
    return override(read_yaml(path), settings), str(path)


def run_experiment(
    experiment: Experiment,
    content: Mapping[str, Any],
    given: Mapping[str, Any],
    source: str,
    out: Path,
    download: bool,
    device: str | None,
    as_json: bool,
    save_images: bool = False,
) -> None:
    """Run an experiment and show its tables.

    Args:
        experiment: The experiment.
        content: The protocol.
        given: The values of the command's options, by key. A value that is not None replaces the protocol's.
        source: The name of the protocol, for messages.
        out: The results folder.
        download: Whether missing models may be downloaded.
        device: The device, or None for the best one.
        as_json: Whether to print the records as JSON in place of tables.
        save_images: Whether to keep the images that the experiment generates.

    Raises:
        WrongCommand: the configuration does not fit, an option would do nothing, or the experiment keeps no images.
    """
    options.quiet_libraries()
    from ddil_core.support.compute import require_effect
    from ddil_core.support.errors import WrongCommand
    from ddil_core.support.protocol import validate

    given = {key: value for key, value in given.items() if value is not None}
    require_effect(given.get("dtype"), content)
    config = validate(experiment.config, {**content, **given}, source, options=given)
    options.print_if_asked(config, source)
    if save_images and not experiment.keeps_images:
        raise WrongCommand(f"the experiment {experiment.name!r} keeps no images; leave out --save-images")
    options.fetch_missing(experiment.models(config), download)
    keep = {"save_images": True} if save_images else {}
    records = experiment.run(config, out, options.choose_device(device), **keep)
    show(records, out, as_json, f"{experiment.contents} are in")
