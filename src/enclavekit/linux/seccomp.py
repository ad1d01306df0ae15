# SPDX-License-Identifier: Apache-2.0
"""seccomp user notification: system calls of a program, answered by another (seccomp(2), seccomp_unotify(2); x86_64).

Not a sandbox: a call that is let through reads its arguments again, and they may have changed.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import signal
import socket
import struct
from collections.abc import Sequence
from ctypes import c_int32, c_uint32, c_uint64
from typing import ClassVar, NoReturn

from enclavekit.errors import MissingError, UnsupportedHostError
from enclavekit.linux.ioctl import iow, iowr

AUDIT_ARCH_X86_64 = 0xC000003E
X32_BIT = 0x4000_0000
SYS_IOCTL, SYS_OPEN, SYS_SOCKET, SYS_OPENAT, SYS_SECCOMP, SYS_OPENAT2 = 16, 2, 41, 257, 317, 437

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3
_RET_USER_NOTIF, _RET_ERRNO, _RET_ALLOW = 0x7FC0_0000, 0x0005_0000, 0x7FFF_0000
_NOTIF_CONTINUE = 1
_ADDFD_SEND = 1 << 1
_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_NR, _ARCH, _ARGUMENT = 0, 4, 16
_BLOCKED = struct.Struct("=i")


class seccomp_notif(ctypes.Structure):  # noqa: N801 - the kernel's name
    """80 bytes: a call that waits for an answer."""

    _fields_: ClassVar = [
        ("id", c_uint64),  # 0x00
        ("pid", c_uint32),  # 0x08 the thread's
        ("flags", c_uint32),  # 0x0c
        ("nr", c_int32),  # 0x10 the call's number
        ("arch", c_uint32),  # 0x14
        ("instruction_pointer", c_uint64),  # 0x18
        ("args", c_uint64 * 6),  # 0x20
    ]


class seccomp_notif_resp(ctypes.Structure):  # noqa: N801
    """24 bytes: the answer."""

    _fields_: ClassVar = [
        ("id", c_uint64),  # 0x00
        ("val", ctypes.c_int64),  # 0x08 what the call returns
        ("error", c_int32),  # 0x10 or minus its errno
        ("flags", c_uint32),  # 0x14
    ]


class seccomp_notif_addfd(ctypes.Structure):  # noqa: N801
    """24 bytes: a descriptor that the program gets."""

    _fields_: ClassVar = [
        ("id", c_uint64),  # 0x00
        ("flags", c_uint32),  # 0x08
        ("srcfd", c_uint32),  # 0x0c ours
        ("newfd", c_uint32),  # 0x10
        ("newfd_flags", c_uint32),  # 0x14 O_CLOEXEC
    ]


_MAGIC = ord("!")
SECCOMP_IOCTL_NOTIF_RECV = iowr(_MAGIC, 0, seccomp_notif)
SECCOMP_IOCTL_NOTIF_SEND = iowr(_MAGIC, 1, seccomp_notif_resp)
SECCOMP_IOCTL_NOTIF_ADDFD = iow(_MAGIC, 3, seccomp_notif_addfd)


def filter_program(ioctl_type: int) -> bytes:
    """A classic BPF program: opens, and ioctls of that type, are notified; AF_VSOCK sockets are EAFNOSUPPORT."""

    def statement(code: int, k: int, jt: int = 0, jf: int = 0) -> bytes:
        return struct.pack("=HBBI", code, jt, jf, k)

    notify, allow = statement(_RETURN, _RET_USER_NOTIF), statement(_RETURN, _RET_ALLOW)
    program = [
        statement(_LOAD, _ARCH),
        statement(_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        allow,
        statement(_LOAD, _NR),
    ]
    for number in (SYS_OPEN, SYS_OPENAT, SYS_OPENAT2):
        program += [statement(_EQUAL, number, 0, 1), notify]
    program += [
        statement(_EQUAL, SYS_SOCKET, 0, 4),
        statement(_LOAD, _ARGUMENT),
        statement(_EQUAL, socket.AF_VSOCK, 0, 1),
        statement(_RETURN, _RET_ERRNO | errno.EAFNOSUPPORT),
        allow,
        statement(_EQUAL, SYS_IOCTL, 0, 4),
        statement(_LOAD, _ARGUMENT + 8),
        statement(_AND, 0xFF00),
        statement(_EQUAL, ioctl_type << 8, 0, 1),
        notify,
        allow,
    ]
    return b"".join(program)


class Listener:
    """Answers the calls of one program and its children. ``fileno`` polls POLLIN for a call, POLLHUP at their end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """For a poller."""
        return self._fd

    def receive(self) -> seccomp_notif | None:
        """A call that waits; None when its thread was killed meanwhile."""
        call = seccomp_notif()
        try:
            fcntl.ioctl(self._fd, SECCOMP_IOCTL_NOTIF_RECV, call, True)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return None
            raise
        return call

    def let_through(self, call: seccomp_notif) -> None:
        """The kernel does it."""
        self._send(seccomp_notif_resp(id=call.id, flags=_NOTIF_CONTINUE))

    def answer(self, call: seccomp_notif, value: int) -> None:
        """It returns that."""
        self._send(seccomp_notif_resp(id=call.id, val=value))

    def refuse(self, call: seccomp_notif, number: int) -> None:
        """It fails with that errno, which may be larger than any of the kernel's."""
        self._send(seccomp_notif_resp(id=call.id, error=-number))

    def give(self, call: seccomp_notif, fd: int, *, close_on_exec: bool) -> None:
        """It returns a new descriptor of what ``fd`` is here."""
        flags = os.O_CLOEXEC if close_on_exec else 0
        request = seccomp_notif_addfd(id=call.id, flags=_ADDFD_SEND, srcfd=fd, newfd_flags=flags)
        try:
            fcntl.ioctl(self._fd, SECCOMP_IOCTL_NOTIF_ADDFD, request, True)
        except OSError as error:
            if error.errno != errno.ENOENT:
                self.refuse(call, error.errno or errno.EMFILE)

    def _send(self, response: seccomp_notif_resp) -> None:
        with contextlib.suppress(FileNotFoundError):  # it was killed meanwhile
            fcntl.ioctl(self._fd, SECCOMP_IOCTL_NOTIF_SEND, response, True)

    def close(self) -> None:
        """Calls that come later fail with ENOSYS."""
        os.close(self._fd)


def spawn(words: Sequence[str], ioctl_type: int) -> tuple[int, Listener]:
    """Start a program with the filter; its process's number, and who answers for it.

    Errors: ``UnsupportedHostError`` on another architecture, ``MissingError`` where seccomp may not be used. A program
    that cannot be run ends with 127 or 126, as in shells.
    """
    if platform.machine() != "x86_64":
        raise UnsupportedHostError(
            f"machine {platform.machine()}: programs can only be run against a simulated driver on x86_64"
        )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = filter_program(ioctl_type)
        pid = os.fork()
        if pid == 0:
            _become(words, program, theirs)
        theirs.close()
        said, ancillary, _, _ = ours.recvmsg(_BLOCKED.size, socket.CMSG_SPACE(4))
        if not ancillary:
            os.waitpid(pid, 0)
            number = _BLOCKED.unpack(said)[0] if len(said) == _BLOCKED.size else errno.EPERM
            raise MissingError(
                f"seccomp user notification: {os.strerror(number).lower()}",
                hint="it needs Linux 5.14, and is often forbidden in containers: allow it, or run outside of them",
            )
        return pid, Listener(array.array("i", ancillary[0][2][:4])[0])


def _become(words: Sequence[str], program: bytes, channel: socket.socket) -> NoReturn:
    """In the child: install the filter, give the listener away, run the program."""
    status = 126
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        code = ctypes.create_string_buffer(program)
        described = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code)))
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        fd = libc.syscall(SYS_SECCOMP, _SECCOMP_SET_MODE_FILTER, _NEW_LISTENER, described)
        if fd < 0:
            channel.send(_BLOCKED.pack(ctypes.get_errno()))
        else:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            channel.sendmsg([_BLOCKED.pack(0)], rights)
            os.close(fd)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and programs do not expect ignored
                signal.signal(number, signal.SIG_DFL)
            os.execvp(words[0], list(words))  # noqa: S606 - the user's own program
    except FileNotFoundError:
        status = 127
        os.write(2, f"{words[0]}: not found\n".encode())
    except OSError as error:
        os.write(2, f"{words[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(status)
