# SPDX-License-Identifier: Apache-2.0
"""Layouts of vhost-user messages, and those that are understood.

Source: QEMU docs/interop/vhost-user.rst. All integers are in the machine's order: little-endian here. Each message is
a header, then ``size`` bytes of payload; file descriptors come with the header.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

HEADER = Struct(
    "<"  #  little-endian, no padding
    "I"  # 0x0 request
    "I"  # 0x4 flags
    "I"  # 0x8 size, bytes of payload
)
U64 = Struct("<Q")
VRING_STATE = Struct(
    "<"
    "I"  # 0x0 index
    "I"  # 0x4 num
)
VRING_ADDRESS = Struct(
    "<"
    "I"  # 0x00 index
    "I"  # 0x04 flags
    "Q"  # 0x08 descriptor table, address in the front-end
    "Q"  # 0x10 used ring
    "Q"  # 0x18 available ring
    "Q"  # 0x20 log, guest physical
)
MEMORY_TABLE = Struct(
    "<"
    "I"  # 0x0 number of regions
    "I"  # 0x4 padding
)
MEMORY_REGION = Struct(
    "<"
    "Q"  # 0x00 guest address
    "Q"  # 0x08 size
    "Q"  # 0x10 user address, in the front-end
    "Q"  # 0x18 offset in the file
)
CONFIG_HEADER = Struct(
    "<"
    "I"  # 0x0 offset
    "I"  # 0x4 size
    "I"  # 0x8 flags
)

VERSION_MASK = 0x3
VERSION = 0x1
REPLY = 0x4
NEED_REPLY = 0x8

VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
PROTOCOL_F_MQ = 1 << 0
PROTOCOL_F_REPLY_ACK = 1 << 3
PROTOCOL_F_CONFIG = 1 << 9
PROTOCOL_FEATURES = PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG

VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 0x100

MAX_REGIONS = 8
MAX_CONFIG = 256
MAX_PAYLOAD = MEMORY_TABLE.size + MAX_REGIONS * MEMORY_REGION.size
MAX_FDS = 32
"""More than any message has, so that too many are seen and closed."""


class Request(IntEnum):
    """Messages that are understood; all others were not offered."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
