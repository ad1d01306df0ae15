# SPDX-License-Identifier: Apache-2.0
"""virtio-vsock packet header: 44 bytes, little-endian, before any payload.

Source: virtio 1.2 §5.10.6; linux: include/uapi/linux/virtio_vsock.h.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

VIRTIO_ID_VSOCK = 19

VMADDR_CID_HOST = 2
PARENT_CID = 3
"""A parent instance as its enclaves see it."""

HEADER = Struct(
    "<"  #  little-endian, no padding
    "Q"  # 0x00 src_cid, upper half zero
    "Q"  # 0x08 dst_cid
    "I"  # 0x10 src_port
    "I"  # 0x14 dst_port
    "I"  # 0x18 len, bytes of payload that follow
    "H"  # 0x1c type
    "H"  # 0x1e op
    "I"  # 0x20 flags, of SHUTDOWN
    "I"  # 0x24 buf_alloc, bytes that the sender can buffer
    "I"  # 0x28 fwd_cnt, bytes that the sender has consumed, modulo 2^32
)
HEADER_SIZE = HEADER.size
CONFIG = Struct(
    "<Q"  # 0x0 guest_cid
)

TYPE_STREAM = 1
SHUTDOWN_RECEIVE = 1
"""The sender will receive no more."""
SHUTDOWN_SEND = 2
"""The sender will send no more."""
SHUTDOWN_BOTH = SHUTDOWN_RECEIVE | SHUTDOWN_SEND


class Op(IntEnum):
    """What a packet is for."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Address(NamedTuple):
    """One end of a connection."""

    cid: int
    port: int


class Header(NamedTuple):
    """A packet's header, field by field as on the wire. ``op`` may be a number that no ``Op`` has."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    @classmethod
    def parse(cls, data: memoryview | bytes) -> Header:
        """Of the first 44 bytes; there must be as many."""
        return tuple.__new__(cls, HEADER.unpack_from(data))  # a NamedTuple's own is slow

    def __bytes__(self) -> bytes:
        return HEADER.pack(*self)

    def reset(self) -> Header:
        """The RST that answers this packet, from whoever it was sent to."""
        return Header(self.dst_cid, self.src_cid, self.dst_port, self.src_port, 0, self.type, Op.RST, 0, 0, 0)
