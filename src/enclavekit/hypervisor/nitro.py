# SPDX-License-Identifier: Apache-2.0
"""Carrier ``nitro``: real enclaves, by the driver behind /dev/nitro_enclaves.

Memory is huge pages of ours, CPUs are those of the driver's pool, vsock is the kernel's. The console is the
hypervisor's, at its CID 0, and only in debug mode. What a driver answers from 256 on is an exception of its own
(``DriverError``).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from enclavekit.errors import EnclaveConnectionError, EnclaveRefusedError, LaunchError
from enclavekit.hypervisor.contract import ImageKind, LaunchSpec, MemoryRegion, Mode, Statistics
from enclavekit.hypervisor.heartbeat import HeartbeatPort, heartbeat_timeout_s
from enclavekit.hypervisor.nitro_memory import PageChoice, allocate
from enclavekit.linux import hugetlb, nitro_enclaves
from enclavekit.linux.cpu_pool import pool_node
from enclavekit.linux.hugepages import read_hugepages
from enclavekit.linux.nitro_enclaves import Device, KernelDevice
from enclavekit.linux.parent_vsock import HYPERVISOR_CID, KernelVsock, ParentVsock

CONSOLE_PORT_BASE = 10000
CONSOLE_TIMEOUT_S = 20.0
LOCK = Path("/tmp/enclavekit-heartbeat.lock")  # noqa: S108 - for all users; who may lock it may take the port, too
ROOT = Path("/")


def page_sizes() -> list[int]:
    """Of this machine's huge pages that can be donated, in bytes."""
    sizes = [pages.size for pages in read_hugepages(ROOT, pool_node(ROOT) or 0)]
    return [size for size in sizes if size % nitro_enclaves.NE_MIN_MEM_REGION_SIZE == 0]


def map_page(size: int) -> mmap.mmap:
    """Of the CPU pool's node: the driver takes no other."""
    return hugetlb.map_page(size, pool_node(ROOT))


@dataclass(frozen=True, slots=True)
class HugePages:
    """Where memory comes from: ``sizes`` of pages in bytes, and what maps one."""

    sizes: Callable[[], Sequence[int]] = page_sizes
    map_page: Callable[[int], mmap.mmap] = map_page
    choice: PageChoice = PageChoice.TIGHT


@dataclass(frozen=True, slots=True)
class NitroCarrier:
    """Makes enclaves.

    ``lock`` is the file by which launches queue for the heartbeat's port.
    """

    device: Device = field(default_factory=KernelDevice)
    pages: HugePages = field(default_factory=HugePages)
    vsock: ParentVsock = field(default_factory=KernelVsock)
    lock: Path = LOCK

    def create(self, spec: LaunchSpec) -> NitroEnclave:
        """A new enclave without memory or CPUs. Errors: ``MissingError``, ``DriverError``."""
        return NitroEnclave(self, spec)


class NitroEnclave:
    """One enclave by its descriptor (see ``contract.Enclave``).

    ``slot_uid`` is the device's name for it, ``cpus`` are those it has.
    """

    def __init__(self, carrier: NitroCarrier, spec: LaunchSpec) -> None:
        self._carrier = carrier
        self._device = carrier.device
        self._spec = spec
        self._fd, self.slot_uid = nitro_enclaves.create_vm(carrier.device)
        self.cpus: list[int] = []
        self._buffers: list[mmap.mmap] = []
        self._named_cpus = iter(sorted(spec.cpu_list or ()))
        self._cleanup = ExitStack()
        self._heartbeat: HeartbeatPort | None = None
        self._console: socket.socket | None = None
        self.cid = 0

    def allocate(self, size: int) -> Sequence[MemoryRegion]:
        """A region for each huge page; together they may be larger than was asked for."""
        pages = self._carrier.pages
        self._buffers += allocate(size, pages.sizes(), pages.map_page, pages.choice)
        regions, offset = [], 0
        for buffer in self._buffers:
            regions.append(MemoryRegion(offset, memoryview(buffer)))
            offset += len(buffer)
        return regions

    @property
    def memory(self) -> int:
        """Bytes of all its pages."""
        return sum(map(len, self._buffers))

    def image_load_offset(self, kind: ImageKind) -> int:
        """What the driver says: 8 MiB with all that are known."""
        return nitro_enclaves.image_load_offset(self._device, self._fd, kind)

    def set_user_memory_region(self, region: MemoryRegion) -> None:
        """Donate it. The mapping stays, untouched, until the enclave is closed."""
        anchor = ctypes.c_char.from_buffer(region.buffer)
        address = ctypes.addressof(anchor)
        del anchor
        nitro_enclaves.set_user_memory_region(self._device, self._fd, address, region.size)
        region.buffer.release()

    def add_vcpu(self, cpu: int | None = None) -> int:
        """Of the driver's pool; without a number, the next of those that the specification names, if it does."""
        if cpu is None:
            cpu = next(self._named_cpus, 0)
        number = nitro_enclaves.add_vcpu(self._device, self._fd, cpu)
        self.cpus.append(number)
        return number

    def start(self, *, mode: Mode, cid: int | None = None) -> int:
        """Take the heartbeat's port, waiting for it if need be, then start."""
        if self._heartbeat is not None:
            raise LaunchError("start: the enclave was started before")
        self._heartbeat = HeartbeatPort(
            self._carrier.vsock, self._carrier.lock, heartbeat_timeout_s(self._spec.image_size, self.memory)
        )
        self._cleanup.callback(self._heartbeat.close)
        self.cid = nitro_enclaves.start_enclave(self._device, self._fd, cid or 0, mode.value)
        if mode is Mode.DEBUG:
            self._connect_console()
        return self.cid

    def _connect_console(self) -> None:
        """The hypervisor keeps what was said before. An enclave without its console still runs."""
        with contextlib.suppress(OSError):
            self._console = self._carrier.vsock.connect(HYPERVISOR_CID, CONSOLE_PORT_BASE + self.cid, CONSOLE_TIMEOUT_S)
            self._console.setblocking(False)
            self._cleanup.callback(self._console.close)

    def fileno(self) -> int:
        """The descriptor that the driver gave."""
        return self._fd

    def heartbeat_fd(self) -> int:
        """An eventfd."""
        if self._heartbeat is None:
            raise LaunchError("heartbeat: the enclave was not started")
        return self._heartbeat.fileno()

    def console(self) -> int | None:
        """A socket; None in production mode, or where the hypervisor did not answer."""
        return self._console.fileno() if self._console is not None else None

    def connect(self, port: int, timeout_s: float = 2.0) -> socket.socket:
        """By the kernel's vsock."""
        where = f"port {port} of CID {self.cid}"
        try:
            return self._carrier.vsock.connect(self.cid, port, timeout_s)
        except (ConnectionRefusedError, ConnectionResetError) as error:
            raise EnclaveRefusedError(f"{where}: connection refused", hint="does a program listen there?") from error
        except OSError as error:
            reason = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else error.strerror
            raise EnclaveConnectionError(f"{where}: {(reason or str(error)).lower()}") from error

    def statistics(self) -> Statistics:
        """A parent sees only what it gave away."""
        return Statistics(resident=sum(map(len, self._buffers)))

    def failure(self) -> str | None:
        """The driver tells of no end but that it was one."""
        return None

    @property
    def ended(self) -> bool:
        """Whether the descriptor polls POLLHUP."""
        poller = select.poll()
        poller.register(self._fd, 0)
        return bool(poller.poll(0))

    def close(self) -> None:
        """Closing the descriptor stops it, and gives CPUs and memory back."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        os.close(fd)
        self._cleanup.close()
        for buffer in self._buffers:
            with contextlib.suppress(BufferError):  # regions that were never donated are still looked at
                buffer.close()
        self._buffers = []
