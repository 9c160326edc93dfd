"""A hub on 127.0.0.1 for tests: the few endpoints that ``huggingface_hub`` calls, over folders of repositories."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".ckpt")
"""Endings of the files that the hub stores by SHA-256 (LFS). It stores other files by their git hash."""


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """Repositories by org/name: ``folders`` with the files, and ``revisions`` with {revision: commit}.

    ``asked`` logs (path, Range, bytes sent) of each request for a file.
    """

    url: str = ""
    folders: dict[str, Path] = field(default_factory=dict)
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[tuple[str, str | None, int]] = field(default_factory=list)
    lies: dict[str, bytes] = field(default_factory=dict)
    """Paths, and false content that is sent for them."""

    drops: dict[str, int] = field(default_factory=dict)
    """Paths, and the number of bytes after which the connection drops once."""

    def add(self, name: str, folder: Path) -> str:
        """Publish a folder. Return the commit."""
        self.folders[name] = folder
        commit = hashlib.sha1(name.encode()).hexdigest()
        self.revisions[name] = {"main": commit, "v1": commit, commit: commit}
        return commit

    def sent(self, suffix: str) -> list[tuple[str, str | None, int]]:
        return [request for request in self.asked if request[0].endswith(suffix)]

    def tree(self, name: str) -> list[dict[str, object]]:
        folder = self.folders[name]
        rows: list[dict[str, object]] = []
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder).as_posix()
            if path.is_dir():
                rows.append({"type": "directory", "path": relative, "oid": "0" * 40})
                continue
            content = path.read_bytes()
            row: dict[str, object] = {"type": "file", "path": relative, "size": len(content), "oid": git_hash(content)}
            if path.suffix in LARGE:
                row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            rows.append(row)
        return rows


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return None

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._known(
                    match[1], match[2] or "main", lambda commit: {"id": match[1], "sha": commit, "siblings": []}
                )
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
                self._known(match[1], match[2], lambda commit: hub.tree(match[1]))
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(match[1], match[2], match[3])
            else:
                self._refuse("EntryNotFound")

        def _known(self, name: str, revision: str, answer: object) -> None:
            if name not in hub.folders:
                return self._refuse("RepoNotFound")
            if revision not in hub.revisions[name]:
                return self._refuse("RevisionNotFound")
            content = json.dumps(answer(hub.revisions[name][revision])).encode()  # type: ignore[operator]
            self._send(200, content, {"Content-Type": "application/json"})

        def _file(self, name: str, revision: str, relative: str) -> None:
            path = hub.folders[name] / relative
            if not path.is_file():
                return self._refuse("EntryNotFound")
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest() if path.suffix in LARGE else git_hash(content)
            content = hub.lies.get(relative, content)
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.revisions[name][revision], "Accept-Ranges": "bytes"}
            span, status = self.headers.get("Range"), 200
            if span and (match := re.fullmatch(r"bytes=(\d+)-", span)):
                start, status = int(match[1]), 206
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                content = content[start:]
            if self.command == "GET":
                hub.asked.append((relative, span, len(content)))
            self._send(status, content, headers, hub.drops.pop(relative, None) if self.command == "GET" else None)

        def _refuse(self, code: str) -> None:
            self._send(404, b"", {"X-Error-Code": code})

        def _send(self, status: int, content: bytes, headers: dict[str, str], dropped_after: int | None = None) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[:dropped_after])
            self.close_connection = self.close_connection or dropped_after is not None

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on a free port inside the context."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
