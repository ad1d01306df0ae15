# SPDX-License-Identifier: Apache-2.0
"""virtio-vsock packet header, 44 bytes, little-endian (virtio 1.2 §5.10.6)."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

HEADER = Struct(
    "<"  #  little-endian, no padding
    "Q"  # 0x00 src_cid
    "Q"  # 0x08 dst_cid
    "I"  # 0x10 src_port
    "I"  # 0x14 dst_port
    "I"  # 0x18 len, bytes of payload
    "H"  # 0x1c type
    "H"  # 0x1e op
    "I"  # 0x20 flags
    "I"  # 0x24 buf_alloc, bytes the sender can take in
    "I"  # 0x28 fwd_cnt, bytes the sender has consumed, modulo 2^32
)
HEADER_SIZE = HEADER.size
TYPE_STREAM = 1
MAX_PAYLOAD = 1 << 16
"""Linux sends no more in one packet (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE)."""


class Op(IntEnum):
    """What a packet is about."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Shutdown(IntFlag):
    """Flags of SHUTDOWN: what its sender will not do any more."""

    RECEIVE = 1
    SEND = 2


class Packet(NamedTuple):
    """A header's fields."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int = 0
    type: int = TYPE_STREAM
    op: int = Op.RST
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0

    def pack(self) -> bytes:
        """44 bytes."""
        return HEADER.pack(*self)
