# SPDX-License-Identifier: Apache-2.0
"""A registry on loopback that does what a test tells it to: it serves a layout, and misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Script:
    """``blobs`` and ``tags`` are served. ``before`` may answer instead; it is given path and headers."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    tags: dict[str, bytes] = field(default_factory=dict)
    media_types: dict[str, str] = field(default_factory=dict)
    before: Callable[[str, dict[str, str]], Answer | None] = lambda path, headers: None
    cut_after: int | None = None
    """Bytes of a blob after which the connection is cut, once."""
    ranges: bool = True
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def load(self, layout: Path) -> None:
        """All blobs of a layout, and its images by tag."""
        for path in (layout / "blobs/sha256").iterdir():
            self.blobs[f"sha256:{path.name}"] = path.read_bytes()
        for entry in json.loads((layout / "index.json").read_text())["manifests"]:
            tag = entry.get("annotations", {}).get("org.opencontainers.image.ref.name")
            if tag:
                self.tags[tag] = self.blobs[entry["digest"]]
            self.media_types[entry["digest"]] = entry["mediaType"]

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        found = self.before(path, headers)
        if found is not None:
            return found
        kind, name = urlsplit(path).path.rsplit("/", 2)[1:]
        data = self.blobs.get(name) if kind == "blobs" or ":" in name else self.tags.get(name)
        if data is None:
            return 404, {}, b'{"errors":[{"code":"NAME_UNKNOWN","message":"repository name not known"}]}'
        if kind == "manifests":
            return 200, {"Content-Type": json.loads(data).get("mediaType", "")}, data
        begin = headers.get("range", "")
        if begin and self.ranges:
            return 206, {}, data[int(begin.removeprefix("bytes=").rstrip("-")) :]
        return 200, {}, data


@contextmanager
def serving(script: Script) -> Iterator[Script]:
    """Until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve(self.rfile.read(int(self.headers.get("Content-Length", "0"))))

        def _serve(self, body: bytes = b"") -> None:
            headers = {key.lower(): value for key, value in self.headers.items()}
            if body:
                headers["body"] = body.decode()
            script.requests.append((self.path, headers))
            status, more, data = script.answer(self.path, headers)
            self.send_response(status)
            for key, value in more.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if script.cut_after is not None and "/blobs/" in self.path and len(data) > script.cut_after:
                self.wfile.write(data[: script.cut_after])
                script.cut_after = None
                self.close_connection = True
                return
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    script.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def query(path: str) -> dict[str, list[str]]:
    """Of a request's path."""
    return parse_qs(urlsplit(path).query)
