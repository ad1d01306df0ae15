# SPDX-License-Identifier: Apache-2.0
"""An NSM device in a thread."""

from __future__ import annotations

from collections.abc import Callable

from enclavekit.virtio.loop import Loop
from enclavekit.virtio.nsm import Nsm, NsmDevice
from enclavekit.virtio.transport import AnyTransport, attach


class NsmBackend:
    """The NSM of one enclave. ``transport`` is ours from now on.

    ``on_failure`` comes in the device's thread: the device has ended by itself, ``error`` says why.
    """

    def __init__(
        self,
        *,
        transport: AnyTransport,
        nsm: Nsm,
        enclave_id: str,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self._enclave_id = enclave_id
        self._on_failure = on_failure
        self._device = NsmDevice(nsm)
        self._loop = Loop(self._device.process, self._end)
        self._transport = attach(transport, self._device, self._loop, self._hang_up)

    @property
    def error(self) -> BaseException | None:
        """Why the device ended before its time. A guest that broke its queue only hurts itself."""
        return self._loop.error

    def start(self) -> None:
        """Serve the guest."""
        self._transport.start()
        self._loop.start(f"nsm {self._enclave_id}")

    def close(self) -> None:
        """End the thread, close everything. Twice does no harm."""
        self._loop.stop()

    def _hang_up(self) -> None:
        self._transport.close()

    def _end(self) -> None:
        self._transport.close()
        if self._loop.error is not None and self._on_failure is not None:
            self._on_failure()
