# SPDX-License-Identifier: Apache-2.0
"""The socket of one enclave's process: it answers nitro-cli's commands until the enclave ends.

Its owner and root may do everything, other users may look. Whoever removes the socket's file ends the enclave.

Source: aws-nitro-enclaves-cli src/enclave_proc/connection.rs, connection_listener.rs, socket.rs.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import Any, Protocol

from enclavekit.errors import Error, ProtocolError
from enclavekit.linux.inotify import RemovalWatch
from enclavekit.nitro_cli.command import json_text
from enclavekit.nitro_cli.log import LOG
from enclavekit.nitro_cli.wire import (
    CONFIRMATION,
    CONFIRMED,
    FOR_ALL,
    LENGTH,
    STATUS_FAILED,
    Command,
    frame,
    read_frame,
)
from enclavekit.virtio.host_sockets import socket_path

MODE = 0o766
BACKLOG = 64
MAX_CLIENTS = 16
CLIENT_TIMEOUT_S = 3.0
END_TIMEOUT_S = 5.0

_PEER = Struct("3i")  # struct ucred: pid, uid, gid


class Answering(Protocol):
    """What the process knows and can do. Called from the server's threads."""

    name: str
    enclave_id: str
    cid: int
    flags: int

    def describe(self, *, metadata: bool) -> dict[str, Any]:
        """An element of ``describe-enclaves``."""

    def terminate(self) -> dict[str, Any]:
        """End the enclave, wait for that, and say so."""

    def removed(self) -> None:
        """Somebody removed the socket."""


class EnclaveServer:
    """Listens at ``path`` from its making on. Raises OSError."""

    def __init__(self, path: Path, answering: Answering) -> None:
        self._path = path
        self._answering = answering
        self._closing = False
        self._owner = os.geteuid()
        self._slots = threading.BoundedSemaphore(MAX_CLIENTS)
        self._clients: set[threading.Thread] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        with suppress(FileNotFoundError):
            path.unlink()
        with socket_path(path.parent, path.name) as short:
            self._listener.bind(short)
        path.chmod(MODE)
        self._listener.listen(BACKLOG)
        self._watch = RemovalWatch(path.parent)
        for work in (self._accept, self._watch_removal):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """Listen no more, once whoever asked for the end has been answered."""
        self._closing = True
        with suppress(OSError):
            self._path.unlink()
        with suppress(OSError):  # wakes accept()
            self._listener.shutdown(socket.SHUT_RDWR)
        for client in list(self._clients):
            client.join(END_TIMEOUT_S)
        self._listener.close()

    def _watch_removal(self) -> None:
        with suppress(OSError):
            while self._path.name not in self._watch.wait():
                pass
            if not self._closing:
                LOG.warning("the socket %s was removed: the enclave is ended", self._path)
                self._answering.removed()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._slots.acquire(blocking=False):
                client.close()
                continue
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._clients.add(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                client.settimeout(CLIENT_TIMEOUT_S)
                self._obey(client)
        except (OSError, ProtocolError) as error:
            LOG.warning("a connection failed: %s", error)
        finally:
            self._clients.discard(threading.current_thread())
            self._slots.release()

    def _obey(self, client: socket.socket) -> None:
        _, uid, _ = _PEER.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        names = [read_frame(client), read_frame(client)]
        if names[0] != names[1] or names[0] not in list(Command):
            LOG.warning("no command of ours: %.64r", names[0])
            return
        name = Command(str(names[0]))
        if name not in FOR_ALL and uid not in (self._owner, 0):
            LOG.warning("%s: user %d may not", name, uid)
            return
        LOG.info("%s", name)
        match name:
            case Command.GET_CID:
                client.sendall(LENGTH.pack(self._answering.cid))
                return
            case Command.GET_FLAGS:
                client.sendall(LENGTH.pack(self._answering.flags))
                return
        if name in CONFIRMED:
            client.sendall(LENGTH.pack(CONFIRMATION))
        try:
            answer = self._answer(name, client)
        except ProtocolError:
            raise
        except Error as error:
            LOG.error("%s: %s", name, error)
            client.sendall(frame({"StdErrMessage": error.message}) + frame({"Status": STATUS_FAILED}))
            return
        client.settimeout(CLIENT_TIMEOUT_S)
        client.sendall(answer + frame({"Status": 0}))

    def _answer(self, name: Command, client: socket.socket) -> bytes:
        match name:
            case Command.DESCRIBE:
                arguments = read_frame(client)
                metadata = isinstance(arguments, dict) and arguments.get("metadata") is True
                return _said(self._answering.describe(metadata=metadata))
            case Command.GET_NAME:
                return _said(self._answering.name)
            case Command.GET_ID_BY_NAME:
                return _said(self._answering.enclave_id) if read_frame(client) == self._answering.name else b""
            case _:
                ended = self._answering.terminate()
                words = f"Successfully terminated enclave {self._answering.enclave_id}."
                return frame({"StdErrMessage": words}) + _said(ended)


def _said(value: object) -> bytes:
    return frame({"StdOutMessage": json_text(value)})
