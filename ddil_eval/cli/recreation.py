"""Tables from nothing: a protocol lists ``ddil`` commands, which run in their order, as processes of their own.

Distillations that follow one another run in parallel, one core each. Every other command runs alone, on all cores. A
finished command is not run again, unless one before it is: measurements and reports follow from distillations. A
stopped command goes on where it was, as it does by itself.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile
from pathlib import Path

import click
from pydantic import Field, field_validator, model_validator

from ddil_core.support.errors import WrongCommand
from ddil_core.support.files import write_text
from ddil_core.support.paths import user_path
from ddil_core.support.protocol import Strict
from ddil_core.support.resources import find_protocol
from ddil_eval.experiments.training_seeds import for_each_seed, require_seeds

ALLOWED = ("distill", "eval", "report")
"""The commands that a recreation may run."""
OUT = "{out}"


class CommandConfig(Strict):
    """A command of a recreation, or one for each training seed.

    Attributes:
        run: The command line after the word ``ddil``. ``{training_seed}`` stands for the seeds of training, and
            ``{out}`` for the results folder.
        training_seeds: The number of commands, with the training seeds 0, 1 and so on. None for one command.
        core_minutes: How long one command computes, in minutes of one core of the machine of ``speed``.
    """

    run: str
    training_seeds: int | None = Field(default=None, ge=1)
    core_minutes: float = Field(gt=0)

    @field_validator("run")
    @classmethod
    def _is_a_command(cls, run: str) -> str:
        try:
            words = shlex.split(run)
        except ValueError as error:
            raise ValueError(f"the command {run!r} cannot be split into words: {error}") from error
        if not words or words[0] not in ALLOWED:
            raise ValueError(f"the command {run!r} is none of ddil's {', '.join(ALLOWED)}")
        return run

    @model_validator(mode="after")
    def _names_its_seed(self) -> CommandConfig:
        require_seeds(self.run, self.training_seeds, f"the command {self.run!r}")
        return self


class RecreationConfig(Strict):
    """All commands that make some tables, in their order.

    Attributes:
        title: What they make.
        work: The folder of logs, and of notes on finished commands.
        speed: The speed of the machine on which ``core_minutes`` were measured: the images of 4 steps that its core
            draws in a second with ``shapes-flow``. ``--dry-run`` prints that of this machine.
        commands: The commands.
    """

    title: str
    work: str
    speed: float = Field(gt=0)
    commands: tuple[CommandConfig, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Command:
    """A command of a recreation.

    Attributes:
        words: The words after ``ddil``.
        core_minutes: How long it computes, in minutes of one core of the machine of the protocol.
        done: The file that says that it is finished. Its name has a hash of the command and of its protocols. It holds
            the command, and the records that the command added.
        log: The file of what it prints.
    """

    words: tuple[str, ...]
    core_minutes: float
    done: Path
    log: Path

    @property
    def text(self) -> str:
        return shlex.join(("ddil", *self.words))

    @property
    def name(self) -> str:
        """A short name for messages: the words before the first option, and the student's folder."""
        students = _values(self.words, "--out") if self.is_distillation else []
        return shlex.join([*takewhile(lambda word: not word.startswith("-"), self.words), *students])

    @property
    def core_seconds(self) -> int:
        return max(1, round(60 * self.core_minutes))

    @property
    def is_distillation(self) -> bool:
        """Whether it makes a student. It may then run beside its neighbours, and needs nothing from them."""
        return self.words[0] == "distill"

    @property
    def is_done(self) -> bool:
        """Whether it is finished, and what it wrote is still there: the student, the records, the folder of results."""
        if not self.done.is_file():
            return False
        folders = [Path(folder) for folder in _values(self.words, "--out") or _values(self.words, "--results")]
        if self.is_distillation:
            return all((folder / "student").is_dir() for folder in folders)
        added = self.done.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        needs_records = self.words[0] == "eval" and bool(folders)
        return all(map(Path.is_file, map(Path, added))) and (not needs_records or bool(self.records()))

    def records(self) -> set[Path]:
        """Return the files of the records in its results folder."""
        folders = _values(self.words, "--out") if self.words[0] == "eval" else []
        return {path for folder in folders for path in (Path(folder) / "records").glob("*.json")}

    def finish(self, before: set[Path]) -> None:
        """Note that it is finished. ``before`` are the records that were there when it began."""
        added = sorted(map(str, self.records() - before))
        write_text(self.done, "\n".join([self.text, *added]) + "\n")


def _values(words: Sequence[str], option: str) -> list[str]:
    """Return the values of an option among the words of a command."""
    after = [value for word, value in pairwise(words) if word == option]
    return after + [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]


def commands_of(config: RecreationConfig, out: Path) -> list[Command]:
    """Return all commands of a recreation, in their order.

    Args:
        config: The recreation.
        out: The results folder.
    """
    found: list[Command] = []
    work = user_path(config.work, "the key 'work'")
    for command in config.commands:
        for line in for_each_seed(command.run, command.training_seeds):
            words = tuple(word.replace(OUT, str(out)) for word in shlex.split(line))
            name = f"{words[0]}-{_digest(words)[:12]}"
            log = work / "logs" / f"{len(found):03d}-{words[0]}.log"
            found.append(Command(words, command.core_minutes, work / "done" / name, log))
    return found


def _protocols(words: Sequence[str]) -> list[Path]:
    """Return the files of the protocols that a command names."""
    named = [word for word in words if word.endswith((".yaml", ".yml")) and not word.startswith("-")]
    named += [word for word in _values(words, "--protocol") if word not in named]
    return [find_protocol(Path(word)) for word in named]


def _digest(words: Sequence[str]) -> str:
    """Return a hash of a command and of the protocols that it names."""
    content = hashlib.sha256("\0".join(words).encode())
    for path in _protocols(words):
        if path.is_file():
            content.update(path.read_bytes())
    return content.hexdigest()


def require_valid(commands: Sequence[Command]) -> None:
    """Refuse commands that would fail at once, before the first of them runs: the last may come after hours.

    Raises:
        WrongCommand: a command does not exist, an option does not fit, or a protocol is not there.
    """
    from ddil_eval.cli import ddil

    for command in commands:
        group: click.Command | None = ddil
        context, words = click.Context(ddil, info_name="ddil"), list(command.words)
        try:
            while isinstance(group, click.Group):
                name = words.pop(0) if words else ""
                group = group.get_command(context, name)
            if group is None:
                raise WrongCommand(f"there is no command {name!r}")
            group.make_context(name, words, parent=context).close()
            for path in _protocols(command.words):
                if not path.is_file() and "=" not in path.name:  # KEY=VALUE of --set is no path
                    raise WrongCommand(f"there is no protocol {path}")
        except (click.ClickException, click.exceptions.Exit, WrongCommand) as error:
            reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
            raise WrongCommand(f"{command.text} cannot run: {reason}") from error


def left(commands: Sequence[Command]) -> list[Command]:
    """Return the commands to run, in the order in which they begin.

    They are the distillations that are not done, and from the first such on all other commands. Of distillations that
    may run at once the longest begin first, so that no job waits long for the last one.
    """
    found: list[Command] = []
    for command in commands:
        if not command.is_done or (found and not command.is_distillation):
            found.append(command)
    return [one for group in together(found) for one in sorted(group, key=lambda command: -command.core_minutes)]


def together(commands: Sequence[Command]) -> Iterator[list[Command]]:
    """Yield the commands that may run at once: distillations that follow one another, or any other command alone."""
    for _, group in groupby(commands, key=lambda command: command.is_distillation or command.text):
        yield list(group)
