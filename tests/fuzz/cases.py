"""Cases of the fuzzer: a command line each, with the files that it reads. A seed decides a case."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
import yaml

from ddil_core.models.references import SHIPPED
from ddil_core.shapes.training.architecture import caption_words
from ddil_core.support.resources import protocols
from ddil_eval.cli import ddil
from tests.fuzz.words import ARGUMENTS, COMMANDS, FLAGS, KEYS, NO_MODEL, NUMBERS, PATHS, VALUES, WORDS
from tests.records import p_teacher, record, system
from tests.shards import picture, save_shard

Line = list[str]

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30, -(10**12), "", "a", "x" * 300,
    "T" * 40, "../x", "/etc/passwd", "\0", "\ud800", "é\n", "1", "nan", [], [[]], [0], [1, 2], [10**9], ["a", "b"], {}, {"": 0},
    {"a": {"b": []}}, [None], [["diffusers", "X"]], ["torch", "nn"], "sdpa", "kernels-community/flash-attn3", [0] * 3000,
)  # fmt: skip
"""Values for any place in a file."""

PIECES = (
    b"\xff", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 3000, b'{"a":' * 500, b"]", b"}", b'"', b"'", b",", b":", b"\n", b"\r",
    b"9" * 5000, b"&a ", b"*a", b"<<: *a", b"!!set {a}", b"!!python/name:os.system ", b"2020-01-01", b"\\ud800", b"NaN",
    b"-Infinity", b"null", b"../", b"#", b"---\n", b"\xe2\x80\xa8", b"1e999", b"x" * 30_000,
)  # fmt: skip
"""Bytes to insert into a file."""

CAPTION = "a small red circle on a grey background"


@dataclass(frozen=True)
class Kind:
    """A kind of cases.

    Attributes:
        name: Its name in the report.
        share: Its share among all cases, relative to the others.
        make: Takes a random generator and the working folder; writes files and returns a command line.
    """

    name: str
    share: float
    make: Callable[[Random, Path], Line]


def text(rng: Random) -> str:
    """A short random text, of any characters."""
    ends = (127, 0xD800, 0x110000)
    return "".join(chr(rng.randrange(rng.choice(ends))) for _ in range(rng.randrange(7)))


def some_json(rng: Random, value: Any) -> str:
    """A JSON value, changed at up to two places: another value, a key left out, or a key twice."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randrange(3)):
        value = _changed(rng, value)
    written = json.dumps(value)
    if rng.random() < 0.05 and written.startswith('{"'):
        written = '{"' + written[2 : written.index('"', 2)] + '": 1, ' + written[1:]
    return written


def _changed(rng: Random, value: Any) -> Any:
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inner or rng.random() < 0.15:
        return copy.deepcopy(rng.choice(ODD))  # a later change must not change the table
    key = rng.choice(inner)
    if isinstance(value, dict) and rng.random() < 0.1:
        new = {text(rng): copy.deepcopy(rng.choice(ODD))} if rng.random() < 0.5 else {}
        return {name: item for name, item in value.items() if name != key} | new
    value[key] = _changed(rng, value[key])
    return value


def some_bytes(rng: Random, content: bytes) -> bytes:
    """A file's content with bytes changed, cut, repeated or inserted. Half of the time it stays as it is."""
    if rng.random() < 0.5:
        return content
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(content) + 1)
        how = rng.randrange(4)
        if how == 0:
            content = content[:place] + rng.choice(PIECES) + content[place:]
        elif how == 1:
            content = content[:place]
        elif how == 2:
            content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
        else:
            content = content[:place] + content[rng.randrange(len(content) + 1) :]
    return content


def write(path: Path, content: bytes | str) -> Path:
    """Write a file; a text with lone surrogates is written as JSON would not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


# Command lines


def _options() -> dict[str, Callable[[Random], str]]:
    def path(rng: Random) -> str:
        return rng.choice(PATHS) if rng.random() < 0.8 else text(rng)

    def number(rng: Random) -> str:
        return rng.choice(NUMBERS) if rng.random() < 0.8 else text(rng)

    def word(rng: Random) -> str:
        return rng.choice(WORDS + PATHS) if rng.random() < 0.8 else text(rng)

    def setting(rng: Random) -> str:
        value = rng.choice(VALUES + NUMBERS + PATHS) if rng.random() < 0.8 else text(rng)
        return rng.choice(KEYS) + rng.choice(["=", "=", "=", ""]) + value

    return {
        **dict.fromkeys(("--out", "--teacher", "--student", "--model", "--data", "--reference", "--protocol", "--prompts"), path),
        **dict.fromkeys(("--results", "--towers", "--get"), path),
        **dict.fromkeys(("--steps", "--seed", "--num-images", "--num-prompts", "--reference-images", "--guidance"), number),
        **dict.fromkeys(("--p-teacher", "--switch"), number),
        **dict.fromkeys(("--metrics", "--solver", "--inverter", "--method", "--device", "--dtype", "--variant", "--recipe"), word),
        "--set": setting,
        "--prompt": path,
        "--add": lambda rng: word(rng) + rng.choice(["=", ""]) + path(rng),
    }  # fmt: skip


OPTIONS = _options()


def _known(command: tuple[str, ...]) -> list[str]:
    found: Any = ddil
    with click.Context(ddil) as ctx:
        for name in command:
            found = found.get_command(ctx, name)
    return sorted({name for parameter in found.params for name in parameter.opts} & set(OPTIONS))


KNOWN: dict[tuple[str, ...], list[str]] = {}


def command_line(rng: Random, place: Path) -> Line:
    """A command with odd arguments, options and flags. No model fits, so that no command begins its work."""
    command = rng.choice(list(COMMANDS))
    options = KNOWN.setdefault(command, _known(command))
    names = rng.choices(options, k=rng.randrange(4)) if options else []
    needed = [word for pair in COMMANDS[command].items() if pair[0] not in names for word in pair]
    given = [word for name in names for word in (name, OPTIONS[name](rng))]
    arguments = [OPTIONS["--out"](rng) for _ in range(ARGUMENTS.get(command, 0))]
    return [*command, *arguments, *needed, *given, *([rng.choice(FLAGS)] if rng.random() < 0.5 else [])]


# Files


PROTOCOLS = [yaml.safe_load(path.read_text()) for path in sorted(protocols().rglob("*.yaml"))]


def protocol(rng: Random, place: Path) -> Line:
    """A changed protocol, which is printed, or asks for a model that is not there."""
    content = rng.choice(PROTOCOLS)
    changed = json.loads(some_json(rng, content)) if rng.random() < 0.7 else content
    try:
        written = yaml.safe_dump(changed, allow_unicode=True).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        written = json.dumps(changed).encode()
    file = write(place / "new" / "p.yaml", some_bytes(rng, written))
    printed = ["--print-protocol"] if rng.random() < 0.8 else ["--device", "cpu", "--out", "o"]
    if "method" in content:
        return ["distill", "--teacher", NO_MODEL, "--protocol", str(file), *printed]
    return ["eval", "run", str(file), *(printed if printed[0] == "--print-protocol" else ["--print-protocol"])]


def prompts(rng: Random, place: Path) -> Line:
    """A changed list of prompts in one of its formats."""
    kind = rng.choice(["txt", "jsonl", "csv"])
    if kind == "txt":
        content = "\n".join(
            [CAPTION, text(rng), rng.choice(caption_words()), *(["y" * 30_000] if rng.random() < 0.05 else [])]
        )
    elif kind == "csv":
        content = f'id,prompt\n1,{CAPTION}\n2,{text(rng)}\n3,"a, b"\n'
    else:
        content = "\n".join(some_json(rng, {"id": n, "prompt": CAPTION}) for n in range(3))
    file = write(place / "new" / f"p.{kind}", some_bytes(rng, content.encode("utf-8", "surrogatepass")))
    return ["sample", "--model", NO_MODEL, "--prompts", str(file), "--out", "o"]


RECORDS = [
    json.loads(one.model_dump_json())
    for one in (
        p_teacher(0.8),
        record({"kind": "pure", "model": "teacher"}),
        record({"kind": "teacher_then_student", "switch_t": 749}),
        record({"kind": "string", "string": "TTSS"}),
        record({"kind": "effect", "transitions": [0, 2]}),
        system("PD", 4),
        record({"kind": "drift", "t": 999}, experiment="drift"),
        record({"kind": "inverter", "name": "ph2p"}, experiment="prompt-inversion", systems={}),
    )
]  # fmt: skip


def records(rng: Random, place: Path) -> Line:
    """One to three changed records, and their report."""
    for number in range(rng.randrange(1, 4)):
        content = some_json(rng, rng.choice(RECORDS)).encode()
        write(place / "new" / "records" / f"{number}.json", some_bytes(rng, content))
    out = ["--out", str(place / "new" / "out")]
    return ["report", "--results", str(place / "new"), *rng.choice([["--json"], ["--csv", *out], ["--latex", *out]])]


def images(rng: Random, place: Path) -> Line:
    """A folder of images with a changed index, captions or origin, which is scored against two images."""
    folder, reference = place / "new" / "images", place / "new" / "reference"
    for number in range(2):
        write(reference / f"{number}.png", picture(number))
        write(folder / f"{number}.png", some_bytes(rng, picture(number)))
        if rng.random() < 0.5:
            write(folder / f"{number}.txt", some_bytes(rng, CAPTION.encode()))
    if rng.random() < 0.7:
        rows = [some_json(rng, {"id": str(n), "file": f"{n}.png", "prompt": CAPTION, "seed": 0}) for n in range(2)]
        write(folder / "index.jsonl", some_bytes(rng, "\n".join(rows).encode()))
    if rng.random() < 0.3:
        write(
            folder / "made.json",
            some_bytes(rng, some_json(rng, {"reference": "shapes", "grid": [1], "seed": 0}).encode()),
        )
    return ["eval", "score", str(folder), "--reference", f"folder:{reference}", "--recipe", "shapes", "--metrics", "drawn_right",
            "--device", "cpu", "--out", "o"]  # fmt: skip


def coco(rng: Random, place: Path) -> Line:
    """COCO's layout with a changed annotation file."""
    folder = place / "new" / "coco"
    content = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(2)],
        "annotations": [{"id": n, "image_id": n, "caption": CAPTION} for n in range(2)],
    }
    write(folder / "annotations" / "captions_val2017.json", some_bytes(rng, some_json(rng, content).encode()))
    for number in range(2):
        write(folder / "val2017" / f"{number}.png", picture(number))
    return ["eval", "score", str(folder / "val2017"), "--reference", f"coco2017:{folder}", "--recipe", "shapes",
            "--metrics", "drawn_right", "--device", "cpu", "--out", "o"]  # fmt: skip


def shards(rng: Random, place: Path) -> Line:
    """A changed shard, or an odd pattern."""
    file = place / "new" / "a.tar"
    file.parent.mkdir(parents=True, exist_ok=True)
    ends = ["png", "txt", "json", "cls", "pyd", "x.png", "PNG"]
    sample = {
        rng.choice(ends): some_bytes(rng, rng.choice([picture(1), CAPTION.encode(), b'{"caption": "a"}']))
        for _ in range(3)
    }
    save_shard(file, [sample])
    file.write_bytes(some_bytes(rng, file.read_bytes()))
    odd = ["{0..9}" * rng.randrange(12), "{a,b}{" + text(rng), text(rng), f"{file}::{text(rng)}"]
    pattern = rng.choice([str(file), str(file), *odd])
    settings = ("pool=1", "batch_size=1", "stages=[{steps: 4, updates: 1}]")
    return ["distill", "--teacher", "shapes", "--data", f"webdataset:{pattern}", "--no-ddil", "--device", "cpu", "--out", "o",
            *(word for setting in settings for word in ("--set", setting))]  # fmt: skip


WEIGHTS = SHIPPED["shapes"].folder


def model(rng: Random, place: Path) -> Line:
    """The shapes world's teacher with a changed configuration, which draws one image."""
    folder = place / "new" / "model"
    shutil.copytree(WEIGHTS, folder, copy_function=lambda source, target: Path(target).symlink_to(source))
    described = sorted(path for path in folder.rglob("*.json") if path.name not in ("vocab.json",))
    for path in rng.sample(described, k=rng.randrange(1, 3)):
        content = json.loads(path.read_text())
        path.unlink()
        write(path, some_bytes(rng, some_json(rng, content).encode()))
    return ["sample", "--model", str(folder), "--prompt", CAPTION, "--steps", "1", "--device", "cpu", "--out", "o"]


KINDS = (
    Kind("command lines", 45, command_line),
    Kind("protocols", 18, protocol),
    Kind("lists of prompts", 20, prompts),
    Kind("records", 10, records),
    Kind("folders of images", 3, images),
    Kind("COCO's annotations", 3, coco),
    Kind("shards", 0.1, shards),
    Kind("models", 0.1, model),
)
"""The kinds of cases. Those that load a network are rare."""
