# SPDX-License-Identifier: Apache-2.0
"""The processes of enclaves, as the commands see them: a socket for each in one directory.

Source: aws-nitro-enclaves-cli src/enclave_proc_comm.rs.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enclavekit.errors import ProtocolError
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.command import NitroCliError
from enclavekit.nitro_cli.wire import CONFIRMATION, CONFIRMED, Command, Reply, command, read_number, read_reply
from enclavekit.virtio.host_sockets import socket_path

CONFIRMATION_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 60.0
SUFFIX = ".sock"


@dataclass(slots=True)
class Answers:
    """Of those that answered, by the names of their sockets, and how many did not as they should."""

    replies: dict[str, Reply]
    failed: int = 0

    def objects(self) -> list[Any]:
        """The JSON of each. One that is none counts as failed."""
        found = []
        for reply in self.replies.values():
            if not reply.stdout and reply.status == 0:  # of another name than was asked for
                continue
            try:
                found.append(json.loads(reply.stdout))
            except (ValueError, RecursionError):
                self.failed += 1
        return found


def socket_name(enclave_id: str) -> str:
    """What stands after the last ``-enc``. NitroCliError E11 for an id that has none."""
    head, mark, slot = enclave_id.rpartition("-enc")
    if not mark or not head or not slot.isascii() or not slot.isalnum():
        raise _no_enclave(enclave_id)
    return f"{slot}{SUFFIX}"


def ask_all(directory: Path, name: Command, arguments: object = None) -> Answers:
    """Every enclave's process that lets us; a socket that nobody listens at is removed."""
    answers = Answers({})
    for path in sorted(directory.iterdir()):
        if path.suffix != SUFFIX:
            continue
        try:
            sock = _connect(path)
        except PermissionError:
            continue
        except OSError:
            with suppress(OSError):
                path.unlink()
            continue
        with sock:
            try:
                answers.replies[path.name] = _ask(sock, name, arguments)
            except (OSError, ProtocolError):
                answers.failed += 1
    return answers


def ask_one(
    directory: Path, enclave_id: str, name: Command, *, on_stderr: Callable[[str], None] | None = None
) -> Reply:
    """NitroCliError E11 when no enclave has that id, E39 when its process does not answer."""
    with _reach(directory, enclave_id) as sock:
        try:
            return _ask(sock, name, None, on_stderr)
        except (OSError, ProtocolError) as error:
            raise NitroCliError(Code.PROCESS_CONNECTION, f"{enclave_id}: {error}") from error


def ask_number(directory: Path, enclave_id: str, name: Command) -> int:
    """A CID, or flags. NitroCliError E11, E39."""
    with _reach(directory, enclave_id) as sock:
        try:
            sock.sendall(command(name))
            return read_number(sock)
        except (OSError, ProtocolError) as error:
            raise NitroCliError(Code.PROCESS_CONNECTION, f"{enclave_id}: {error}") from error


def id_of(directory: Path, name: str) -> str:
    """NitroCliError E58 unless exactly one enclave has that name."""
    found = ask_all(directory, Command.GET_ID_BY_NAME, name).objects()
    ids = [one for one in found if isinstance(one, str)]
    if len(ids) != 1:
        raise NitroCliError(
            Code.NAMING, f"{len(ids) or 'no'} enclave{'s have' if ids else ' has'} the name {name[:64]!r}"
        )
    return ids[0]


def names(directory: Path) -> list[str]:
    """Of all enclaves that answer."""
    return [one for one in ask_all(directory, Command.GET_NAME).objects() if isinstance(one, str)]


def _reach(directory: Path, enclave_id: str) -> socket.socket:
    try:
        return _connect(directory / socket_name(enclave_id))
    except OSError as error:
        raise _no_enclave(enclave_id) from error


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(CONFIRMATION_TIMEOUT_S)
        with socket_path(path.parent, path.name) as short:
            sock.connect(short)
    except BaseException:
        sock.close()
        raise
    return sock


def _ask(
    sock: socket.socket, name: Command, arguments: object, on_stderr: Callable[[str], None] | None = None
) -> Reply:
    sock.sendall(command(name, arguments))
    if name in CONFIRMED and (number := read_number(sock)) != CONFIRMATION:
        raise ProtocolError(f"enclave process: confirms with 0x{number:x}, expected 0x{CONFIRMATION:x}")
    sock.settimeout(ANSWER_TIMEOUT_S)
    reply = read_reply(sock, on_stderr)
    if reply.status is None:
        raise ProtocolError("enclave process: an answer without a status")
    return reply


def _no_enclave(enclave_id: str) -> NitroCliError:
    return NitroCliError(Code.SOCKET, f"no enclave has the id {enclave_id[:96]!r}")
