"""Folders whose files are damaged before a command reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.commands import PD, commands, distillation, files_of, records_of, save_images, score, student_of
from tests.faults.harness import Command
from tests.shards import save_shards


@dataclass(frozen=True)
class Scene:
    """A folder, and the command that reads it.

    Attributes:
        what: What the table calls the files.
        command: The command.
        make: Makes the folder.
        patterns: Which of its files are damaged.
    """

    what: str
    command: Command
    make: Callable[[Path], None]
    patterns: tuple[str, ...] = ("*",)

    def files(self, folder: Path) -> list[Path]:
        """Return the files that are damaged."""
        found = {path for pattern in self.patterns for path in folder.rglob(pattern) if path.is_file()}
        return sorted(path for path in found if path.name != ".ddil.lock" and ".partial" not in path.name)


def scenes(folder: Path, teacher: Path, student: Path) -> Iterator[Scene]:
    """Yield every folder that is damaged: runs, records, features, references, images and shards."""
    by_name = {command.name: command for command in commands(folder, teacher, student)}
    pd, systems = by_name["distill pd with DDIL"], by_name["eval systems"]
    yield Scene("a killed run", pd, lambda out: _kill(pd, out, "checkpoints/stage-2-*.pt", 2))
    yield Scene("a finished run's student", pd, lambda out: _finish(pd, out), ("student/**/*",))
    yield Scene("a killed `eval systems`", systems, lambda out: _kill(systems, out, "partial/*/*.npz", 2))
    measured = ("records/*", "features/**/*", "images/**/*")
    yield Scene("records, features and images", systems, lambda out: _finish(systems, out), measured)
    report = Command("report", lambda out: ["report", "--results", str(out), "--csv", "--out", str(out / "report")],
                     lambda out: files_of(out, out / "report", "*.csv"))  # fmt: skip
    yield Scene("records, for a report", report, lambda out: _finish(systems, out), ("records/*.json",))
    reference = _with_reference(teacher)
    yield Scene("a cached reference", reference, lambda out: _finish_reference(reference, out), ("references/*/*",))
    scored = Command(
        "eval score", lambda out: [*map(str, score(out / "images")), "--out", str(out / "results")],
        lambda out: {"numbers": [*records_of(out / "results").values()]},  # their names hold the path of the images
    )  # fmt: skip
    yield Scene("a folder of images", scored, lambda out: _images(out))
    shards = Command("distill with shards", _shard_words(folder, teacher), lambda out: student_of(out / "run"))
    yield Scene("shards with checksums", shards, _shards, ("shards/*",))


def _kill(command: Command, out: Path, pattern: str, count: int) -> None:
    """Kill a command once it has ``count`` files of a pattern."""
    command.run(out, until=lambda: len([*out.glob(pattern)]) >= count)


def _finish(command: Command, out: Path) -> None:
    ended = command.run(out)
    assert ended.status == 0, ended.said[-2000:]


def _with_reference(teacher: Path) -> Command:
    """Return an evaluation whose cache of references lies inside of its folder."""
    words = ["eval", "systems", "--model", teacher, "--device", "cpu", "--data", "shapes", "--num-images", "4"]
    words += ["--reference-images", "6", "--set", "batch_size=4", "--set", "metrics=[fd_efflite0]"]
    return Command(
        "eval systems with a reference", lambda out: [*map(str, words), "--out", str(out / "results")],
        lambda out: records_of(out / "results"), lambda out: {"DDIL_CACHE": str(out / "cache")},
    )  # fmt: skip


def _finish_reference(command: Command, out: Path) -> None:
    _finish(command, out)
    shutil.rmtree(out / "results")  # the next run reads the cache


def _images(out: Path) -> None:
    save_images(out / "images", 4)


def _shard_words(folder: Path, teacher: Path) -> Callable[[Path], list[str]]:
    def arguments(out: Path) -> list[str]:
        reference = f"webdataset:{out}/shards/train-{{0..1}}.tar"
        return distillation(folder, "distill shards", teacher, reference, PD | {"ddil": None, "pool": 8}).arguments(
            out / "run"
        )

    return arguments


def _shards(out: Path) -> None:
    from ddil_core.support.checksums import checksum_of, sha256

    (out / "shards").mkdir(parents=True)
    save_shards(out / "shards", 2)
    for path in sorted((out / "shards").glob("*.tar")):
        checksum_of(path).write_text(f"{sha256(path)}  {path.name}\n")
