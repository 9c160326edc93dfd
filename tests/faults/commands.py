"""The commands that are disturbed, with tiny networks: every method of distillation, every evaluation, demo and study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddil_core.support.resources import protocols
from tests.faults.harness import Command

DDIL = {"collect_every": 2, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]}
BASE = {"batch_size": 2, "pool": 6, "warmup": 1, "save_every": 2}
PD: dict[str, Any] = BASE | {"method": "pd", "stages": [{"steps": 4, "updates": 5}, {"steps": 2, "updates": 7}]}
LCM: dict[str, Any] = BASE | {"method": "lcm", "updates": 8, "w_embedding": 16}
LORA = {key: value for key, value in LCM.items() if key != "w_embedding"} | {
    "lora": {"rank": 4}, "guidance_range": [6, 6], "ema_decay": 0,
}  # fmt: skip
DMD2 = BASE | {"method": "dmd2", "updates": 5, "critic_updates": 1, "gan": {}, "teacher_steps": 4}
ADAPTERS = {"lora": {"rank": 4}}
METHODS = {
    "pd": PD, "pd-lora": PD | ADAPTERS, "lcm": LCM, "lcm-lora": LORA, "tcd": LCM | {"method": "tcd", "gamma": 0.5},
    "dmd2": DMD2, "dmd2-lora": DMD2 | ADAPTERS,
}  # fmt: skip

SETS = ("--set", "metrics=[drawn_right]")
INVERTERS = "{ph2p: {tokens: 4, rounds: 2, evaluations: 2, candidates: 1}, random: {tokens: 4}}"
EVALUATIONS: dict[str, tuple[str, ...]] = {
    "eval covariate-shift": ("--num-prompts", "4", "--set", "teacher_steps=8", "--set", "figure_prompts=0",
                             "--set", "chunk=2", *SETS),
    "eval systems": ("--data", "shapes", "--num-images", "12", "--set", "batch_size=4", "--save-images", *SETS),
    "eval drift": ("--num-prompts", "6", "--set", "teacher_steps=8"),
    "eval prompt-inversion": ("--data", "shapes", "--num-images", "4", "--set", f"inverters={INVERTERS}",
                              "--set", "images_per_prompt=2", "--set", "choosing_steps=2", "--set", "batch_size=2",
                              "--set", "figures=2", "--set", "lpips=lpips_efflite0"),
}  # fmt: skip

STUDY = {
    "teacher": "gaussians", "data": "gaussians", "seeds": 2, "baseline": "data",
    "methods": {"PD": {
        "method": "pd", "reflection": {"mode": "none"}, "student": {"width": 8, "depth": 1, "updates": 4},
        "stages": [{"steps": 4, "updates": 6}, {"steps": 2, "updates": 6}], "batch_size": 4, "pool": 16,
        "save_every": 2, "warmup": 2,
    }},
    "sources": {"data": None, "student": {"capacity": 256, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0}]}},
    "measure": {"kinds": ["points"], "count": 64, "teacher_steps": 8},
}  # fmt: skip


def commands(folder: Path, teacher: Path, student: Path) -> Iterator[Command]:
    """Yield every command that is disturbed. Their protocols and images are written to ``folder``."""
    for method, settings in METHODS.items():
        for ddil in (None, DDIL):
            name = f"distill {method}" + (" with DDIL" if ddil else "")
            yield distillation(folder, name, teacher, "shapes", settings | {"ddil": ddil})
    for name, options in EVALUATIONS.items():
        models = ["--model", teacher] if name == "eval systems" else ["--teacher", teacher, "--student", student]
        models = ["--teacher", teacher, "--model", student] if name == "eval prompt-inversion" else models
        yield Command(name, with_out([*name.split(), *models, "--device", "cpu", *options]), records_of)
    table = _written(folder / "table.yaml", {
        "experiment": "systems", "num_prompts": 8, "batch_size": 4, "metrics": ["drawn_right"],
        "systems": [{"name": name, "model": str(model), "steps": 4} for name, model in
                    {"teacher": teacher, "student": student}.items()], "differences": [["student", "teacher"]],
    })  # fmt: skip
    yield Command("eval run", with_out(["eval", "run", table, "--device", "cpu"]), records_of)
    images = save_images(folder / "images")
    yield Command("eval score", with_out(score(images)), records_of)
    study = _written(folder / "study.yaml", STUDY)
    yield Command("study", with_out(["study", study, "--jobs", 1, "--device", "cpu"]), study_of)
    yield Command("demo", with_out(["demo", "--device", "cpu"]), demo_of, protocols=_demo(folder / "protocols"))
    drawn = ["sample", "--model", student, "--prompt", "a small red circle", "--num-images", "4", "--device", "cpu"]
    yield Command("sample", with_out(drawn), lambda out: files_of(out, out, "*.png"), goes_on=False)
    student_run = distillation(folder, "run", teacher, "shapes", PD | {"ddil": None})
    exported = ["--to", "diffusers"]
    yield Command(
        "export", lambda out: ["export", str(_finished(student_run, folder / "run")), *with_out(exported)(out)],
        lambda out: files_of(out, out, "*.safetensors"), goes_on=False,
    )  # fmt: skip
    pickle = _pickle(folder / "weights.bin")
    yield Command(
        "models convert", lambda out: ["models", "convert", str(pickle), str(out / "w.safetensors")],
        lambda out: files_of(out, out, "*"), goes_on=False,
    )  # fmt: skip


def distillation(folder: Path, name: str, teacher: Path, data: object, settings: Mapping[str, Any]) -> Command:
    """Return a distillation of a protocol, which is written to ``folder``."""
    protocol = _written(folder / f"{name.replace(' ', '-')}.yaml", settings)
    words = ["distill", "--teacher", teacher, "--data", data, "--protocol", protocol, "--device", "cpu"]
    words += ["--no-ddil"] * (settings["ddil"] is None)
    return Command(name, with_out(words), student_of)


def score(images: Path) -> list[object]:
    """Return the arguments of a command that scores a folder of images."""
    return ["eval", "score", images, "--reference", "shapes", "--recipe", "shapes", "--device", "cpu",
            "--metrics", "drawn_right", "--set", "batch_size=4"]  # fmt: skip


def with_out(words: Sequence[object]) -> Callable[[Path], list[str]]:
    """Return a function that adds the folder of results to a command."""
    return lambda out: [*map(str, words), "--out", str(out)]


def save_images(folder: Path, count: int = 12) -> Path:
    """Draw images of the shapes world into a folder, as ``ddil sample`` keeps images."""
    import numpy as np

    from ddil_core.data.base import Prompt
    from ddil_core.data.shapes import ShapesData
    from ddil_eval.experiments.image_sources import ImageOrigin, write_sample

    data = ShapesData()
    images = np.concatenate(list(data.images(count)))
    prompts = [Prompt(str(number), prompt.text) for number, prompt in enumerate(data.prompts(count))]
    write_sample(images[:, None], prompts, ImageOrigin("shapes"), folder)
    return folder


def _written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def _finished(command: Command, out: Path) -> Path:
    """Run a command once, and return its folder."""
    if not out.exists():
        assert command.run(out).status == 0
    return out


def _pickle(path: Path) -> Path:
    import torch

    torch.save({"weight": torch.arange(50_000.0)}, path)
    return path


def _demo(folder: Path) -> Path:
    """Copy the shipped protocols, with a demonstration of seconds."""
    shutil.copytree(protocols(), folder)
    distill = BASE | {"method": "pd", "stages": [{"steps": 4, "updates": 3}], "ddil": DDIL}
    systems = [{"name": name, "model": name, "steps": 4} for name in ("PD", "DDIL")]
    shared = {"num_prompts": 4, "metrics": ["drawn_right"]}
    shift = {"experiment": "covariate-shift", "teacher_steps": 8, "figure_prompts": 0, "chunk": 2}
    content = {
        "distill": distill,
        "covariate_shift": shift | shared,
        "systems": {"experiment": "systems", "systems": systems, "differences": [["DDIL", "PD"]]} | shared,
    }
    _written(folder / "shapes" / "demo.yaml", content)
    return folder


# What must not depend on faults


def student_of(out: Path) -> dict[str, object]:
    """Return every byte of the student in a run folder."""
    return files_of(out, out / "student", "*")


def files_of(out: Path, folder: Path, pattern: str) -> dict[str, object]:
    """Return the bytes of files by their path in ``out``."""
    return {str(path.relative_to(out)): path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


def records_of(out: Path) -> dict[str, object]:
    """Return the numbers of every record, and every byte of kept images."""
    found: dict[str, object] = {}
    for path in (out / "records").glob("*.json"):
        record = json.loads(path.read_text())
        cell = json.dumps([record["experiment"], record["cell"]])  # a file's name depends on the path of a student
        found[cell] = {name: metric["estimate"] for name, metric in record["metrics"].items()}
    return found | files_of(out, out / "images", "*.png")


def study_of(out: Path) -> dict[str, object]:
    """Return the measures of every unit and every byte of the tables."""
    units = {path.name: json.loads(path.read_text())["students"] for path in (out / "units").glob("*.json")}
    return units | files_of(out, out / "study", "*.csv")


def demo_of(out: Path) -> dict[str, object]:
    """Return the students and the numbers of the records of a demonstration, from which its tables are made."""
    students = [files_of(out, out / run / "student", "*") for run in ("pd", "ddil")]
    return students[0] | students[1] | records_of(out)
