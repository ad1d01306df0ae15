# SPDX-License-Identifier: Apache-2.0
"""Layouts of vfio-user messages, the commands that there are, and the limits that are told to the client.

Source: QEMU docs/interop/vfio-user.rst, linux: include/uapi/linux/vfio.h. All integers are little-endian. Each message
is a header, then what its command says; file descriptors come with the first byte. A reply has the id and the command
of its request.
"""

from __future__ import annotations

import json
from enum import IntEnum, IntFlag
from struct import Struct

HEADER = Struct(
    "<"  #  little-endian, no padding
    "H"  # 0x0 message id
    "H"  # 0x2 command
    "I"  # 0x4 size, bytes of the whole message
    "I"  # 0x8 flags
    "I"  # 0xc errno, of a reply with the flag ERROR
)
VERSION = Struct(
    "<"
    "H"  # 0x0 major
    "H"  # 0x2 minor; JSON follows, and a NUL
)
DMA_MAP = Struct(
    "<"
    "I"  # 0x00 argsz, bytes of this structure
    "I"  # 0x04 flags: DMA_READ, DMA_WRITE
    "Q"  # 0x08 offset in the file that comes along
    "Q"  # 0x10 address in the guest
    "Q"  # 0x18 size
)
DMA_UNMAP = Struct(
    "<"
    "I"  # 0x00 argsz
    "I"  # 0x04 flags: DMA_UNMAP_ALL
    "Q"  # 0x08 address in the guest
    "Q"  # 0x10 size
)
DEVICE_INFO = Struct(
    "<"
    "I"  # 0x0 argsz
    "I"  # 0x4 flags: DEVICE_RESET, DEVICE_PCI
    "I"  # 0x8 number of regions
    "I"  # 0xc number of interrupt kinds
)
REGION_INFO = Struct(
    "<"
    "I"  # 0x00 argsz
    "I"  # 0x04 flags: REGION_READABLE, REGION_WRITABLE
    "I"  # 0x08 index
    "I"  # 0x0c offset of capabilities, 0 for none
    "Q"  # 0x10 size
    "Q"  # 0x18 offset for mmap, 0
)
IRQ_INFO = Struct(
    "<"
    "I"  # 0x0 argsz
    "I"  # 0x4 flags: IRQ_EVENTFD
    "I"  # 0x8 index
    "I"  # 0xc number of vectors
)
SET_IRQS = Struct(
    "<"
    "I"  # 0x00 argsz
    "I"  # 0x04 flags: SetIrqs
    "I"  # 0x08 index
    "I"  # 0x0c first vector
    "I"  # 0x10 number of vectors
)
REGION_ACCESS = Struct(
    "<"
    "Q"  # 0x0 offset in the region
    "I"  # 0x8 region
    "I"  # 0xc number of bytes, which follow where they are written or were read
)

DMA_READ, DMA_WRITE = 1, 2
DMA_UNMAP_ALL = 2
DEVICE_RESET, DEVICE_PCI = 1, 2
REGION_READABLE, REGION_WRITABLE = 1, 2
IRQ_EVENTFD = 1

CONFIG_REGION = 7
REGIONS = 9
"""BARs 0 to 5, ROM, configuration space, VGA."""
MSIX_IRQ = 2
IRQS = 5
"""INTx, MSI, MSI-X, error, request."""

MAX_FDS = 8
MAX_DATA = 4096
"""Bytes of one access to a region: as large as any region of ours is."""
MAX_MESSAGE = HEADER.size + REGION_ACCESS.size + MAX_DATA
MAX_DMA_MAPS = 256
"""QEMU has fewer than 30 at a time."""

CAPABILITIES = (
    json.dumps(
        {
            "capabilities": {
                "max_msg_fds": MAX_FDS,
                "max_data_xfer_size": MAX_DATA,
                "max_dma_maps": MAX_DMA_MAPS,
                "pgsizes": 4096,
            }
        }
    ).encode()
    + b"\0"
)
"""Without ``write_multiple``, so that each write comes as a message of its own."""


class Flags(IntFlag):
    """Of a header. The lowest four bits are the type: 0 is a request."""

    REPLY = 0x01
    TYPE = 0x0F
    NO_REPLY = 0x10
    ERROR = 0x20


class SetIrqs(IntFlag):
    """What kind of data, and what is to be done."""

    DATA_NONE = 0x01
    DATA_EVENTFD = 0x04
    ACTION_TRIGGER = 0x20


class Command(IntEnum):
    """All that the protocol has from client to server; those without a handler get ENOTSUP."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
