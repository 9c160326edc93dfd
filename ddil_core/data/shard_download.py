"""Download shards of the web."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from ddil_core.support.checksums import with_checksum
from ddil_core.support.errors import DdilError
from ddil_core.support.lock import waiting_for
from ddil_core.support.progress import transfer
from ddil_core.support.resources import require_cache

_TIMEOUT = 60.0
"""Seconds without data after which a download fails."""


def fetch_shard(url: str, path: Path) -> None:
    """Download a shard, with a progress bar on stderr. The file gets its name when it is complete.

    Raises:
        DdilError: the download fails or breaks off, or the disk is full.
    """
    require_cache()
    with waiting_for(path.parent):
        if path.is_file():
            return  # another command has downloaded it meanwhile
        with with_checksum(path) as temporary, temporary.open("wb") as file:
            for block in _received(url):
                file.write(block)


def _received(url: str) -> Iterator[bytes]:
    """Yield the content of a URL in blocks, with a progress bar. Raises DdilError where the download fails."""
    done = 0
    try:
        with urlopen(url, timeout=_TIMEOUT) as source:
            length = int(source.headers.get("Content-Length") or 0)
            with transfer(f"fetch {url}", length) as advance:
                while block := source.read(1 << 20):
                    yield block
                    done += len(block)
                    advance(len(block))
        if length not in (0, done):
            raise OSError(f"the download broke off after {done:,} of {length:,} bytes")
    except (OSError, HTTPException, ValueError) as error:
        raise DdilError(
            f"the shard {url} could not be fetched ({getattr(error, 'reason', error)}); "
            "check the URL and run the command again"
        ) from error
