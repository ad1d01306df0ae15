# SPDX-License-Identifier: Apache-2.0
"""The one contract that every carrier keeps: it mirrors the enclave fd of /dev/nitro_enclaves.

create → ask load offset → write image → donate memory → add vCPUs → start → heartbeat → (running) → ended → close
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

from enclavekit.eif import Discovery
from enclavekit.platform.machine import BootProtocol
from enclavekit.platform.rom import Boot
from enclavekit.virtio.backend import Network
from enclavekit.virtio.host_sockets import HostAddress
from enclavekit.virtio.nsm import Nsm


class ImageKind(IntEnum):
    """What is to be loaded (linux: NE_EIF_IMAGE in include/uapi/linux/nitro_enclaves.h)."""

    EIF = 1


class Mode(Enum):
    """Production shows nothing; debug gives a console, and on EC2 zeroes PCR0-2 and PCR8."""

    PRODUCTION = 0
    DEBUG = 1


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """Enclave memory that a carrier hands out to be written before the start.

    ``offset`` is where it begins in the enclave's memory as donated, in bytes; regions are in order, without gaps.
    """

    offset: int
    buffer: memoryview

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return len(self.buffer)


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """All that a carrier must know beforehand. Sizes in bytes."""

    enclave_id: str
    memory: int
    cpus: int
    image_size: int
    discovery: Discovery
    """How this image's kernel finds its devices."""
    directory: Path
    """The enclave's own directory, for its vsock sockets."""
    parent_directory: Path | None = None
    """Sockets of host programs that serve every enclave."""
    boot: BootProtocol = BootProtocol.EIF
    listen: Mapping[int, HostAddress] = field(default_factory=dict)
    """Where ports of the parent lead that the enclave dials."""
    publish: Sequence[tuple[HostAddress, int]] = ()
    """Ports of the host that lead to ports of the enclave."""
    cpu_list: frozenset[int] | None = None
    """The host's CPUs that it may run on; None for all."""
    cgroup: Path | None = None
    """The group of cgroup v2 to be made for it, with its limits."""
    network: Network | None = None
    """Who reaches it over vsock instead of this host's sockets; nobody answers its heartbeat then but who is there."""
    memory_fd: int | None = None
    """Its memory, filled already, where a carrier would make its own: a memfd of ``memory`` bytes, still the caller's,
    who writes to it no more."""
    nsm: Nsm | None = None
    """Its security module, where the carrier has a device for one; real enclaves have their own."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """``cpu_s`` seconds of CPU since the start, ``resident`` bytes of memory in use by the machine; open vsock
    ``connections``; bytes ``received`` from the enclave over vsock, and ``sent`` to it."""

    cpu_s: float = 0.0
    resident: int = 0
    connections: int = 0
    received: int = 0
    sent: int = 0


class Enclave(Protocol):
    """One enclave from creation to close."""

    def allocate(self, size: int) -> Sequence[MemoryRegion]:
        """Writable buffers that the carrier owns."""

    def image_load_offset(self, kind: ImageKind) -> int:
        """Where the image must start in enclave memory."""

    def set_user_memory_region(self, region: MemoryRegion) -> None:
        """Donate a region; it is not to be written any more."""

    def add_vcpu(self, cpu: int | None = None) -> int:
        """Add a CPU, any or a given one; returns its number."""

    def start(self, *, mode: Mode, cid: int | None = None) -> int:
        """Boot; returns the CID."""

    @property
    def cid(self) -> int:
        """What ``start`` returned."""

    def fileno(self) -> int:
        """Polls POLLHUP once the enclave has ended."""

    def heartbeat_fd(self) -> int:
        """Polls readable once init has sent its heartbeat and was answered."""

    def console(self) -> int | None:
        """Non-blocking fd of serial output, where the carrier gives one; it must be read on."""

    def connect(self, port: int, timeout_s: float = 2.0) -> socket.socket:
        """Connect to a vsock port of the enclave. Errors: ``EnclaveRefusedError``, ``EnclaveConnectionError``."""

    def statistics(self) -> Statistics:
        """What it uses now."""

    def failure(self) -> str | None:
        """What the carrier itself has to say against an end: None when the guest ended by its own doing."""

    def close(self) -> None:
        """Stop it, give memory and CPUs back. Twice does no harm."""


class Carrier(Protocol):
    """What makes enclaves."""

    def create(self, spec: LaunchSpec) -> Enclave:
        """A new one, without memory or CPUs. Errors: ``LaunchError``, ``CarrierError``, ``MissingError``."""


@runtime_checkable
class RomEnclave(Enclave, Protocol):
    """One whose machine starts in our ROM: its memory may be laid out by the host, for any boot protocol."""

    def boot(self) -> Boot:
        """What the ROM will say."""

    def enter(self, boot: Boot) -> None:
        """Say this instead. Before the start."""
