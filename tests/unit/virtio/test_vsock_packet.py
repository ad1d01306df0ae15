# SPDX-License-Identifier: Apache-2.0
"""Packet header: layout, and the answer to a stranger."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enclavekit.virtio.vsock_packet import HEADER, Header, Op

KNOWN = bytes.fromhex(
    "1000000000000000"  # src_cid 16
    "0300000000000000"  # dst_cid 3
    "00040000"  # src_port 1024
    "28230000"  # dst_port 9000
    "05000000"  # len 5
    "0100"  # stream
    "0500"  # RW
    "00000000"  # flags
    "00000400"  # buf_alloc 256 KiB
    "07000000"  # fwd_cnt 7
)


def test_a_known_header() -> None:
    header = Header(16, 3, 1024, 9000, 5, 1, Op.RW, 0, 256 * 1024, 7)
    assert Header.parse(KNOWN) == header
    assert bytes(header) == KNOWN
    assert HEADER.size == 44


@given(st.binary(min_size=44, max_size=44))
def test_parse_and_bytes_are_inverses(data: bytes) -> None:
    assert bytes(Header.parse(data)) == data


def test_the_reset_goes_back_where_the_packet_came_from() -> None:
    assert Header.parse(KNOWN).reset() == Header(3, 16, 9000, 1024, 0, 1, Op.RST, 0, 0, 0)
