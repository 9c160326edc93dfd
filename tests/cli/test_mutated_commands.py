"""Mutated command lines either work or are refused in one sentence. A refused command leaves no files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ddil_core.support import protocol
from ddil_eval.cli import ddil, options
from tests.fuzz.words import ARGUMENTS, COMMANDS, FLAGS, KEYS, NUMBERS, PATHS, VALUES, WORDS, make_place

Cli = Callable[..., Result]

TEXT = st.text(max_size=6)
A_PATH, A_NUMBER, A_WORD = (st.one_of(st.sampled_from(some), TEXT) for some in (PATHS, NUMBERS, WORDS + PATHS))
A_SETTING = st.tuples(
    st.sampled_from(KEYS), st.sampled_from(["=", "=", "=", ""]), st.sampled_from(VALUES + NUMBERS + PATHS) | TEXT
).map("".join)
OPTIONS: dict[str, st.SearchStrategy[str]] = {
    **dict.fromkeys(
        ("--out", "--teacher", "--student", "--model", "--data", "--reference", "--protocol", "--prompts", "--results", "--towers"),
        A_PATH,
    ),
    **dict.fromkeys(("--steps", "--seed", "--num-images", "--num-prompts", "--reference-pictures", "--guidance"), A_NUMBER),
    **dict.fromkeys(("--p-teacher", "--switch"), A_NUMBER),
    **dict.fromkeys(("--metrics", "--solver", "--inverter", "--method", "--device", "--dtype", "--variant", "--recipe"), A_WORD),
    "--set": A_SETTING,
    "--prompt": st.one_of(st.sampled_from(["x" * 3000, *PATHS]), TEXT),
    "--get": A_PATH,  # no name of weights, so that nothing is fetched
    "--add": st.tuples(A_WORD, st.sampled_from(["=", ""]), A_PATH).map("".join),
}  # fmt: skip


def known(command: tuple[str, ...]) -> list[str]:
    """Return the options of a command that are mutated."""
    found: Any = ddil
    with click.Context(ddil) as ctx:
        for word in command:
            found = found.get_command(ctx, word)
    return sorted({name for parameter in found.params for name in parameter.opts} & set(OPTIONS))


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(list(COMMANDS)))
    options = known(command)
    names = draw(st.lists(st.sampled_from(options), max_size=3)) if options else []
    needed = [word for pair in COMMANDS[command].items() if pair[0] not in names for word in pair]
    given = [word for name in names for word in (name, draw(OPTIONS[name]))]
    arguments = [draw(A_PATH) for _ in range(ARGUMENTS.get(command, 0))]
    return [*command, *arguments, *needed, *given, *draw(st.lists(st.sampled_from(FLAGS), max_size=1))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with unusable files of every kind."""
    monkeypatch.chdir(tmp_path)
    make_place(tmp_path)
    return tmp_path


def test_mutated_commands_are_refused_in_one_sentence(place: Path) -> None:
    runner, there = CliRunner(), sorted(place.iterdir())

    @settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
    @given(command_lines())
    def check(line: list[str]) -> None:
        result = runner.invoke(ddil, line, catch_exceptions=False)
        said = [part for part in result.stderr.splitlines() if part.lower().startswith("error")]
        assert result.exit_code in (0, 1, 2)
        assert len(said) == (result.exit_code != 0), result.stderr
        if result.exit_code:
            assert result.stderr.splitlines()[-1] == said[0]
            assert sorted(place.iterdir()) == there
        result.output.encode()

    check()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (("sample", "--model", "shapes", "--prompt", "a", "--out", "file/x"),
         "--out 'file/x' lies under {place}/file, which is no folder; name another"),
        (("distill", "--out", "~nobody-1/x"),
         "--out '~nobody-1/x' starts with '~nobody-1', and a user 'nobody-1' has no home folder here; write the path out"),
        (("demo", "--out", "a\0b"), "--out 'a\\x00b' holds a NUL character, which no name can; leave it out"),
        (("eval", "run", "list.yaml", "--out", "loop"),
         "--out 'loop' cannot be used: Too many levels of symbolic links; name another"),
        (("models", "convert", "w.bin", "file/x.safetensors"),
         "OUT 'file/x.safetensors' lies under {place}/file, which is no folder; name another"),
        (("distill", "--out", "o", "--set", "seed=2020-99-99"),
         "--set 'seed=2020-99-99' has a value that holds a date in line 1; put a text into quotes"),
        (("distill", "--out", "o", "--protocol", "mapping.yaml"),
         "mapping.yaml has the method \"{{'a': 1}}\", which is not known; it may be one of pd, lcm, tcd, dmd2"),
        (("distill", "--out", "o", "--protocol", "deep.yaml"),
         "the protocol deep.yaml is nested more than 32 levels deep in line 1"),
        (("eval", "prompt-inversion", "--protocol", "list.yaml", "--inverter", "ph2p", "--out", "o"),
         "list.yaml has a value that does not fit at 'inverters': it takes a mapping of at least 1 key, not [1]"),
        (("sample", "--model", "shapes", "--prompt", "a\udcff", "--out", "o"),
         "the argument 'a\\udcff' is not text in utf-8; rename the file, or write the text in UTF-8"),
        (("sample", "--model", "a/b@../../x", "--prompt", "a", "--out", "o"), "the model 'a/b@../../x' is not known: "),
        (("distill", "--out", "o", "--device", "cpu:x"),
         "this machine has no device 'cpu:x'; leave out --device to take the best one"),
    ],
)  # fmt: skip
def test_what_is_said(line: tuple[str, ...], sentence: str, place: Path, cli: Cli) -> None:
    result = cli(*line)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"error: {sentence.format(place=place)}")
    assert not (place / "o").exists()


@pytest.mark.parametrize(("option", "most"), [("--seed", 2**63 - 1), ("--num-images", 10**8), ("--steps", 10**8)])
def test_a_number_that_cannot_be_meant(option: str, most: int, place: Path, cli: Cli) -> None:
    result = cli("sample", "--prompt", "a", "--out", "o", option, 2**70)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: Invalid value for '{option}': '{2**70}' is larger than {most:,}."


@pytest.mark.parametrize("key", ["num_prompts", "reference_images", "batch_size", "chunk"])
def test_a_count_that_fills_any_memory(key: str, place: Path, cli: Cli) -> None:
    models = ("--teacher", "shapes", "--student", "shapes", "--device", "cpu", "--out", "o")
    result = cli("eval", "covariate-shift", *models, "--set", f"{key}={10**8 + 1}")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith(
        f"has a value that does not fit: {key} is at most 100,000,000, not 100,000,001"
    )
    assert options.MOST == protocol.MOST


@pytest.mark.parametrize("cache", ["file", "file/x", "dangling"])
def test_a_cache_that_takes_no_files(cache: str, place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIL_CACHE", cache)
    save_file({name: np.zeros(1, np.float32) for name in ("cls_token", "pos_embed")}, "dinov2.safetensors")
    shards = ("distill", "--data", "webdataset:http://127.0.0.1:9/a.tar", "--download", "--out", "o", "--device", "cpu")
    for line in (("metrics", "--add", "fd_dinov2=dinov2.safetensors"), shards):
        result = cli(*line)
        last = result.stderr.splitlines()[-1]
        assert result.exit_code == 1 and last.startswith(f"error: files cannot be kept in {cache} (")
        assert last.endswith("); make it writable, or set DDIL_CACHE to another folder")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show(encoding: str, root: Path) -> None:
    """Tables, JSON and messages in an encoding that lacks their characters, and an argument in none."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    program = [sys.executable, "-m", "ddil_eval.cli"]

    def run(*line: str | bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*program, *line], cwd=root, env=environment, capture_output=True, check=False)

    report = run("report", "--results", "results", "--json")
    assert report.returncode == 0 and "−" in json.dumps(json.loads(report.stdout), ensure_ascii=False)
    assert run("data").returncode == 0
    for argument, sentence in (
        (b"\xff", rb"the argument '\udcff' is not text in utf-8; "),
        ("ü−".encode(), b"There is no command "),
    ):
        refused = run(argument)
        assert refused.returncode == 2 and b"Traceback" not in refused.stderr
        assert sentence in refused.stderr.splitlines()[-1]
