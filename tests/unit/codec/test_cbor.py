# SPDX-License-Identifier: Apache-2.0
"""CBOR from hostile hands."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.codec import cbor
from enclavekit.errors import FormatError

JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=20) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@given(JSON_LIKE)
def test_what_is_encoded_is_decoded(value: object) -> None:
    assert cbor.decode(cbor.encode(value), "test", max_depth=64) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    try:
        value = cbor.decode(data, "test")
    except FormatError as error:
        assert error.message.startswith("test: ")  # noqa: PT017 - either outcome is right
    else:
        assert cbor.decode(data, "again") == value or value != value


def test_indefinite_lengths() -> None:
    assert cbor.decode(bytes.fromhex("9f0102ff"), "x") == [1, 2]
    assert cbor.decode(bytes.fromhex("bf616101ff"), "x") == {"a": 1}
    assert cbor.decode(bytes.fromhex("5f41014102ff"), "x") == b"\1\2"


# What stands behind the colon is cbor2's; where it is not ours to know, it is left out.
NOT_EXPECTED = "x: not the CBOR expected: "


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", NOT_EXPECTED),
        ("8201", NOT_EXPECTED),
        ("1c", NOT_EXPECTED),
        ("81818181 00", NOT_EXPECTED),
        ("0000", "x: 1 bytes after the CBOR item, expected none"),
        ("c100", NOT_EXPECTED + "a tag"),
        ("d81c00", NOT_EXPECTED + "a tag"),
        ("d82363612b2b", NOT_EXPECTED + "a tag"),
        ("d9ffff00", NOT_EXPECTED + "a tag"),
    ],
)
def test_refusals(data: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        cbor.decode(bytes.fromhex(data), "x", max_depth=3)
    assert caught.value.message.startswith(message)


def test_duplicate_keys_are_refused() -> None:
    for data in ("a201020103", "a2616101616102", "bf616101616102ff", "a20102180103"):
        with pytest.raises(FormatError, match="duplicate"):
            cbor.decode(bytes.fromhex(data), "x")


def test_no_tag_gets_through() -> None:
    through = []
    for tag in (*range(70000), 2**32 - 1, 2**63):
        try:
            cbor.decode(b"\xdb" + struct.pack(">Q", tag) + b"\x00", "x")
        except FormatError:
            continue
        through.append(tag)
    assert through == []


@pytest.mark.parametrize("head", ["9affffffff", "9bffffffffffffffff", "5bffffffffffffffff", "bbffffffffffffffff"])
def test_lengths_that_lie_take_no_memory(head: str) -> None:
    with pytest.raises(FormatError):
        cbor.decode(bytes.fromhex(head), "x")
