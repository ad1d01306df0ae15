# SPDX-License-Identifier: Apache-2.0
"""What nitro-cli's commands and the processes of enclaves say to each other, over Unix sockets.

A frame is a length, eight bytes, little-endian, and one CBOR item. A command is the frame of its name, sent twice, then
a frame with its arguments if it has any. The answer is a confirmation, eight bytes, for those commands that are sent to
all enclaves, then frames ``{"StdOutMessage": text}``, ``{"StdErrMessage": text}``, ``{"Status": number}`` to the end.

Source: aws-nitro-enclaves-cli src/common/mod.rs, src/enclave_proc_comm.rs, src/enclave_proc/commands.rs.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from struct import Struct

from enclavekit.codec import cbor
from enclavekit.errors import FormatError, ProtocolError

LENGTH = Struct("<Q")  # bytes of the CBOR item; also a number of its own: a CID, flags, the confirmation
CONFIRMATION = 0xEEC0
MAX_FRAME = 1 << 20
MAX_FRAMES = 64
DEBUG_FLAG = 1
STATUS_FAILED = 22  # EINVAL


class Command(StrEnum):
    """What an enclave's process can be told."""

    TERMINATE = "Terminate"
    DESCRIBE = "Describe"
    GET_CID = "GetEnclaveCID"
    GET_FLAGS = "GetEnclaveFlags"
    GET_NAME = "GetEnclaveName"
    GET_ID_BY_NAME = "GetIDbyName"


FOR_ALL = frozenset({Command.DESCRIBE, Command.GET_CID, Command.GET_FLAGS, Command.GET_NAME, Command.GET_ID_BY_NAME})
"""What any user may ask; the rest is for the enclave's owner and root."""

CONFIRMED = frozenset({Command.DESCRIBE, Command.GET_NAME, Command.GET_ID_BY_NAME})


@dataclass(frozen=True, slots=True)
class Reply:
    """All of an answer; ``status`` None where there was none."""

    stdout: str = ""
    stderr: str = ""
    status: int | None = None


def frame(item: object) -> bytes:
    """One frame."""
    data = cbor.encode(item)
    return LENGTH.pack(len(data)) + data


def command(name: Command, arguments: object = None) -> bytes:
    """A command's frames."""
    return 2 * frame(name.value) + (frame(arguments) if arguments is not None else b"")


def read_number(sock: socket.socket) -> int:
    """Eight bytes. Raises ProtocolError where they are not all there, OSError as sockets do."""
    data = _read(sock, LENGTH.size)
    if len(data) < LENGTH.size:
        raise ProtocolError(f"enclave process: a number of {len(data)} bytes, expected {LENGTH.size}")
    number: int = LENGTH.unpack(data)[0]
    return number


def read_frame(sock: socket.socket) -> object:
    """One item; None at the end. Raises ProtocolError, and OSError as sockets do."""
    head = _read(sock, LENGTH.size)
    if not head:
        return None
    if len(head) < LENGTH.size:
        raise ProtocolError(f"enclave process: a frame's length of {len(head)} bytes, expected {LENGTH.size}")
    size: int = LENGTH.unpack(head)[0]
    if size > MAX_FRAME:
        raise ProtocolError(f"enclave process: a frame of {size} bytes, expected at most {MAX_FRAME}")
    data = _read(sock, size)
    if len(data) < size:
        raise ProtocolError(f"enclave process: a frame of {len(data)} bytes, expected {size}")
    try:
        return cbor.decode(data, "enclave process")
    except FormatError as error:
        raise ProtocolError(error.message) from error


def read_reply(sock: socket.socket, on_stderr: Callable[[str], None] | None = None) -> Reply:
    """All frames to the end; words for stderr as they come. Raises ProtocolError, and OSError as sockets do."""
    stdout: list[str] = []
    stderr: list[str] = []
    status = None
    for _ in range(MAX_FRAMES):
        match read_frame(sock):
            case None:
                return Reply("".join(stdout), "".join(stderr), status)
            case {"StdOutMessage": str(text)}:
                stdout.append(text)
            case {"StdErrMessage": str(text)}:
                stderr.append(text)
                if on_stderr is not None:
                    on_stderr(text)
            case {"Status": int(number)}:
                status = number
            case _:
                raise ProtocolError("enclave process: an answer that is neither a message nor a status")
    raise ProtocolError(f"enclave process: more than {MAX_FRAMES} frames in an answer")


def _read(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            break
        data += part
    return bytes(data)
