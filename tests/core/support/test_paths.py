"""Paths that a user names: good ones are returned, bad ones give one sentence, and no file is left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddil_core.support import resources
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.paths import output_file, output_folder, user_path
from ddil_core.support.text import one_line

Look = Callable[[str, str], Path]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("keep me")
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("dir")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "--out is empty; name a file or a folder"),
        ("a\0b", "--out 'a\\x00b' holds a NUL character, which no name can; leave it out"),
        ("x" * 256, f"--out '{'x' * 200}'… (256 characters) cannot be used: File name too long; name another"),
        ("new/" + "x" * 256, f"--out 'new/{'x' * 196}'… (260 characters) has a name of more than 255 bytes; "
         "name another"),
        ("new/" + "é" * 128, f"--out 'new/{'é' * 128}' has a name of more than 255 bytes; name another"),
        ("loop", "--out 'loop' cannot be used: Too many levels of symbolic links; name another"),
        ("loop/x", "--out 'loop/x' cannot be used: Too many levels of symbolic links; name another"),
        ("\ud800", "--out '\\ud800' is no text that can be a name; use other characters"),
        ("~\ud800", "--out '~\\ud800' is no text that can be a name; use other characters"),
        ("~nobody-1/x",
         "--out '~nobody-1/x' starts with '~nobody-1', and a user 'nobody-1' has no home folder here; "
         "write the path out"),
        ("file", "--out 'file' is no folder; name another"),
        ("pipe", "--out 'pipe' is no folder; name another"),
        ("/dev/null", "--out '/dev/null' is no folder; name another"),
        ("file/x", "--out 'file/x' lies under {here}/file, which is no folder; name another"),
        ("file/x/y", "--out 'file/x/y' lies under {here}/file, which is no folder; name another"),
        ("dangling", "--out 'dangling' leads over the link {here}/dangling, whose target does not exist; name another"),
        ("dangling/x", "--out 'dangling/x' leads over the link {here}/dangling, whose target does not exist; "
         "name another"),
        ("/".join(["y" * 200] * 19), f"--out '{'y' * 200}'… (3,818 characters) is too long to hold files; "
         "name another"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_written(text: str, sentence: str, here: Path) -> None:
    with pytest.raises(WrongCommand) as error:
        output_folder(text, "--out")
    assert str(error.value) == sentence.format(here=here)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
def test_a_folder_that_cannot_be_made() -> None:
    """Not even root, which ignores permissions, can make this folder."""
    with pytest.raises(
        WrongCommand, match=r"^--out '/proc/x/y' cannot be written, as /proc takes no files: .+; name anot"
    ):
        output_folder("/proc/x/y", "--out")


def test_no_home(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # a user without an entry
    with pytest.raises(WrongCommand, match=r"^OUT '~/x' starts with '~', and this user has no home folder here; "):
        user_path("~/x", "OUT")
    monkeypatch.delenv("DDIL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(DdilError, match=r"^this user has no home folder to keep files in; set DDIL_CACHE to a folder$"):
        resources.user_folder()


def test_what_can_be_used(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert user_path("~/dir") == here / "dir"
    assert user_path("file/x") == Path("file/x")  # to read: whoever opens it says that it is not here
    for text in ("dir", "link", "new", "new/and/deep", "link/new", ".", "..", "ü ñ", "-", "dir/"):
        assert output_folder(text, "--out") == Path(text)
    for text in ("new.safetensors", "dir/new", "file"):
        assert output_file(text, "OUT") == Path(text)
    for text in ("file/x", "dangling", "."):
        with pytest.raises(WrongCommand):
            output_file(text, "OUT")


NAMES = st.text(st.characters() | st.sampled_from("~/.\0\n"), max_size=12)
PLACES = st.sampled_from(["file", "dir", "link", "dangling", "loop", "pipe", "~", "~root", "..", "/proc", "z" * 300])


@pytest.mark.parametrize("look", [user_path, output_folder, output_file])
def test_any_path_is_one_sentence_or_can_be_used(look: Look, here: Path) -> None:
    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(st.lists(NAMES | PLACES, max_size=4).map("/".join))
    def check(text: str) -> None:
        before = sorted(here.iterdir())
        try:
            path = look(text, "--out")
        except WrongCommand as error:
            assert str(error).startswith("--out ") and "\n" not in str(error)
            return
        assert sorted(here.iterdir()) == before  # looking leaves nothing
        if look is output_folder and path.absolute().is_relative_to(here) and ".." not in path.parts:
            path.mkdir(parents=True, exist_ok=True)
            (path / "records").mkdir(exist_ok=True)

    check()


@settings(derandomize=True, max_examples=100)
@given(st.text(st.characters()))
def test_a_message_is_one_line_that_can_be_printed(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1
    one_line(text).encode()
    assert "\x1b" not in one_line(text)


@pytest.mark.parametrize("cache", ["file", "file/x", "dangling", "/proc/x"])
def test_a_cache_that_takes_no_files_is_named(cache: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIL_CACHE", cache)
    with pytest.raises(DdilError) as error:
        resources.require_cache()
    assert str(error.value).startswith(f"files cannot be kept in {cache} (")
    assert str(error.value).endswith("); make it writable, or set DDIL_CACHE to another folder")


def test_a_cache_that_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIL_CACHE", "~nobody-1/x")
    with pytest.raises(WrongCommand, match="^the folder of DDIL_CACHE '~nobody-1/x' starts with '~nobody-1', and "):
        resources.user_folder()
