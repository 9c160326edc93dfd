"""Show a picture in a terminal: by the protocols of Kitty, of iTerm2, and Sixel.

- Kitty: https://sw.kovidgoyal.net/kitty/graphics-protocol
- iTerm2: https://iterm2.com/documentation-images.html
- Sixel: DEC VT330/VT340 Programmer Reference Manual, volume 2, chapter 14
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image

from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import shown

VARIABLE = "DDIL_SHOW"
"""The environment variable that names the protocol of a terminal that is not recognized."""
CELL = 8, 16
"""The assumed size of a character in pixels. A picture takes no more columns than this gives it."""
CHUNK = 4096
"""The most bytes of base64 in one command of Kitty's protocol."""
COLOURS = 256
"""The number of colours of a Sixel picture, which is what terminals can hold."""


def kitty(image: Image.Image, columns: int) -> str:
    """Return a picture as commands of Kitty's protocol: a PNG in chunks, shown over this many columns."""
    data = base64.b64encode(_png(image)).decode("ascii")
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    return "".join(
        f"\x1b_G{f'f=100,a=T,q=2,c={columns},' if place == 0 else ''}m={int(place < len(chunks) - 1)};{chunk}\x1b\\"
        for place, chunk in enumerate(chunks)
    )


def iterm2(image: Image.Image, columns: int) -> str:
    """Return a picture as a command of iTerm2's protocol: a PNG, shown over this many columns."""
    data = _png(image)
    return f"\x1b]1337;File=inline=1;size={len(data)};width={columns}:{base64.b64encode(data).decode('ascii')}\a"


def sixel(image: Image.Image, columns: int) -> str:
    """Return a picture of at most 256 colours as Sixel, shrunk to the width of this many columns.

    A band is 6 rows high. For each colour of a band, a character holds one column, with a bit for each row.
    """
    width = min(image.width, columns * CELL[0])
    small = image.convert("RGB").resize((width, max(1, round(image.height * width / image.width))))
    indexed = small.quantize(COLOURS, dither=Image.Dither.NONE)
    palette = np.asarray(indexed.getpalette("RGB"), dtype=float).reshape(-1, 3)
    pixels = np.asarray(indexed)
    height = len(pixels)
    pixels = np.pad(pixels.astype(int), ((0, -height % 6), (0, 0)), constant_values=-1)
    used = np.unique(pixels[pixels >= 0])
    names = (f"#{c};2;" + ";".join(f"{round(part / 255 * 100)}" for part in palette[c]) for c in used)
    bands = (_band(pixels[top : top + 6]) for top in range(0, len(pixels), 6))
    return f'\x1bPq"1;1;{width};{height}' + "".join(names) + "-".join(bands) + "\x1b\\"


PROTOCOLS: Mapping[str, Callable[[Image.Image, int], str]] = {"kitty": kitty, "iterm2": iterm2, "sixel": sixel}
"""The protocols by their names in ``DDIL_SHOW``."""
_BY_PROGRAM = {"ghostty": "kitty", "iTerm.app": "iterm2", "WezTerm": "iterm2", "mintty": "iterm2"}
_BY_TERM = {"xterm-kitty": "kitty", "xterm-ghostty": "kitty", "foot": "sixel", "foot-extra": "sixel",
            "mlterm": "sixel", "contour": "sixel", "yaft-256color": "sixel"}  # fmt: skip


def protocol_of(environment: Mapping[str, str]) -> str | None:
    """Return the name of the protocol that the terminal is known to understand, from its environment; else None.

    Raises:
        WrongCommand: ``DDIL_SHOW`` names no protocol.
    """
    chosen = environment.get(VARIABLE)
    if chosen:
        if chosen not in PROTOCOLS:
            raise WrongCommand(
                f"the environment variable {VARIABLE} holds {shown(chosen)}, and it takes one of {', '.join(PROTOCOLS)}"
            )
        return chosen
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return None  # a multiplexer keeps pictures from the terminal, whose variables it inherits
    if "KITTY_WINDOW_ID" in environment:
        return "kitty"
    if environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return _BY_PROGRAM.get(program) or _BY_TERM.get(term) or ("sixel" if "sixel" in term else None)


def require_pictures(stream: TextIO) -> str:
    """Return the protocol of the terminal behind a stream.

    Raises:
        WrongCommand: the stream is a file or a pipe, or the terminal is not known to show pictures.
    """
    if not stream.isatty():
        raise WrongCommand("--show shows pictures in a terminal, and stdout is a file or a pipe; leave out --show")
    protocol = protocol_of(os.environ)
    if protocol is None:
        name = os.environ.get("TERM_PROGRAM") or os.environ.get("TERM") or "unknown"
        raise WrongCommand(
            f"this terminal ({shown(name)}) is not known to show pictures; leave out --show and open the file, or set "
            f"{VARIABLE} to {', '.join(PROTOCOLS)} if it does"
        )
    return protocol


def show_picture(path: Path, protocol: str, stream: TextIO) -> None:
    """Show the picture of a file in the terminal behind a stream, no wider than the terminal."""
    with Image.open(path) as image:
        columns = max(1, min(shutil.get_terminal_size().columns, -(-image.width // CELL[0])))
        stream.write(PROTOCOLS[protocol](image.convert("RGB"), columns) + "\n")
    stream.flush()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _band(rows: np.ndarray) -> str:
    """Return a band of 6 rows [6, width] of colour numbers, colour by colour; −1 is no pixel."""
    bits = 2 ** np.arange(6)
    colours = np.unique(rows[rows >= 0])
    return "$".join(f"#{c}" + "".join(_repeated(63 + bits @ (rows == c))) for c in colours)


def _repeated(codes: np.ndarray) -> Iterator[str]:
    """Write characters by their codes, with a count in place of more than 3 equal ones."""
    for code, run in itertools.groupby(codes.tolist()):
        count = len(list(run))
        yield f"!{count}{chr(code)}" if count > 3 else chr(code) * count
