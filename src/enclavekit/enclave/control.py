# SPDX-License-Identifier: Apache-2.0
"""``control.sock``: how other processes of the same user speak with an enclave's (docs/lifecycle.md).

A request is one line of JSON, an answer too: ``{"command": "status"}``, ``{"command": "stop", "grace_s": 5}``,
``{"command": "wait"}``, which is answered at the end, and ``{"command": "attest", "nonce": "00ff"}``, when init has
answered. Whoever is not the same user, or root, is not listened to; what is no request is answered by an error and
the end of the connection.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from enclavekit.codec.init_frames import MAX_NONCE
from enclavekit.enclave.directory import CONTROL
from enclavekit.errors import ControlError, FileError, NoEnclaveError
from enclavekit.virtio.host_sockets import socket_path

MAX_LINE = 4096
MAX_ANSWER = 1 << 16
MAX_CLIENTS = 64
BACKLOG = 64
ANSWER_TIMEOUT_S = 10.0
MAX_GRACE_S = 86400.0
NONCE = re.compile(rf"(?:[0-9a-fA-F]{{2}}){{1,{MAX_NONCE}}}")

_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid

Answer = dict[str, Any]


class ControlServer:
    """In the selector of whoever supervises, whose callbacks take no argument. ``status`` and ``stop`` do the work."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        directory: Path,
        *,
        status: Callable[[], Answer],
        stop: Callable[[float], None],
        attest: Callable[[bytes, Callable[[Answer], None]], None] | None = None,
    ) -> None:
        self._selector = selector
        self._status, self._stop, self._attest = status, stop, attest
        self._path = directory / CONTROL
        self._clients: dict[socket.socket, bytearray] = {}
        self._waiting: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._path.unlink(missing_ok=True)
            with socket_path(directory, CONTROL) as path:
                self._listener.bind(path)
            self._path.chmod(0o600)
            self._listener.listen(BACKLOG)
        except OSError as error:
            self._listener.close()
            raise FileError.of(error, self._path, "listen on") from error
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def end(self, answer: Answer) -> None:
        """Tell all who wait, and listen no more. The selector is not used any more."""
        for client in self._waiting:
            self._send(client, answer)
        for client in (*self._clients, self._listener):
            client.close()
        self._clients.clear()
        self._waiting.clear()
        with suppress(OSError):
            self._path.unlink()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # it went again, or there are no files: it comes again
            return
        _, uid, _ = _PEER.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid not in (os.getuid(), 0) or len(self._clients) >= MAX_CLIENTS:
            client.close()
            return
        client.setblocking(False)
        self._clients[client] = bytearray()
        self._selector.register(client, selectors.EVENT_READ, partial(self._read, client))

    def _read(self, client: socket.socket) -> None:
        try:
            data = client.recv(MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        pending = self._clients.get(client)
        if not data or pending is None:
            self._drop(client)
            return
        pending += data
        while (end := pending.find(b"\n")) >= 0:
            line = bytes(pending[:end])
            del pending[: end + 1]
            if not self._obey(client, line):
                self._drop(client)
                return
        if len(pending) >= MAX_LINE:
            self._refuse(client, f"a line of more than {MAX_LINE} bytes")
            self._drop(client)

    def _obey(self, client: socket.socket, line: bytes) -> bool:  # noqa: PLR0911 - one a command
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return self._refuse(client, "not a line of JSON")
        command = request.get("command") if isinstance(request, dict) else None
        match command:
            case "status":
                return self._send(client, self._status())
            case "stop":
                grace = request.get("grace_s", 5.0)
                if isinstance(grace, bool) or not isinstance(grace, int | float) or not 0 <= grace <= MAX_GRACE_S:
                    return self._refuse(client, f"grace_s: expected seconds from 0 to {MAX_GRACE_S:.0f}")
                self._stop(float(grace))
                return self._send(client, {"stopping": True})
            case "wait":
                self._waiting.add(client)
                return True
            case "attest" if self._attest is not None:
                nonce = _nonce(request.get("nonce"))
                if nonce is None:
                    return self._refuse(client, f"nonce: expected 1 to {MAX_NONCE} bytes in hexadecimal")
                self._attest(nonce, lambda answer: self._later(client, answer))
                return True
        return self._refuse(client, "unknown command, expected status, stop, wait or attest")

    def _later(self, client: socket.socket, answer: Answer) -> None:
        """To a client that may have gone since it asked."""
        if client in self._clients:
            self._send(client, answer)

    def _refuse(self, client: socket.socket, message: str) -> bool:
        self._send(client, {"error": message})
        return False

    def _send(self, client: socket.socket, answer: Answer) -> bool:
        """What it does not take at once, it does not get: nobody waits for a client."""
        data = json.dumps(answer).encode() + b"\n"
        try:
            return client.send(data, socket.MSG_NOSIGNAL) == len(data)
        except OSError:
            return False

    def _drop(self, client: socket.socket) -> None:
        self._waiting.discard(client)
        if self._clients.pop(client, None) is not None:
            self._selector.unregister(client)
            client.close()


def _nonce(text: object) -> bytes | None:
    if not isinstance(text, str) or not NONCE.fullmatch(text):
        return None
    return bytes.fromhex(text)


def ask(directory: Path, request: Answer, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> Answer | None:
    """One request and its answer; None when the enclave has ended without one. ``timeout_s`` None waits for ever.

    Errors: NoEnclaveError when nobody listens, ControlError when it does not answer as it should.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout_s)
        try:
            with socket_path(directory, CONTROL) as path:
                client.connect(path)
            client.sendall(json.dumps(request).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                part = client.recv(MAX_ANSWER)
                if not part:
                    return None
                data += part
                if len(data) > MAX_ANSWER:
                    raise ControlError(f"enclave {directory.name}: an answer of more than {MAX_ANSWER} bytes")
        except TimeoutError as error:
            raise ControlError(f"enclave {directory.name}: no answer within {timeout_s:g} s") from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NoEnclaveError(f"enclave {directory.name}: does not run") from error
        except (ConnectionResetError, BrokenPipeError):
            return None
        except OSError as error:
            raise FileError.of(error, directory / CONTROL, "speak with") from error
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ControlError(f"enclave {directory.name}: an answer that is no JSON") from error
    if not isinstance(answer, dict):
        raise ControlError(f"enclave {directory.name}: an answer that is no object")
    if "error" in answer:
        raise ControlError(f"enclave {directory.name}: {answer['error']}")
    return answer
