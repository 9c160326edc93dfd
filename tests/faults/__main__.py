"""Run the long form: ``make faults``, or ``python -m tests.faults --moments 5 --only pd``."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import ddil_eval.cli.distill
import ddil_eval.experiments.covariate_shift
import ddil_eval.experiments.drift
import ddil_eval.experiments.systems  # noqa: F401
from ddil_core.distillation.distill import distill  # noqa: F401
from tests.faults.harness import DAMAGE, Command, commands, damage, interrupted, kills
from tests.pipelines import STUDENT, TEACHER, save_pipeline


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20, help="kills of each command")
    parser.add_argument("--times", type=int, default=3, help="damages of each kind to each file")
    parser.add_argument("--files", type=int, default=99, help="at most so many files of a folder")
    parser.add_argument("--only", default="", help="only commands whose name contains this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    wrong = list[str]()
    print("| fault | times | outcome |\n|---|---:|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="ddil-faults-") as name:
        folder = Path(name)
        os.environ["DDIL_CACHE"] = str(folder / "cache")
        os.environ["PWD"] = name
        pipelines = {
            key: save_pipeline(folder / key, sampling, seed=seed)
            for seed, (key, sampling) in enumerate({"teacher": TEACHER, "student": STUDENT}.items(), 1)
        }
        chosen = [command for command in commands(folder, **pipelines) if given.only in command.name]
        for number, command in enumerate(chosen):
            place = folder / f"kills-{number}"
            place.mkdir()
            found = kills(command, place, given.moments)
            print(f"| kill -9 of `{command.name}` | {given.moments} | {_said(given.moments, found)} |", flush=True)
            wrong += found
        for command in chosen:
            if command.name == "distill pd with DDIL":
                wrong += _damaged(command, folder, given.times, given.files)
    print("\n".join(wrong), file=sys.stderr)
    return bool(wrong)


def _said(moments: int, wrong: list[str]) -> str:
    return "the same bytes" if not wrong else f"**{len(wrong)} of {moments} wrong**"


def _damaged(command: Command, folder: Path, times: int, most: int) -> list[str]:
    """Damage the files of a run that was killed, and of a finished one."""
    wrong = list[str]()
    for state in ("killed", "finished"):
        for how in DAMAGE:
            out = folder / f"{state}-{how.replace(' ', '-')}"
            if state == "killed":
                files = interrupted(command, out)
            else:
                command.run(out)
                files = sorted(path for path in (out / "student").rglob("*") if path.is_file())
            files = random.Random(0).sample(files, min(most, len(files)))
            found = damage(command, out, files, times, how)
            said = f"{found.same} the same student, {found.refused} refused in a sentence"
            said += f", **{len(found.wrong)} wrong**" if found.wrong else ""
            what = "a killed run" if state == "killed" else "a student"
            print(f"| {how} in each of {len(files)} files of {what} | {len(files) * times} | {said} |", flush=True)
            wrong += found.wrong
    return wrong


if __name__ == "__main__":
    sys.exit(main())
