# SPDX-License-Identifier: Apache-2.0
"""vsock as on EC2, between guests of ours: who reaches whom, and connections from one device to another.

    hypervisor, CID 0       console of an enclave in debug mode at port 10000 + its CID
    parent, CID 3           reaches the hypervisor and every enclave
    enclave, CID 16 and up  reaches the parent, and nobody else

Each guest's device keeps its own thread and its own credit. A connection between two of them is a socket pair: what it
holds is bounded by the kernel, and an end that is not read from fills it, so that the other's credit runs out. Ends of
halves pass through it as they do with host programs. A caller is answered when the one called has answered.

We reach the parent too (``connect``); it sees us come from CID 0.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from enclavekit.linux.parent_vsock import HYPERVISOR_CID
from enclavekit.virtio.backend import VsockBackend
from enclavekit.virtio.host_sockets import CONNECT_TIMEOUT_S
from enclavekit.virtio.loop import Loop
from enclavekit.virtio.streams import SocketStream
from enclavekit.virtio.transport import AnyTransport
from enclavekit.virtio.vsock import VsockDevice
from enclavekit.virtio.vsock_host import Outcome, Pending, Route, Stream
from enclavekit.virtio.vsock_packet import PARENT_CID, Address

CONSOLE_PORTS = 10000
"""The console of the enclave with a CID is at this port plus the CID."""

DIAL_TIMEOUT_S = 10.0
"""The called guest's time to answer; callers are usually less patient (2 s in Linux)."""


ENCLAVE_CONNECTIONS = 2048
"""Of one enclave, at once. All of a parent's together leave the parent room for its own (``vsock.MAX_CONNECTIONS``)."""


@dataclass(frozen=True, slots=True)
class _Member:
    loop: Loop
    device: VsockDevice


class Switch:
    """Joins the devices of one parent and of its enclaves (``backend.Network``). All may be called by any thread."""

    def __init__(self, enclave_connections: int = ENCLAVE_CONNECTIONS) -> None:
        self._enclave_connections = enclave_connections
        self._lock = threading.Lock()
        self._members: dict[int, _Member] = {}
        self._from_parent: dict[int, Route] = {HYPERVISOR_CID: _ConsoleService(self)}
        self._consoles: dict[int, Callable[[socket.socket], None]] = {}
        self._parent: VsockBackend | None = None

    # The parent

    def start_parent(self, transport: AnyTransport, on_failure: Callable[[], None] | None = None) -> None:
        """Its device, behind this transport. ``on_failure`` comes in the device's thread."""
        self._parent = VsockBackend(
            transport=transport,
            guest_cid=PARENT_CID,
            enclave_id="parent",
            directory=Path(),  # it has no sockets
            parent_directory=None,
            on_failure=on_failure,
            network=self,
            host_cid=HYPERVISOR_CID,
        )
        self._parent.start()

    def connect(self, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
        """To a port of the parent; the socket blocks. Errors: as of ``VsockBackend.connect``."""
        if self._parent is None:
            raise ValueError("the parent's device was not started")
        return self._parent.connect(port, timeout_s)

    @property
    def error(self) -> BaseException | None:
        """Why the parent's device does not work, if it does not."""
        return self._parent.error if self._parent is not None else None

    def close(self) -> None:
        """The parent is gone. Twice does no harm."""
        if self._parent is not None:
            self._parent.close()

    # Consoles

    def offer_console(self, cid: int, attach: Callable[[socket.socket], None]) -> None:
        """Whoever asks for this enclave's console is given to ``attach``, in the thread of the parent's device."""
        with self._lock:
            self._consoles[cid] = attach

    def withdraw_console(self, cid: int) -> None:
        """There is none any more."""
        with self._lock:
            self._consoles.pop(cid, None)

    def dial_console(self, source: Address, port: int) -> Stream | None:
        """A reader's stream, where that port is a console's."""
        with self._lock:
            attach, member = self._consoles.get(port - CONSOLE_PORTS), self._members.get(source.cid)
        ends = _socketpair() if attach is not None and member is not None else None
        if attach is None or member is None or ends is None:
            return None
        attach(ends[1])
        return SocketStream(member.loop, ends[0])

    # Guests

    def join(self, loop: Loop, device: VsockDevice) -> Mapping[int, Route]:
        """See ``backend.Network``."""
        cid = device.guest_cid
        with self._lock:
            if cid in self._members:
                raise ValueError(f"CID {cid} is taken")
            self._members[cid] = _Member(loop, device)
            if cid == PARENT_CID:
                return self._from_parent
            device.max_connections = self._enclave_connections
            self._from_parent[cid] = _GuestRoute(self, cid)
            return {PARENT_CID: _GuestRoute(self, PARENT_CID)}

    def leave(self, device: VsockDevice) -> None:
        """See ``backend.Network``."""
        cid = device.guest_cid
        with self._lock:
            member = self._members.get(cid)
            if member is not None and member.device is device:
                del self._members[cid]
                self._from_parent.pop(cid, None)

    def dial(self, source: Address, target: Address) -> Pending | None:
        """From one guest to another, in the thread of the calling one's device."""
        with self._lock:
            caller, called = self._members.get(source.cid), self._members.get(target.cid)
        ends = _socketpair() if caller is not None and called is not None else None
        if caller is None or called is None or ends is None:
            return None
        pending = Pending(SocketStream(caller.loop, ends[0]))

        def answer(outcome: Outcome, _: int) -> None:
            caller.loop.call(lambda: pending.answer(outcome is Outcome.ACCEPTED))

        def open_stream() -> None:
            stream = SocketStream(called.loop, ends[1])
            called.device.open(target.port, stream, DIAL_TIMEOUT_S, answer, source)

        if not called.loop.call(open_stream):
            for end in ends:
                end.close()
            return None
        return pending


@dataclass(frozen=True, slots=True)
class _GuestRoute:
    switch: Switch
    cid: int

    def dial(self, source: Address, port: int) -> Pending | None:
        """See ``Route``."""
        return self.switch.dial(source, Address(self.cid, port))


@dataclass(frozen=True, slots=True)
class _ConsoleService:
    switch: Switch

    def dial(self, source: Address, port: int) -> Stream | None:
        """See ``Route``."""
        return self.switch.dial_console(source, port)


def _socketpair() -> tuple[socket.socket, socket.socket] | None:
    try:
        return socket.socketpair()
    except OSError:  # no file descriptors: then nobody gets through
        return None
