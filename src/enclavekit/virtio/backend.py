# SPDX-License-Identifier: Apache-2.0
"""A vsock device in a thread: the guest's transport on one side, Unix sockets of host programs on the other."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from enclavekit.errors import EnclaveConnectionError, EnclaveRefusedError
from enclavekit.virtio.host_sockets import CONNECT_TIMEOUT_S, MAX_PORT, HostAddress, Listener, ParentRoute, Published
from enclavekit.virtio.loop import Loop
from enclavekit.virtio.streams import HEARTBEAT_PORT, HeartbeatStream, SocketStream
from enclavekit.virtio.transport import AnyTransport, attach
from enclavekit.virtio.vsock import BULK, VsockDevice
from enclavekit.virtio.vsock_host import Outcome, Route, Stream
from enclavekit.virtio.vsock_packet import PARENT_CID, VMADDR_CID_HOST


class Network(Protocol):
    """Guests that reach each other, as far as it lets them, in place of host sockets."""

    def join(self, loop: Loop, device: VsockDevice) -> Mapping[int, Route]:
        """A guest is there, and its device in this loop. Returns whom it reaches, which may change at any time."""

    def leave(self, device: VsockDevice) -> None:
        """It is gone. In its loop's thread; twice does no harm."""


class VsockBackend:
    """The vsock device of one enclave. ``transport`` is ours from now on.

    ``listen`` says where ports of the parent lead that the guest dials, and ``publish`` which ports of the host lead to
    which of the guest. With a ``network`` it has none of these, no sockets and no service: only who is in there.
    Connections of ours come from ``host_cid``.

    Both callbacks come in the device's thread. ``on_heartbeat``: a heartbeat was heard.
    ``on_failure``: the device has ended by itself, ``error`` says why; QEMU and the guest go on without it unless
    somebody ends them.
    """

    def __init__(
        self,
        *,
        transport: AnyTransport,
        guest_cid: int,
        enclave_id: str,
        directory: Path,
        parent_directory: Path | None,
        listen: Mapping[int, HostAddress] | None = None,
        publish: Sequence[tuple[HostAddress, int]] = (),
        on_heartbeat: Callable[[], None] | None = None,
        on_failure: Callable[[], None] | None = None,
        network: Network | None = None,
        host_cid: int = PARENT_CID,
    ) -> None:
        self._guest_cid = guest_cid
        self._enclave_id = enclave_id
        self._directory = directory
        self._on_failure = on_failure
        self._loop = Loop(self._work, self._end, peek=self._peek)
        routes: dict[int, Route] = {}
        if network is None:
            services: dict[int, Callable[[], Stream]] = {
                HEARTBEAT_PORT: lambda: HeartbeatStream(on_heartbeat or (lambda: None))
            }
            parent = ParentRoute(
                self._loop,
                enclave_id=enclave_id,
                directory=directory,
                parent_directory=parent_directory,
                services=services,
                listen=listen,
            )
            routes = {VMADDR_CID_HOST: parent, PARENT_CID: parent}
        self._device = VsockDevice(guest_cid, routes, self._loop.call_later, host_cid)
        self._network = network
        self._transport = attach(transport, self._device, self._loop, self._hang_up)
        self._listeners: list[Listener | Published] = []
        self._publish = publish

    @property
    def error(self) -> BaseException | None:
        """Why the device ended before its time, or does not work until the guest resets it."""
        return self._loop.error or self._device.error

    def start(self) -> None:
        """Listen, and serve the guest. Raises ``FileError`` where the directory cannot hold the socket."""
        if self._network is not None:
            self._device.routes = self._network.join(self._loop, self._device)
        else:
            self._listeners.append(Listener(self._loop, self._device, self._directory))
            for address, port in self._publish:
                self._listeners.append(Published(self._loop, self._device, address, port))
        self._transport.start()
        self._loop.start(f"vsock {self._enclave_id}")

    def connect(self, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
        """Connect to a port of the enclave, from any thread; the socket blocks.

        Raises ``EnclaveConnectionError`` when nobody listens there, or nobody answers in time.
        """
        if not 0 <= port <= MAX_PORT:
            raise ValueError(f"port {port} is not within 0 to {MAX_PORT}")
        where = f"port {port} of CID {self._guest_cid}"
        answer: Future[Outcome] = Future()
        ours, theirs = socket.socketpair()

        def open_stream() -> None:
            stream = SocketStream(self._loop, theirs)
            self._device.open(port, stream, timeout_s, lambda outcome, _: answer.set_result(outcome))

        if not self._loop.call(open_stream):
            theirs.close()
            answer.set_result(Outcome.ENDED)
        try:
            outcome = answer.result()
        except BaseException:
            ours.close()
            raise
        if outcome is Outcome.ACCEPTED:
            return ours
        ours.close()
        match outcome:
            case Outcome.REFUSED:
                raise EnclaveRefusedError(f"{where}: connection refused", hint="does a program listen there?")
            case Outcome.TIMED_OUT:
                raise EnclaveConnectionError(f"{where}: no answer within {timeout_s:g} s")
            case _:
                raise EnclaveConnectionError(f"{where}: the enclave has ended")

    def statistics(self) -> tuple[int, int, int]:
        """Connections now; bytes that the guest has sent, and that it was sent. From any thread."""
        return self._device.connections, self._device.received, self._device.sent

    def close(self) -> None:
        """End the thread, close and remove everything. Twice does no harm."""
        self._loop.stop()

    def _work(self) -> bool:
        device = self._device
        before = device.received + device.sent
        more = device.process()
        if 0 < device.received + device.sent - before < BULK and self._network is None:
            self._loop.expect()  # a few bytes are a question or an answer
        return more

    def _peek(self) -> bool:
        return self._device.peek()

    def _hang_up(self) -> None:
        """The guest is gone. What it has sent is still being delivered."""
        try:
            self._transport.close()
        finally:
            for listener in self._listeners:
                listener.close()
            self._listeners.clear()
            if self._network is not None:
                self._network.leave(self._device)
            self._device.end()

    def _end(self) -> None:
        try:
            self._hang_up()
        finally:
            self._device.close()
            if self._loop.error is not None and self._on_failure is not None:
                self._on_failure()
