"""Hostile words for command lines, protocols and files: what tests and the fuzzer put into the place of sound ones."""

from __future__ import annotations

import os
from pathlib import Path

NO_MODEL = "not-a-model"
"""Fits nothing, so that no command begins its work."""

COMMANDS: dict[tuple[str, ...], dict[str, str]] = {
    ("sample",): {"--model": NO_MODEL, "--prompt": "a", "--out": "o"},
    ("distill",): {"--teacher": NO_MODEL, "--out": "o", "--device": "cpu"},
    ("eval", "covariate-shift"): {
        "--teacher": NO_MODEL,
        "--student": NO_MODEL,
        "--out": "o",
        "--device": "cpu",
        "--num-prompts": "4",
    },
    ("eval", "coco"): {"--model": NO_MODEL, "--data": "shapes", "--out": "o", "--device": "cpu", "--num-images": "4"},
    ("eval", "run"): {"--out": "o", "--device": "cpu"},
    ("eval", "score"): {"--reference": "dir", "--out": "o", "--device": "cpu"},
    ("eval", "prompt-inversion"): {"--teacher": NO_MODEL, "--model": NO_MODEL, "--out": "o", "--device": "cpu"},
    ("report",): {"--results": "dir", "--out": "o"},
    ("export",): {"--to": "diffusers", "--out": "o"},
    ("models", "convert"): {},
    ("models", "download"): {},
    ("metrics",): {},
}
"""Commands with the options that they need, and few prompts, so that a case takes milliseconds."""

ARGUMENTS = {
    ("eval", "run"): 1,
    ("eval", "score"): 2,
    ("export",): 1,
    ("models", "convert"): 2,
    ("models", "download"): 1,
}

PATHS = (
    "file", "file/x", "dir", "dangling", "loop/x", "pipe", "/dev/null", "/proc/x", "a\0b", "x" * 256, "new/" + "x" * 256,
    "/".join(["y" * 200] * 30), "~nobody-1/x", "", "..", "new/deep/er", "\udcff", "\ud800", "bad.yaml", "mapping.yaml",
    "deep.yaml", "list.yaml", "lines.txt", "w.safetensors", "w.bin", "run", "half", "é\n.yaml", "\x1b[31m", "-", "//",
    "a/b", "a/b@../../x", "a/b@" + "z" * 5000, "w.safetensors:file", "half:w.safetensors", "sd15:", "sd15:file", "sdxl:~nobody-1",
    ":x", "shapes:x", "folder:dir", "folder:", "folder:~nobody-1", "folder:\0", "folder:loop", "coco2014:dir",
    "coco2017:" + "z" * 300, "webdataset:{0..", "webdataset:~nobody-1/x.tar", "webdataset:dir/*.tar", "webdataset:", "webdataset:[",
)  # fmt: skip
NUMBERS = (
    "0", "-1", "4", "nan", "inf", "1e400", "1" * 30, "1" * 5000, "x", "", "1,,2", "٣", "1_0", "2.5", f"{2**63}", f"{2**70}", "749",
)  # fmt: skip
KEYS = (
    "seed", "num_prompts", "metrics", "systems", "systems.0.steps", "systems.-1.name", "differences", "data", "recipe", "solver",
    "p_teacher", "switch.0", "ddil", "ddil.phases.0.until", "stages", "method", "experiment", "prompts", "inverters",
    "inverters.ph2p", "teacher", "towers", "batch_size", "pool", "betas", "reflection", "guidance_scale", "watch.every", "lora",
    "gan", "timesteps", "matching_range", "w_embedding", "trackers", "folders", "x", ".".join("a" * 100), "", "..", "9",
)  # fmt: skip
VALUES = (
    "2020-99-99", "2020-01-01", "{", "[[1]]", "{a: 1}", "null", "!!set {a}", "!!python/name:os.system", "!!binary aa", "*a",
    "&a [*a]", "[" * 500, ".nan", "-.inf", "9" * 40, "true", "[{name: a, model: b}]", "[[a, b]]", '"\\ud800"', '"\\0"', "<<", "=",
    "a: b: c", "{a: 1, a: 2}", "{1: 2}", "{[1]: 2}", "~nobody-1/x", "{ph2p: 3}", "1:30:30", "[999, 749]",
)  # fmt: skip
WORDS = (
    "drawn_right",
    "fd_efflite0,",
    "ph2p",
    "lcm",
    "cpu",
    "cuda:9",
    "cpu:x",
    "ddim",
    "fp16",
    "clamp",
    "shapes",
    "gigagan",
)
FLAGS = (
    "--json",
    "--lora",
    "--no-ddil",
    "--resume",
    "--factorial",
    "--csv",
    "--figures",
    "--config-only",
    "--no-such-flag",
)


def make_place(place: Path) -> None:
    """Fill a working folder with unusable files of every kind, to which ``PATHS`` lead."""
    (place / "dir").mkdir()
    for name, content in (
        ("file", b"x"), ("bad.yaml", b"\xff\xfe"), ("mapping.yaml", b"method: {a: 1}\nexperiment: {a: 1}"),
        ("deep.yaml", b"a: " + b"[" * 3000), ("list.yaml", b"inverters: [1]\nsystems: 3\nexperiment: prompt-inversion\n"),
        ("lines.txt", b"\xff\n"), ("w.safetensors", b"123"), ("w.bin", b"123"), ("run/run.yaml", b"[]"),
        ("half/model_index.json", b'{"_class_name": ["x"], "a": 3}'),
    ):  # fmt: skip
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    (place / "dangling").symlink_to("nowhere")
    (place / "loop").symlink_to("loop")
    os.mkfifo(place / "pipe")
