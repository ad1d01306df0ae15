# SPDX-License-Identifier: Apache-2.0
"""QEMU's machine protocol, as little of it as a carrier needs: why the machine stopped, and the word to quit.

Source: QEMU docs/interop/qmp-spec.rst. JSON objects, one a line.
"""

from __future__ import annotations

import contextlib
import json
import socket

MAX_LINE = 1 << 16


class Qmp:
    """A QMP session over a connected socket; nothing here blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._pending = b""
        self.shutdown_reason: str | None = None
        """``guest-reset``, ``guest-panic``, ``host-qmp-quit`` and so on, once QEMU has said it."""
        self._send("qmp_capabilities")

    def _send(self, command: str) -> None:
        with contextlib.suppress(OSError):  # QEMU is gone: its exit tells
            self._connection.send(json.dumps({"execute": command}).encode() + b"\n")

    def read(self) -> None:
        """Take in what QEMU has said so far."""
        with contextlib.suppress(OSError):
            while data := self._connection.recv(MAX_LINE):
                *lines, self._pending = (self._pending + data).split(b"\n")
                self._pending = self._pending[-MAX_LINE:]
                for line in lines:
                    self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            return
        if isinstance(message, dict) and message.get("event") == "SHUTDOWN":
            self.shutdown_reason = str(message.get("data", {}).get("reason", "unknown"))

    def quit(self) -> None:
        """Ask QEMU to end."""
        self._send("quit")

    def close(self) -> None:
        """Forget the session."""
        self._connection.close()
