# SPDX-License-Identifier: Apache-2.0
"""Carrier ``simulated``: the driver's rules and errors without a driver, for tests of programs that launch enclaves.

    carrier = SimulatedCarrier(tmp_path, limits=Limits(regions=16))
    enclave = launch(carrier.create, spec, image, mode=Mode.DEBUG)
    carrier.driver.slots[0].end()      # the enclave dies: its descriptor polls POLLHUP

Nothing runs in it. Memory is ordinary, taken for huge pages of 2 MiB; vsock is Unix sockets in a directory: what the
enclave would dial is dialled by ``beat`` or by the test itself, and where it would listen, the test listens.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from enclavekit.hypervisor.contract import LaunchSpec
from enclavekit.hypervisor.heartbeat import HEARTBEAT, HEARTBEAT_PORT
from enclavekit.hypervisor.nitro import CONSOLE_PORT_BASE, HugePages, NitroCarrier, NitroEnclave
from enclavekit.linux.parent_vsock import HYPERVISOR_CID
from enclavekit.testing.nitro_device import SimulatedDevice
from enclavekit.testing.nitro_driver import Limits, SimulatedDriver
from enclavekit.testing.user_memory import HUGE, UserMemory

SIZES = tuple(HUGE << shift for shift in range(10))


def map_aligned(size: int) -> mmap.mmap:
    """Ordinary memory that begins on a multiple of 2 MiB, as huge pages do."""
    rejected: list[mmap.mmap] = []
    try:
        while True:
            mapped = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            past = address_of(mapped) % HUGE
            if not past:
                return mapped
            mapped.close()
            # ``mmap`` here takes no address. Mappings grow downwards: a filler of the excess moves the next one.
            rejected.append(mmap.mmap(-1, past, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    finally:
        for filler in rejected:
            filler.close()


def address_of(mapped: mmap.mmap) -> int:
    """Of a mapping's first byte, in this process."""
    anchor = ctypes.c_char.from_buffer(mapped)
    address = ctypes.addressof(anchor)
    del anchor
    return address


class UnixVsock:
    """vsock as Unix sockets ``CID_PORT`` in a directory; the parent's CID is 3 (``ParentVsock``)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, cid: int, port: int) -> Path:
        """Where that CID listens."""
        return self._directory / f"{cid}_{port}"

    def listen(self, port: int) -> socket.socket:
        """As the parent."""
        return self.listen_at(3, port)

    def listen_at(self, cid: int, port: int) -> socket.socket:
        """As whoever lives at a CID: a test can be an enclave, or the hypervisor."""
        made = socket.socket(socket.AF_UNIX)
        path = self.path(cid, port)
        try:
            if path.exists() and not self._answers(path):
                path.unlink()
            made.bind(str(path))
            made.listen()
        except BaseException:
            made.close()
            raise
        return made

    @staticmethod
    def _answers(path: Path) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0

    def connect(self, cid: int, port: int, timeout_s: float) -> socket.socket:
        """From anywhere."""
        made = socket.socket(socket.AF_UNIX)
        try:
            made.settimeout(timeout_s)
            made.connect(str(self.path(cid, port)))
            made.settimeout(None)
        except OSError as error:
            made.close()
            if error.errno == errno.ENOENT:
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)) from error
            raise
        return made

    def console_of(self, cid: int) -> socket.socket:
        """Listens as the hypervisor does for who wants to read an enclave's console."""
        return self.listen_at(HYPERVISOR_CID, CONSOLE_PORT_BASE + cid)

    def beat(self, timeout_s: float = 5.0) -> bytes:
        """What init does first: the heartbeat; what was answered."""
        with self.connect(3, HEARTBEAT_PORT, timeout_s) as connection:
            connection.settimeout(timeout_s)
            connection.sendall(HEARTBEAT)
            return connection.recv(1)


class SimulatedCarrier:
    """Makes enclaves that are only checked. ``directory`` is for sockets; ``driver`` is there to be looked at and hurt.

    ``sizes`` are those of regions, in bytes, each of as many pages of 2 MiB as it takes.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limits: Limits | None = None,
        memory: UserMemory | None = None,
        sizes: Sequence[int] = SIZES,
        map_page: Callable[[int], mmap.mmap] = map_aligned,
    ) -> None:
        self.driver = SimulatedDriver(limits)
        self.device = SimulatedDevice(self.driver, memory)
        self.vsock = UnixVsock(directory)
        self._nitro = NitroCarrier(
            device=self.device,
            pages=HugePages(sizes=lambda: sizes, map_page=map_page),
            vsock=self.vsock,
            lock=directory / "heartbeat.lock",
        )

    def create(self, spec: LaunchSpec) -> NitroEnclave:
        """A new enclave without memory or CPUs. Errors: ``DriverError``."""
        return self._nitro.create(spec)

    def close(self) -> None:
        """Forget all of its enclaves."""
        self.device.close()
