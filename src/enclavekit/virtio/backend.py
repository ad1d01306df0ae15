# SPDX-License-Identifier: Apache-2.0
"""An enclave's vsock device as a carrier uses it: device, transport and host sockets on one thread."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

from enclavekit.errors import EnclaveConnectionError, FileError
from enclavekit.virtio.host_sockets import ConnectListener, ParentRoute
from enclavekit.virtio.loop import Loop
from enclavekit.virtio.vhost_user import VhostUser
from enclavekit.virtio.vsock import CONNECT_TIMEOUT_S, VsockDevice

QUEUES = 2
"""RX and TX; the event queue stays with QEMU."""
HYPERVISOR_HOST_CID, PARENT_CID = 2, 3


class VsockBackend:
    """Serves one enclave until ``close``; ``connect`` may be called from any thread."""

    def __init__(
        self,
        *,
        transport: socket.socket,
        guest_cid: int,
        enclave_id: str,
        directory: Path,
        parent_directory: Path | None,
        on_heartbeat: Callable[[], None] | None = None,
    ) -> None:
        self._loop = Loop(f"vsock-{enclave_id}")
        self._loop.on_error = self._failed
        self._error: BaseException | None = None
        parent = ParentRoute(self._loop, directory, parent_directory, enclave_id, on_heartbeat)
        self._device = VsockDevice(self._loop, guest_cid, {HYPERVISOR_HOST_CID: parent, PARENT_CID: parent})
        self._transport = transport
        self._vhost = VhostUser(self._loop, transport, self._device, QUEUES)
        try:
            self._listener = ConnectListener(self._loop, self._device, directory)
        except OSError as error:
            self._vhost.close()
            self._loop.close()
            raise FileError.of(error, directory / "vsock.sock", "listen at") from error
        self._closed = False

    @property
    def error(self) -> BaseException | None:
        """Why the device went off, if not by the enclave's end."""
        return self._error or self._vhost.error or self._device.broken

    def _failed(self, error: BaseException) -> None:
        """An error of our own: QEMU must not wait for a device that answers no more."""
        self._error = error
        with contextlib.suppress(OSError):
            self._transport.shutdown(socket.SHUT_RDWR)

    def start(self) -> None:
        """Begin to serve."""
        self._loop.start()

    def connect(self, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
        """A blocking socket to a vsock port of the enclave. Errors: ``EnclaveConnectionError``."""
        ours, theirs = socket.socketpair()
        opened: Future[bool] = Future()

        def resolve(value: bool) -> None:
            if not opened.done():
                opened.set_result(value)

        self._loop.call(
            lambda: self._device.connect(
                port, theirs, on_open=lambda _: resolve(True), on_refused=lambda: resolve(False)
            )
        )
        try:
            if opened.result(timeout_s + 1.0):
                return ours
        except FutureTimeoutError:
            pass
        ours.close()
        raise EnclaveConnectionError(f"vsock port {port}: nothing in the enclave answers there")

    def close(self) -> None:
        """End the thread, close every connection, remove vsock.sock. Twice does no harm."""
        if self._closed:
            return
        self._closed = True
        self._loop.stop()
        self._vhost.close()
        self._device.reset()
        self._listener.close()
        self._loop.close()
