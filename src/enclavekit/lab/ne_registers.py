# SPDX-License-Identifier: Apache-2.0
"""Layouts of the Nitro Enclaves PCI device: configuration space, registers, commands. All integers are little-endian.

Source: linux: drivers/virt/nitro_enclaves/ne_pci_dev.h; the identity was seen on EC2.
Which BAR has the MSI-X table is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

# Configuration space

VENDOR_ID, DEVICE_ID = 0x1D0F, 0xE4C1
REVISION = 1
CLASS = 0x0780
"""Communication controller, other."""
PCI_STATUS_CAP_LIST = 0x0010
CONFIG_SIZE = 256
HEADER = Struct(
    "<"  #  little-endian, no padding
    "H"  # 0x00 vendor
    "H"  # 0x02 device
    "H"  # 0x04 command
    "H"  # 0x06 status
    "B"  # 0x08 revision
    "B"  # 0x09 programming interface
    "H"  # 0x0a class
    "4x"  # 0x0c cache line, latency, header type 0, self-test
    "24x"  # 0x10 BARs: 32 bits wide, memory
    "4x"  # 0x28 CardBus
    "H"  # 0x2c subsystem vendor
    "H"  # 0x2e subsystem
    "4x"  # 0x30 ROM
    "B"  # 0x34 first capability
    "11x"  # 0x35 the rest, and no interrupt pin
)
COMMAND_OFFSET = 0x04
MSIX_OFFSET = 0x40
MSIX = Struct(
    "<"
    "B"  # 0x0 0x11
    "B"  # 0x1 next capability
    "H"  # 0x2 vectors - 1; bit 15 enables, bit 14 masks all
    "I"  # 0x4 offset of the table, and its BAR
    "I"  # 0x8 offset of the pending bits, and their BAR
)
MSIX_ID = 0x11
MSIX_CONTROL_HIGH = MSIX_OFFSET + 3
MSIX_BAR, MSIX_BAR_SIZE = 0, 4096
MSIX_TABLE, MSIX_PENDING = 0x000, 0x800
VECTORS = 2
REPLY_VECTOR, EVENT_VECTOR = 0, 1

# BAR 3

REGISTER_BAR, REGISTER_BAR_SIZE = 3, 4096
NE_ENABLE = 0x000
"""1 byte, read and write: 1 is on."""
NE_VERSION = 0x002
"""2 bytes, read and write: what is read is what was accepted."""
NE_COMMAND = 0x004
"""4 bytes, write: does it."""
NE_EVTCNT = 0x00C
"""4 bytes, read: replies so far in the low half, events in the high one."""
NE_SEND_DATA = 0x010
"""240 bytes, read and write: the request."""
NE_RECV_DATA = 0x100
"""240 bytes, read: the reply."""
DATA_SIZE = 240
VERSION_MAX = 1


class Command(IntEnum):
    """What is written to NE_COMMAND."""

    ENCLAVE_START = 1
    ENCLAVE_GET_SLOT = 2
    ENCLAVE_STOP = 3
    SLOT_ALLOC = 4
    SLOT_FREE = 5
    SLOT_ADD_MEM = 6
    SLOT_ADD_VCPU = 7
    SLOT_COUNT = 8
    NEXT_SLOT = 9
    SLOT_INFO = 10
    SLOT_ADD_BULK_VCPUS = 11


START = Struct(
    "<"
    "Q"  # 0x00 slot
    "Q"  # 0x08 CID, 0 for any
    "Q"  # 0x10 flags
)
BY_CID = Struct("<Q")  # 0x0 CID
BY_SLOT = Struct("<Q")  # 0x0 slot
NOTHING = Struct("")
"""One byte is written, and means nothing."""
ADD_MEM = Struct(
    "<"
    "Q"  # 0x00 slot
    "Q"  # 0x08 address in the parent, guest physical
    "Q"  # 0x10 size, bytes
)
ADD_VCPU = Struct(
    "<"
    "Q"  # 0x0 slot
    "I"  # 0x8 the parent's number of the CPU
    "4x"  # 0xc
)
ADD_BULK_VCPUS = Struct(
    "<"
    "Q"  # 0x0 slot
    "Q"  # 0x8 how many
)
REQUESTS: dict[Command, Struct] = {
    Command.ENCLAVE_START: START,
    Command.ENCLAVE_GET_SLOT: BY_CID,
    Command.ENCLAVE_STOP: BY_SLOT,
    Command.SLOT_ALLOC: NOTHING,
    Command.SLOT_FREE: BY_SLOT,
    Command.SLOT_ADD_MEM: ADD_MEM,
    Command.SLOT_ADD_VCPU: ADD_VCPU,
    Command.SLOT_COUNT: NOTHING,
    Command.NEXT_SLOT: BY_SLOT,
    Command.SLOT_INFO: BY_SLOT,
    Command.SLOT_ADD_BULK_VCPUS: ADD_BULK_VCPUS,
}


@dataclass(frozen=True, slots=True)
class Reply:
    """72 bytes: the answer to any command. ``rc`` is 0 or a negative errno."""

    rc: int = 0
    slot_uid: int = 0
    enclave_cid: int = 0
    slot_count: int = 0
    mem_regions: int = 0
    mem_size: int = 0
    nr_vcpus: int = 0
    flags: int = 0
    state: int = 0

    def __bytes__(self) -> bytes:
        return REPLY.pack(
            self.rc,
            self.slot_uid,
            self.enclave_cid,
            self.slot_count,
            self.mem_regions,
            self.mem_size,
            self.nr_vcpus,
            self.flags,
            self.state,
        )

    @classmethod
    def parse(cls, data: bytes) -> Reply:
        """As a driver reads it."""
        return cls(*REPLY.unpack(data))


REPLY = Struct(
    "<"
    "i"  # 0x00 rc
    "4x"  # 0x04
    "Q"  # 0x08 slot
    "Q"  # 0x10 CID
    "Q"  # 0x18 number of slots
    "Q"  # 0x20 memory regions: of SLOT_ALLOC the limit, of SLOT_INFO how many there are
    "Q"  # 0x28 memory, bytes
    "Q"  # 0x30 number of vCPUs
    "Q"  # 0x38 flags
    "H"  # 0x40 state
    "6x"  # 0x42
)


def config_space() -> bytes:
    """256 bytes, as after power-on."""
    header = HEADER.pack(
        VENDOR_ID, DEVICE_ID, 0, PCI_STATUS_CAP_LIST, REVISION, 0, CLASS, VENDOR_ID, DEVICE_ID, MSIX_OFFSET
    )
    msix = MSIX.pack(MSIX_ID, 0, VECTORS - 1, MSIX_TABLE | MSIX_BAR, MSIX_PENDING | MSIX_BAR)
    return (header + msix).ljust(CONFIG_SIZE, b"\0")
