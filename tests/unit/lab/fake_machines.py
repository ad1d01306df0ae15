# SPDX-License-Identifier: Apache-2.0
"""A parent's memory, slots in it, and a carrier whose machines are what a test says they are."""

from __future__ import annotations

import io
import mmap
import os
import queue
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from kernel_files import bzimage

from enclavekit import eif
from enclavekit.eif import BytesContent, Section, SectionType
from enclavekit.hypervisor.contract import ImageKind, LaunchSpec, MemoryRegion, Mode, Statistics
from enclavekit.hypervisor.memory import enclave_memory
from enclavekit.lab.enclave import Host
from enclavekit.lab.hypervisor import LabHypervisor
from enclavekit.lab.slots import DonatedRange, Slot
from enclavekit.lab.switch import Switch
from enclavekit.virtio.backend import VsockBackend

MIB = 1 << 20
TIMEOUT_S = 20.0
SIZE = 64 * MIB


def image(
    *, ramdisk: bytes = b"ramdisk", sign: eif.writer.Sign | None = None, arch: eif.Arch = eif.Arch.X86_64
) -> bytes:
    """A small one that no machine could boot."""
    out = io.BytesIO()
    parts = {
        SectionType.KERNEL: bzimage(b"payload", init_size=MIB),
        SectionType.CMDLINE: b"quiet",
        SectionType.METADATA: b"{}",
        SectionType.RAMDISK: ramdisk,
    }
    eif.write(out, [Section(kind, BytesContent(data)) for kind, data in parts.items()], arch=arch, sign=sign)
    return out.getvalue()


class ParentMemory:
    """A parent's RAM in a memfd, and what it donates of it."""

    def __init__(self, size: int = 512 * MIB) -> None:
        self.fd = os.memfd_create("parent", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)

    def slot(self, uid: int, pieces: Sequence[tuple[int, int]], content: bytes, *, at: int = 8 * MIB) -> Slot:
        """One with these ranges, as offsets and sizes, and ``content`` in them from ``at`` on, across their borders."""
        slot = Slot(uid, [DonatedRange(offset, size, self.fd, offset) for offset, size in pieces], [2])
        base = 0
        for offset, size in pieces:
            skip = max(at - base, 0)
            if skip < size and content:
                written = os.pwrite(self.fd, content[: size - skip], offset + skip)
                content, at = content[written:], at + written
            base += size
        return slot

    def read(self, slot: Slot) -> bytes:
        """What the parent sees in a slot's memory."""
        return b"".join(os.pread(self.fd, one.size, one.offset) for one in slot.memory)

    @property
    def used(self) -> int:
        """Bytes."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        os.close(self.fd)


class FakeEnclave:
    """A machine of descriptors only (``contract.Enclave``): it ends, and speaks, when a test says so."""

    def __init__(self, carrier: FakeCarrier, spec: LaunchSpec) -> None:
        self.carrier = carrier
        self.spec = spec
        self.cid = 0
        self.mode: Mode | None = None
        self.cpus = 0
        self.donated = 0
        self.why: str | None = None
        self.closes = 0
        self._cleanup = ExitStack()
        self._alive, self._writer = os.pipe2(os.O_CLOEXEC)
        self._cleanup.callback(os.close, self._alive)
        self._console, self.serial = socket.socketpair()
        self._console.setblocking(False)
        self._cleanup.callback(self._console.close)
        self._cleanup.callback(self.serial.close)

    def allocate(self, size: int) -> Sequence[MemoryRegion]:
        self.memory_fd = enclave_memory(self.spec, size)
        self._cleanup.callback(os.close, self.memory_fd)
        return [MemoryRegion(0, memoryview(mmap.mmap(self.memory_fd, size)))]

    def image_load_offset(self, kind: ImageKind) -> int:
        return 8 * MIB

    def set_user_memory_region(self, region: MemoryRegion) -> None:
        self.donated += region.size
        region.buffer.release()

    def add_vcpu(self, cpu: int | None = None) -> int:
        self.cpus += 1
        return self.cpus

    def start(self, *, mode: Mode, cid: int | None = None) -> int:
        self.mode, self.cid = mode, cid or 0
        if self.carrier.error is not None:
            raise self.carrier.error
        ours, self.transport = socket.socketpair()
        self._cleanup.callback(self.transport.close)
        backend = VsockBackend(
            transport=ours,
            guest_cid=self.cid,
            enclave_id=self.spec.enclave_id,
            directory=self.spec.directory,
            parent_directory=None,
            network=self.spec.network,
        )
        backend.start()
        self._cleanup.callback(backend.close)
        self.carrier.started.put(self)
        assert self.carrier.go_on.wait(TIMEOUT_S)
        return self.cid

    def fileno(self) -> int:
        return self._alive

    def heartbeat_fd(self) -> int:
        raise NotImplementedError

    def console(self) -> int | None:
        return self._console.fileno()

    def connect(self, port: int, timeout_s: float = 2.0) -> socket.socket:
        raise NotImplementedError

    def statistics(self) -> Statistics:
        return Statistics()

    def failure(self) -> str | None:
        return self.why

    def end(self, why: str | None = None) -> None:
        """The guest powers off, or the machine fails."""
        self.why = why
        self._hang_up()

    def _hang_up(self) -> None:
        writer, self._writer = self._writer, -1  # the enclave's thread closes as soon as it sees the end
        if writer >= 0:
            os.close(writer)

    def close(self) -> None:
        self.closes += 1
        self._hang_up()
        self._cleanup.close()


class FakeCarrier:
    """``started`` gets each machine; ``go_on``, when cleared, holds starts up; ``error`` refuses them."""

    def __init__(self) -> None:
        self.made: list[FakeEnclave] = []
        self.started: queue.Queue[FakeEnclave] = queue.Queue()
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: BaseException | None = None

    def create(self, spec: LaunchSpec) -> FakeEnclave:
        self.made.append(FakeEnclave(self, spec))
        return self.made[-1]


class Lab:
    """A hypervisor over fake machines, and what a device would hear of it."""

    def __init__(self, directory: Path | None = None) -> None:
        self.memory = ParentMemory()
        self.carrier = FakeCarrier()
        self.switch = Switch()
        self.log: list[str] = []
        self.answers: queue.Queue[tuple[int, int]] = queue.Queue()
        self.ended: queue.Queue[int] = queue.Queue()
        self.host = Host(
            carrier=self.carrier,
            switch=self.switch,
            log=self.log.append,
            attestation_directory=directory,
            role="arn:aws:iam::123456789012:role/x" if directory else None,
            instance_id="i-0123456789abcdef0",
        )
        self.hypervisor = LabHypervisor(self.host, self.ended.put)

    def slot(self, uid: int, *, content: bytes | None = None) -> Slot:
        """In two ranges, the higher one first."""
        base = (uid - 1) * SIZE
        half = SIZE // 2
        return self.memory.slot(uid, [(base + half, half), (base, half)], image() if content is None else content)

    def start(self, slot: Slot, *, cid: int = 0, flags: int = 0) -> tuple[int, int]:
        """What the device is answered."""
        self.hypervisor.start(slot, cid, flags, lambda number, cid: self.answers.put((number, cid)))
        return self.answers.get(timeout=TIMEOUT_S)

    def close(self) -> None:
        self.carrier.go_on.set()
        self.hypervisor.close()
        self.switch.close()
        self.memory.close()
