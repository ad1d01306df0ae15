# SPDX-License-Identifier: Apache-2.0
"""A docker daemon on a Unix socket that has the images that a test gives it, or answers otherwise."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    archives: Mapping[str, bytes]
    asked: list[str]


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = unquote(self.path.removeprefix("/images/").removesuffix("/get"))
        data = self.server.archives.get(name)
        if data is None or data == b"broken":
            self.send_response(404 if data is None else 500)
            self.end_headers()
            self.wfile.write(b'{"message":\n"no"}')
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) + (10 if data.startswith(b"short") else 0)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        """Nothing."""

    def address_string(self) -> str:
        return "local"


@contextmanager
def scripted_daemon(path: Path, archives: Mapping[str, bytes]) -> Iterator[list[str]]:
    """The paths that were asked for."""
    with _Server(str(path), _Handler) as server:
        server.archives, server.asked = archives, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.asked
        finally:
            server.shutdown()
            thread.join()
