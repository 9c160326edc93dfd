"""Pictures in a terminal: the bytes of each protocol, decoded back to the image, and which terminal takes which."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_core.support import terminal_pictures as pictures
from ddil_core.support.errors import WrongCommand


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def image() -> Image.Image:
    """Noise, which no PNG compresses, of 5 colours that Sixel's percentages hold exactly."""
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 51, 204], [153, 0, 102]], dtype=np.uint8)
    return Image.fromarray(colours[np.random.default_rng(0).integers(5, size=(100, 160))])


def same(found: bytes | np.ndarray, image: Image.Image) -> bool:
    array = found if isinstance(found, np.ndarray) else np.asarray(Image.open(io.BytesIO(found)))
    return np.array_equal(array, np.asarray(image))


def test_kittys_commands_hold_the_image_in_chunks(image: Image.Image) -> None:
    text = pictures.kitty(image, 20)
    commands = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in commands) == text and len(commands) > 1
    assert [keys for keys, _ in commands] == ["f=100,a=T,q=2,c=20,m=1", *["m=1"] * (len(commands) - 2), "m=0"]
    assert all(len(data) == 4096 for _, data in commands[:-1]) and 0 < len(commands[-1][1]) <= 4096
    assert same(base64.b64decode("".join(data for _, data in commands)), image)


def test_iterm2s_command_holds_the_image_and_its_size(image: Image.Image) -> None:
    match = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);width=20:([A-Za-z0-9+/=]+)\x07",
                         pictures.iterm2(image, 20))  # fmt: skip
    assert match is not None
    data = base64.b64decode(match[2])
    assert len(data) == int(match[1]) and same(data, image)


def decoded_sixel(text: str) -> np.ndarray:
    """Draw Sixel data as a terminal does."""
    match = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)((?:#\d+;2;\d+;\d+;\d+)+)([^\x1b]*)\x1b\\', text)
    assert match is not None
    width, height = int(match[1]), int(match[2])
    palette = {int(n): [round(int(part) * 2.55) for part in rgb] for n, *rgb in
               re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", match[3])}  # fmt: skip
    canvas = np.zeros((height + 6, width, 3), np.uint8)
    x, top, colour = 0, 0, [0, 0, 0]
    for chosen, count, character in re.findall(r"#(\d+)|(?:!(\d+))?([?-~]|\$|-)", match[4]):
        if chosen:
            colour = palette[int(chosen)]
        elif character == "$":
            x = 0
        elif character == "-":
            x, top = 0, top + 6
        else:
            for _ in range(int(count or 1)):
                for bit in range(6):
                    if (ord(character) - 63) >> bit & 1:
                        canvas[top + bit, x] = colour
                x += 1
            assert x <= width
    assert not canvas[height:].any()
    return canvas[:height]


def test_sixel_draws_the_image(image: Image.Image) -> None:
    assert same(decoded_sixel(pictures.sixel(image, 20)), image)
    flat = Image.new("RGB", (400, 40), (255, 0, 0))
    assert same(decoded_sixel(pictures.sixel(flat, 10)), Image.new("RGB", (80, 8), (255, 0, 0)))


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1", "TERM": "xterm-256color"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2", "TERM": "xterm-256color"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/tmux", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/tmux", "DDIL_SHOW": "sixel"}, "sixel"),
        ({}, None),
    ],
)
def test_the_environment_names_the_protocol(environment: dict[str, str], protocol: str | None) -> None:
    assert pictures.protocol_of(environment) == protocol


def test_a_picture_is_no_wider_than_the_terminal(image: Image.Image, tmp_path: Path) -> None:
    image.save(tmp_path / "a.png")
    for columns in (12, 200):
        stream = Terminal()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", str(columns))
            pictures.show_picture(tmp_path / "a.png", "iterm2", stream)
        assert f";width={min(columns, 20)}:" in stream.getvalue() and stream.getvalue().endswith("\a\n")


def test_what_cannot_show_pictures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMUX", "KITTY_WINDOW_ID", "LC_TERMINAL", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "vt100")
    with pytest.raises(WrongCommand, match="stdout is a file or a pipe"):
        pictures.require_pictures(io.StringIO())
    with pytest.raises(WrongCommand, match=r"this terminal \('vt100'\) is not known to show pictures"):
        pictures.require_pictures(Terminal())
    monkeypatch.setenv(pictures.VARIABLE, "ascii")
    with pytest.raises(WrongCommand, match="holds 'ascii', and it takes one of kitty, iterm2, sixel"):
        pictures.require_pictures(Terminal())
