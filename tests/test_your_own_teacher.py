"""docs/guides/your-own-teacher.md, walked from its first line to its last on a teacher that this project has never seen.

The teacher has 32 px, files of half precision and a tokenizer of whole words without a start token; nobody has trained
it. Every command, file and snippet of the page is run in its order, with a few updates and images.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result

from benchmarks import stranger_world as world

Cli = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guides" / "your-own-teacher.md"
BLOCK = re.compile(r'```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)```', re.DOTALL)
COUNT = 8

FEW = {"batch_size=4", "save_every=1", "watch=null", "ddil.collect_every=2", "ddil.capacity=256", "pool=8", "warmup=0"}
SHORT = {
    "runs/pd": FEW | {"convert.updates=1", "stages=[{steps: 8, updates: 1}, {steps: 4, updates: 2}]"},
    "runs/lcm": FEW | {"updates=2"},
    "runs/lcm-lora": FEW | {"updates=2", "lora.rank=2"},
    "runs/dmd2": FEW | {"updates=1", "critic_updates=1"},
    "results/mine": {"seed=0"},
}
"""Settings that make the commands of the page short, by their ``--out``."""
SMALL = {
    "images: 1000": f"images: {COUNT}",
    "1000": f"{COUNT}",
    "4000": f"{COUNT}",
    "--num-images 32": "--num-images 2",
}
INVERSION = {"inverters={ph2p: {tokens: 2, rounds: 2, evaluations: 1, candidates: 2, judging: 1, draws: 1}}"} | {
    "images_per_prompt=2",
    "vocabulary=tokens",
    "choosing_steps=1",
}


def small_clip(folder: Path) -> None:
    """A CLIP in transformers' layout that nobody has trained."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from ddil_core.shapes.training.architecture import write_tokenizer

    tokenizer = write_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 16}, projection_dim=16)
    torch.manual_seed(2)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a stranger brings."""
    desk = tmp_path_factory.mktemp("stranger")
    torch.manual_seed(0)
    words = world.tokenizer()
    vae, unet = world.autoencoder((8, 8, 8)), world.unet((16, 16), 16)
    world.save_teacher(desk / "teacher", vae, unet, world.text_encoder(words, 16, 1), words)
    world.write_pictures(desk / "train", COUNT, seed=0)
    world.write_pictures(desk / "test", COUNT, seed=1)
    small_clip(desk / "clip")
    (desk / "protocols").symlink_to(ROOT / "protocols")
    return desk


def shortened(line: str) -> list[str]:
    """The arguments of a command of the page, with few updates and images."""
    arguments = shlex.split(re.sub("|".join(map(re.escape, SMALL)), lambda found: SMALL[found[0]], line))
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else ""
    settings = (
        INVERSION if "prompt-inversion" in arguments else SHORT.get(out, set()) if "distill" in arguments else set()
    )
    extra = [argument for setting in sorted(settings) for argument in ("--set", setting)]
    return [*arguments[1:], *extra]


def steps() -> Iterator[tuple[str, str | None, str]]:
    """The blocks of the page: their kind, the name of their file, and their text."""
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if block["kind"] != "text":  # what a command prints
            yield block["kind"], block["title"], block["text"]


@pytest.mark.slow
def test_the_page_is_walked(desk: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(desk)
    assert not (desk / "teacher" / "ddil.json").exists()
    printed: dict[str, str] = {}
    for kind, title, text in steps():
        if title is not None:
            Path(title).write_text(re.sub("1000", str(COUNT), text), encoding="utf-8")
        elif kind == "python":
            names: dict[str, Any] = {}
            exec(compile(text, str(PAGE), "exec"), names)
            assert names["image"].size == (32, 32)
        else:
            for line in re.sub(r" \\\n +", " ", text).splitlines():  # a backslash joins lines
                result = cli(*shortened(line))
                assert result.exit_code == 0, (line, result.stderr)
                printed[line] = result.stdout
    _check(desk, printed)


def _check(desk: Path, printed: dict[str, str]) -> None:
    """The walk leaves four students, images, and records of every experiment in one table."""
    for method in ("pd", "lcm", "lcm-lora", "dmd2"):
        assert (desk / "runs" / method / "student" / "model_index.json").is_file()
        run = yaml.safe_load((desk / "runs" / method / "run.yaml").read_text())
        assert run["data"] == "folder:train"
    sampling = json.loads((desk / "runs" / "lcm" / "student" / "ddil.json").read_text())
    assert (sampling["guidance_scale"], sampling["steps"]) == (2.0, 4)
    (protocol,) = (text for line, text in printed.items() if "--print-protocol" in line)
    assert yaml.safe_load(protocol)["stages"][-1] == {"steps": 4, "updates": 1500}
    tables = {path.stem: path for path in (desk / "results" / "mine" / "report").glob("*/*.csv")}
    assert {"systems", "differences", "pure", "table2", "table3", "table4", "table5", "inverters"} <= tables.keys()
    page = (desk / "results" / "mine" / "report" / "index.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "LCM-LoRA + DDIL" in page
    rows = tables["systems"].read_text()
    assert all(name in rows for name in ("PD + DDIL", "LCM + DDIL", "LCM-LoRA + DDIL", "DMD2 + DDIL"))


def test_every_method_has_its_command_and_its_snippet() -> None:
    blocks = list(steps())
    commands = "".join(text for kind, _, text in blocks if kind == "bash")
    snippets = "".join(text for kind, _, text in blocks if kind == "python")
    for method in ("pd", "lcm", "lcm-lora", "dmd2"):
        assert f"--out runs/{method}\n" in commands and f'"runs/{method}/student"' in snippets
