# SPDX-License-Identifier: Apache-2.0
"""vsock as the parent of real enclaves has it: AF_VSOCK (vsock(7), linux: include/uapi/linux/vm_sockets.h)."""

from __future__ import annotations

import socket
from typing import Protocol

VMADDR_CID_ANY = 0xFFFF_FFFF
HYPERVISOR_CID = 0


class ParentVsock(Protocol):
    """What a carrier needs of it; raises ``OSError``."""

    def listen(self, port: int) -> socket.socket:
        """At the parent's port, which only one can have."""

    def connect(self, cid: int, port: int, timeout_s: float) -> socket.socket:
        """To an enclave's port, or to the hypervisor's."""


class KernelVsock:
    """The kernel's."""

    def listen(self, port: int) -> socket.socket:
        """On every CID that the parent has: 3."""
        made = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            made.bind((VMADDR_CID_ANY, port))
            made.listen()
        except BaseException:
            made.close()
            raise
        return made

    def connect(self, cid: int, port: int, timeout_s: float) -> socket.socket:
        """The socket blocks."""
        made = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            made.settimeout(timeout_s)
            made.connect((cid, port))
            made.settimeout(None)
        except BaseException:
            made.close()
            raise
        return made
