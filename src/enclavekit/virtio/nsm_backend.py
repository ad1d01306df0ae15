# SPDX-License-Identifier: Apache-2.0
"""An NSM device in a thread, behind QEMU's vhost-user socket."""

from __future__ import annotations

import socket
from collections.abc import Callable

from enclavekit.virtio.loop import Loop
from enclavekit.virtio.nsm import Nsm, NsmDevice
from enclavekit.virtio.vhost_user import VhostUser


class NsmBackend:
    """The NSM of one enclave. ``transport`` is ours from now on; QEMU holds the other end.

    ``on_failure`` comes in the device's thread: the device has ended by itself, ``error`` says why.
    """

    def __init__(
        self,
        *,
        transport: socket.socket,
        nsm: Nsm,
        enclave_id: str,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self._transport = transport
        self._enclave_id = enclave_id
        self._on_failure = on_failure
        self._device = NsmDevice(nsm)
        self._loop = Loop(self._device.process, self._end)
        self._vhost_user = VhostUser(transport, self._device, self._loop)

    @property
    def error(self) -> BaseException | None:
        """Why the device ended before its time. A guest that broke its queue only hurts itself."""
        return self._loop.error

    def start(self) -> None:
        """Serve the guest."""
        self._loop.watch(self._transport.fileno(), self._on_transport)
        self._loop.start(f"nsm {self._enclave_id}")

    def close(self) -> None:
        """End the thread, close everything. Twice does no harm."""
        self._loop.stop()

    def _on_transport(self, events: int) -> None:
        del events
        self._vhost_user.on_readable()
        if self._vhost_user.ended:
            self._vhost_user.close()

    def _end(self) -> None:
        self._vhost_user.close()
        if self._loop.error is not None and self._on_failure is not None:
            self._on_failure()
