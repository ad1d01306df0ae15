# SPDX-License-Identifier: Apache-2.0
"""What lies between a device and its guest: QEMU behind a vhost-user connection, or registers of our own monitor's."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

from enclavekit.virtio.loop import Loop
from enclavekit.virtio.vhost_user import Device, VhostUser


class Transport(Protocol):
    """Starts and stops the queues of one device, in the thread of the device's loop."""

    def start(self) -> None:
        """Before the loop starts."""

    def close(self) -> None:
        """In the loop's thread: stop the device's queues. Twice does no harm."""


AnyTransport = socket.socket | Callable[[Device, Loop, Callable[[], None]], Transport]
"""A connection to QEMU; or what makes a transport, given device, loop, and what to call at the guest's end."""


def attach(transport: AnyTransport, device: Device, loop: Loop, on_end: Callable[[], None]) -> Transport:
    """Between this device and its guest; ``on_end`` is called in the loop when the guest has ended."""
    if isinstance(transport, socket.socket):
        return _Connection(transport, device, loop, on_end)
    return transport(device, loop, on_end)


class _Connection:
    """To QEMU; its end is the guest's."""

    def __init__(self, connection: socket.socket, device: Device, loop: Loop, on_end: Callable[[], None]) -> None:
        self._connection = connection
        self._vhost_user = VhostUser(connection, device, loop)
        self._loop = loop
        self._on_end = on_end

    def start(self) -> None:
        """Messages are answered as they come."""
        self._loop.watch(self._connection.fileno(), self._on_readable)

    def _on_readable(self, events: int) -> None:
        del events
        self._vhost_user.on_readable()
        if self._vhost_user.ended:
            self._on_end()

    def close(self) -> None:
        """Hang up."""
        self._vhost_user.close()
