# SPDX-License-Identifier: Apache-2.0
"""A device in its thread, a client that plays QEMU and its guest, and a hypervisor that does what a test says."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Self

from vfio_client import NeDriver, VfioClient

from enclavekit.lab.ne_server import NeServer
from enclavekit.lab.ne_slots import Limits
from enclavekit.lab.slots import Answer, Slot

MIB = 1 << 20
RAM = 256 * MIB


class FakeHypervisor:
    """Answers each start with ``rc`` and counts CIDs up; with ``hold``, only when told to."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.rc = 0
        self.hold = False
        self.held: list[Answer] = []
        self.next_cid = 16

    def start(self, slot: Slot, cid: int, flags: int, answer: Answer) -> None:
        self.said.append(("start", slot.uid))
        if self.hold:
            self.held.append(answer)
            return
        if not cid and not self.rc:
            cid, self.next_cid = self.next_cid, self.next_cid + 1
        answer(self.rc, cid)

    def stop(self, slot: Slot) -> None:
        self.said.append(("stop", slot.uid))

    def free(self, slot: Slot) -> None:
        for one in slot.memory:
            os.fstat(one.fd)  # still open
        self.said.append(("free", slot.uid))


class Rig:
    """``driver`` has been probed; the parent's RAM is ``ram``, all of it mapped from address 0."""

    def __init__(self, directory: Path, limits: Limits | None = None) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "device"))
        listener.listen(1)
        self.gone = threading.Event()
        self.hypervisor = FakeHypervisor()
        self.server = NeServer(listener, self.hypervisor, limits=limits, on_gone=self.gone.set)
        self.server.start()
        transport = socket.socket(socket.AF_UNIX)
        transport.connect(str(directory / "device"))
        self.client = VfioClient(transport)
        self.driver = NeDriver(self.client)
        self.ram = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.ram, RAM)

    def __enter__(self) -> Self:
        try:
            self.client.negotiate()
            self.client.map(0, RAM, self.ram)
            self.driver.probe()
        except BaseException:
            self.__exit__()
            raise
        return self

    def settle(self) -> None:
        """Until the device has heard what other threads have told it."""
        done = threading.Event()
        assert self.server._loop.call(done.set)
        assert done.wait(20)

    def __exit__(self, *args: object) -> None:
        self.driver.close()
        self.server.close()
        os.close(self.ram)
