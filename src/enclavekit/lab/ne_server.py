# SPDX-License-Identifier: Apache-2.0
"""The device in a thread of its own: a Unix socket, on which one QEMU finds it, and the hypervisor behind it."""

from __future__ import annotations

import socket
from collections.abc import Callable

from enclavekit.lab.dma import DmaMaps
from enclavekit.lab.interrupts import Interrupts
from enclavekit.lab.ne_device import NeDevice
from enclavekit.lab.ne_registers import VECTORS
from enclavekit.lab.ne_slots import Limits
from enclavekit.lab.slots import Hypervisor
from enclavekit.lab.vfio_user import VfioUser
from enclavekit.virtio.loop import Loop


class NeServer:
    """``listener`` is ours from now on, and closed once QEMU has connected: a second one is not served.

    ``on_gone`` is called in the device's thread when QEMU has gone, or broke the protocol, or the device failed:
    ``error`` says why. By then all slots are free. QEMU does not notice when a device goes, so end it then.
    """

    def __init__(
        self,
        listener: socket.socket,
        hypervisor: Hypervisor,
        *,
        limits: Limits | None = None,
        on_gone: Callable[[], None] = lambda: None,
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._on_gone = on_gone
        self._loop = Loop(self._work, self._end)
        self._memory, self._interrupts = DmaMaps(), Interrupts(VECTORS)
        self.device = NeDevice(hypervisor, self._memory.find, self._interrupts.signal, self._loop, limits)
        self._client: VfioUser | None = None
        self._readable = False

    @property
    def error(self) -> BaseException | None:
        """Why it ended before its time."""
        return self._loop.error

    def start(self) -> None:
        """Wait for QEMU, and serve it."""
        self._loop.watch(self._listener.fileno(), self._accept)
        self._loop.start("nitro device")

    def ended(self, uid: int) -> None:
        """``slots.Ended``: the hypervisor tells it here."""
        self.device.ended(uid)

    def close(self) -> None:
        """End the thread, free all slots. Twice does no harm."""
        self._loop.stop()

    def _accept(self, events: int) -> None:
        del events
        try:
            transport, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        self._loop.retire(self._listener)
        self._client = VfioUser(transport, self.device, self._memory, self._interrupts)
        self._loop.watch(self._client.fileno(), self._wake)

    def _wake(self, events: int) -> None:
        del events
        self._readable = True

    def _work(self) -> bool:
        """A batch of messages."""
        if self._client is None or not self._readable:
            return False
        self._readable = self._client.process()
        if self._client.ended:
            self._loop.finish()
        return self._readable

    def _end(self) -> None:
        try:
            self.device.close()
        finally:
            if self._client is not None:
                self._client.close()
            self._listener.close()
            self._on_gone()
