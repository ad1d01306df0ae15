# SPDX-License-Identifier: Apache-2.0
"""A web service on vsock port 8080: bottle, over the standard library's WSGI server."""

from __future__ import annotations

import os
import platform
import socket
import sys
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import bottle

PORT = 8080


class VsockServer(WSGIServer):
    """Listens on vsock, for whoever dials the enclave's CID."""

    address_family = socket.AF_VSOCK

    def server_bind(self) -> None:
        """At the port; a host name has no meaning here."""
        self.socket.bind((socket.VMADDR_CID_ANY, PORT))
        self.server_name, self.server_port = "enclave", PORT
        self.setup_environ()


class Handler(WSGIRequestHandler):
    """The peer is a CID."""

    def address_string(self) -> str:
        """For the log."""
        return f"cid {self.client_address[0]}"


@bottle.get("/")
def index() -> dict[str, object]:
    """Where it runs, and as whom."""
    return {
        "bottle": bottle.__version__,
        "directory": str(Path.cwd()),
        "python": platform.python_version(),
        "uid": os.getuid(),
    }


@bottle.post("/upper")
def upper() -> bytes:
    """What was sent, in capitals."""
    data: bytes = bottle.request.body.read()
    return data.upper()


if __name__ == "__main__":
    with VsockServer(("", PORT), Handler) as server:
        server.set_app(bottle.default_app())
        sys.stdout.write(f"listening on vsock port {PORT}\n")
        sys.stdout.flush()
        server.serve_forever()
