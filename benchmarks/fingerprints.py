"""Hash what small runs produce, to show that a change of the code changes no number.

Run ``python -m benchmarks.fingerprints``.

Each command runs on one CPU thread with fixed seeds. The report holds the SHA-256 of every student's weights and of the
numbers in every record. Run it before and after a change on the same machine, and compare the two files.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from safetensors.numpy import load_file

SMALL = ("pool=128", "batch_size=8", "teacher_batch_size=16", "warmup=2", "save_every=1000")
DDIL = ("ddil.collect_every=4", "ddil.capacity=512")
RUNS: dict[str, tuple[str, ...]] = {
    "pd": ("--method", "pd", "--no-ddil", "--set", "stages=[{steps: 8, updates: 6}, {steps: 4, updates: 6}]"),
    "pd-ddil": ("--method", "pd", "--set", "stages=[{steps: 8, updates: 6}, {steps: 4, updates: 6}]"),
    "lcm-ddil": ("--method", "lcm", "--set", "updates=8", "--set", "watch=null"),
    "lcm-lora": ("--method", "lcm", "--lora", "--no-ddil", "--set", "updates=4", "--set", "watch=null"),
    "dmd2-ddil": ("--method", "dmd2", "--set", "updates=4", "--set", "watch=null"),
    "dmd2": ("--method", "dmd2", "--no-ddil", "--set", "updates=4", "--set", "watch=null"),
}
"""Options of ``ddil distill`` by the name of the run."""


def ddil(*arguments: str) -> None:
    """Run one ``ddil`` command on one thread, and stop with its message where it fails."""
    alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ddil_eval.cli", *arguments]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"`ddil {' '.join(arguments)}` failed: {done.stderr.strip()[-2000:]}")


def weights_sha256(folder: Path) -> str:
    """Hash all tensors below ``folder``, in the order of their files and names. Notes in the files do not count."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            found.update(f"{path.relative_to(folder).as_posix()} {name} {tensor.shape}".encode() + tensor.tobytes())
    return found.hexdigest()


def numbers(folder: Path) -> dict[str, str]:
    """Hash the metrics of every record below ``folder``, by the record's cell."""
    found = {}
    for path in sorted((folder / "records").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        measured = {name: metric["estimate"] for name, metric in record["metrics"].items()}
        cell = {key: Path(str(value)).name for key, value in record["cell"].items()}
        found[json.dumps(cell, sort_keys=True)] = hashlib.sha256(json.dumps(measured).encode()).hexdigest()
    return found


def fingerprints(folder: Path) -> dict[str, Any]:
    """Run everything in ``folder`` and return the hashes."""
    found: dict[str, Any] = {"students": {}, "records": {}}
    for name, options in RUNS.items():
        settings = (*SMALL, *(() if "--no-ddil" in options else DDIL))
        given = [part for setting in settings for part in ("--set", setting)]
        ddil("distill", *options, *given, "--device", "cpu", "--out", str(folder / name))
        found["students"][name] = weights_sha256(folder / name / "student")
        click.echo(f"{name}: {found['students'][name]}", err=True)
    ddil(
        *(
            "eval",
            "systems",
            "--model",
            "shapes",
            "--model",
            str(folder / "pd-ddil"),
            "--data",
            "shapes",
            "--steps",
            "4",
        ),
        *("--num-images", "16", "--set", "reference_images=32", "--device", "cpu", "--out", str(folder / "systems")),
    )
    ddil(
        *("eval", "covariate-shift", "--student", str(folder / "pd-ddil"), "--num-prompts", "8", "--factorial"),
        *("--set", "reference_images=32", "--set", "teacher_steps=8", "--device", "cpu"),
        *("--out", str(folder / "covariate-shift")),
    )
    found["records"] = {name: numbers(folder / name) for name in ("systems", "covariate-shift")}
    return found


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the hashes to this JSON file.")
def main(out: Path | None) -> None:
    """Hash what small runs of every method and of the evaluation produce."""
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(fingerprints(Path(folder)), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
