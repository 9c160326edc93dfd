"""Run commands in child processes that are killed at random, and damage files that they keep.

A child is forked from a process that has imported the project and computed nothing. So it starts at once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DDIL = {"collect_every": 2, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]}
BASE = {"batch_size": 2, "pool": 6, "warmup": 1, "save_every": 2}
PD: dict[str, Any] = BASE | {"method": "pd", "stages": [{"steps": 4, "updates": 5}, {"steps": 2, "updates": 7}]}
LCM: dict[str, Any] = BASE | {"method": "lcm", "updates": 8, "w_embedding": 16}
LORA = {key: value for key, value in LCM.items() if key != "w_embedding"} | {
    "lora": {"rank": 4}, "guidance_range": [6, 6], "ema_decay": 0,
}  # fmt: skip
DMD2 = BASE | {"method": "dmd2", "updates": 5, "critic_updates": 1, "gan": {}, "teacher_steps": 4}
METHODS = {"pd": PD, "lcm": LCM, "lcm-lora": LORA, "dmd2": DMD2}
EVALUATIONS = {
    "eval covariate-shift": ("--num-prompts", "4", "--set", "teacher_steps=8", "--set", "figure_prompts=0",
                             "--set", "metrics=[drawn_right]", "--set", "chunk=2"),
    "eval systems": ("--data", "shapes", "--num-images", "12", "--set", "metrics=[drawn_right]", "--set", "batch_size=4",
                     "--save-images"),
    "eval drift": ("--num-prompts", "4", "--set", "teacher_steps=8"),
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (negative for a signal), what it said, and how long it took."""

    status: int
    said: str
    seconds: float


@dataclass(frozen=True)
class Command:
    """A command that is run again and again.

    Attributes:
        name: What the table calls it.
        arguments: Returns its arguments for a folder of results.
        results: Returns what must not depend on kills, by name.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    results: Callable[[Path], Mapping[str, object]]

    def run(self, out: Path, until: Callable[[], bool] = lambda: False) -> Ended:
        """Run the command in a child, and kill it when ``until`` says so."""
        log, start = out.with_name(out.name + ".said"), time.monotonic()
        child = os.fork()
        if not child:
            os._exit(_child(self.arguments(out), log))
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if until():
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.002)
        _, status = os.waitpid(child, 0)
        said = log.read_text(errors="replace") if log.exists() else ""
        return Ended(os.waitstatus_to_exitcode(status), said, time.monotonic() - start)


def _child(arguments: list[str], log: Path) -> int:
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        from ddil_eval.cli import ddil

        ddil(arguments, prog_name="ddil")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def commands(folder: Path, teacher: Path, student: Path) -> Iterator[Command]:
    """Yield every command that is killed. Protocols are written to ``folder``."""
    for method, settings in METHODS.items():
        for ddil in (None, DDIL):
            name = f"distill {method}" + (" with DDIL" if ddil else "")
            protocol = folder / f"{name.replace(' ', '-')}.yaml"
            protocol.write_text(json.dumps(settings | {"ddil": ddil}))  # JSON is YAML
            words = ["distill", "--teacher", teacher, "--data", "shapes", "--protocol", protocol, "--device", "cpu"]
            yield Command(name, _with_out(words), student_of)
    for name, options in EVALUATIONS.items():
        models = ["--model", teacher] if name == "eval systems" else ["--teacher", teacher, "--student", student]
        yield Command(name, _with_out([*name.split(), *models, "--device", "cpu", *options]), records_of)


def _with_out(words: Sequence[object]) -> Callable[[Path], list[str]]:
    return lambda out: [*map(str, words), "--out", str(out)]


def student_of(out: Path) -> dict[str, object]:
    """Return every byte of the student in a run folder."""
    files = (out / "student").rglob("*")
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.is_file()}


def records_of(out: Path) -> dict[str, object]:
    """Return the numbers of every record, and every byte of kept images."""
    found: dict[str, object] = {}
    for path in (out / "records").glob("*.json"):
        record = json.loads(path.read_text())
        found[path.name] = {name: metric["estimate"] for name, metric in record["metrics"].items()}
    images = (out / "images").rglob("*.png")
    return found | {str(path.relative_to(out)): path.read_bytes() for path in images}


def kills(command: Command, folder: Path, moments: int, seed: int = 0) -> list[str]:
    """Kill a command at random moments, and run it again to its end each time.

    Returns:
        What was not as it should be: another result, or a command that did not go on.
    """
    whole = folder / "whole"
    ended = command.run(whole)
    if ended.status:
        return [f"{command.name} ends with {ended.status}: {ended.said[-500:]}"]
    expected, draw, wrong = command.results(whole), random.Random(seed), list[str]()
    assert expected
    for moment in range(moments):
        out, end = folder / f"killed-{moment}", time.monotonic() + draw.uniform(0, ended.seconds)
        command.run(out, until=lambda end=end: time.monotonic() >= end)  # type: ignore[misc]
        again = command.run(out)
        if again.status or command.results(out) != expected:
            wrong.append(f"{command.name}, moment {moment}: exit status {again.status}: {again.said[-500:]}")
        elif left := [path for path in out.rglob("*") if ".partial" in path.name]:
            wrong.append(f"{command.name}, moment {moment}: temporary files are left: {left}")
        else:
            shutil.rmtree(out)
    return wrong


def flipped(content: bytes, draw: random.Random) -> bytes:
    """Return the content with one bit flipped."""
    changed, bit = bytearray(content), draw.randrange(8 * len(content))
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    """Return the beginning of the content."""
    return content[: draw.randrange(len(content))]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {"a flipped bit": flipped, "a cut": cut}


@dataclass
class Outcomes:
    """What became of a command whose files were damaged: how often each outcome came, and what was wrong."""

    same: int = 0
    refused: int = 0
    wrong: tuple[str, ...] = ()


def damage(command: Command, before: Path, files: Sequence[Path], times: int, how: str, seed: int = 0) -> Outcomes:
    """Damage one file of a folder at a time, and run the command again.

    It ends as without the damage, or it is refused in one sentence.

    Args:
        command: The command whose folder it is.
        before: The folder, as a kill or the end of the command left it.
        files: The files, inside of it.
        times: How often each file is damaged.
        how: A key of ``DAMAGE``.
        seed: The seed of the places.
    """
    whole = before.with_name(before.name + "-undamaged")
    shutil.copytree(before, whole)
    assert command.run(whole).status == 0
    expected, draw, outcomes = command.results(whole), random.Random(seed), Outcomes()
    for path in files:
        for _ in range(times):
            out = before.with_name(before.name + "-damaged")
            shutil.copytree(before, out)
            target = out / path.relative_to(before)
            target.write_bytes(DAMAGE[how](target.read_bytes(), draw))
            ended = command.run(out)
            last = ended.said.rstrip().splitlines()[-1:] or [""]
            if ended.status == 0 and command.results(out) == expected:
                outcomes.same += 1
            elif ended.status in (1, 2) and last[0].startswith("error: ") and "Traceback" not in ended.said:
                outcomes.refused += 1
            else:
                outcomes.wrong += (f"{how} in {path.name}: exit status {ended.status}: {ended.said[-500:]}",)
            shutil.rmtree(out)
    return outcomes


def interrupted(command: Command, out: Path) -> list[Path]:
    """Kill a distillation once it has two checkpoints of its last stage. Return the files that it keeps."""
    checkpoints = out / "checkpoints"
    command.run(out, until=lambda: len([*checkpoints.glob("stage-2-*.pt")]) >= 2)
    kept = sorted(path for path in out.rglob("*") if path.is_file() and ".partial" not in path.name)
    return [path for path in kept if path.name != ".ddil.lock"]
