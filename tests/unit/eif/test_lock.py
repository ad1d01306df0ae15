# SPDX-License-Identifier: Apache-2.0
"""The lock file: its bytes, what has moved, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from enclavekit.eif import Input, Lock
from enclavekit.errors import FormatError

A, B = "sha256:" + "a" * 64, "sha384:" + "b" * 96
LOCK = Lock(
    "0.1.0",
    1700000000,
    (Input("image", "docker://a/b:1", A), Input("kernel", "6.12.1", B)),
    {"PCR0": "0" * 96, "PCR1": "1" * 96, "PCR2": "2" * 96},
)


def test_the_file() -> None:
    assert json.loads(LOCK.encode()) == {
        "schema": 1,
        "toolkit": "0.1.0",
        "epoch": 1700000000,
        "inputs": [
            {"name": "image", "what": "docker://a/b:1", "digest": A},
            {"name": "kernel", "what": "6.12.1", "digest": B},
        ],
        "measurements": {"PCR0": "0" * 96, "PCR1": "1" * 96, "PCR2": "2" * 96},
    }
    assert Lock.parse(LOCK.encode().encode()) == LOCK


def test_what_has_moved() -> None:
    assert LOCK.moved(LOCK) == []
    now = Lock("0.2.0", 5, (Input("image", "docker://a/b:2", B), Input("init", "", A)), {})
    assert LOCK.moved(now) == [
        "enclavekit: locked 0.1.0, now 0.2.0",
        "build time: locked 1700000000, now 5",
        "image: locked docker://a/b:1 (sha256:aaaaaaaaaaaaaaaa…), now docker://a/b:2 (sha384:bbbbbbbbbbbbbbbb…)",
        "kernel: locked 6.12.1 (sha384:bbbbbbbbbbbbbbbb…), now none",
        "init: locked none, now sha256:aaaaaaaaaaaaaaaa…",
    ]
    # A name is only a name: what counts is the digest.
    assert LOCK.moved(replace(LOCK, inputs=(Input("image", "oci", A), Input("kernel", "other", B)))) == []


def test_measurements_that_both_have() -> None:
    assert LOCK.moved_measurements({"PCR0": "0" * 96, "PCR8": "8" * 96}) == []
    assert LOCK.moved_measurements({"PCR0": "f" * 96}) == ["PCR0: locked 0000000000000000…, now ffffffffffffffff…"]


def changed(**values: Any) -> bytes:
    return json.dumps({**json.loads(LOCK.encode()), **values}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "lock: no JSON"),
        (b"[" * 100_000, "lock: no JSON"),
        (b"[]", "lock: schema None, expected 1"),
        (changed(schema=2), "lock: schema 2, expected 1"),
        (changed(toolkit=1), "lock: toolkit is int, expected str"),
        (changed(toolkit="a\nb"), "lock: toolkit 'a\\nb': expected one line of at most 4096 characters"),
        (changed(epoch=True), "lock: epoch is bool, expected int"),
        (changed(epoch=-1), "lock: epoch -1, expected seconds from 0 to 4294967295"),
        (changed(inputs={}), "lock: inputs is dict, expected list"),
        (changed(inputs=[1]), "lock: an input that is int, expected an object"),
        (changed(inputs=[{}] * 1025), "lock: 1025 inputs, expected at most 1024"),
        (
            changed(inputs=[{"name": "a", "what": "", "digest": "sha256:0"}]),
            "lock: digest 'sha256:0', expected sha256: or sha384: and hexadecimal digits",
        ),
        (
            changed(measurements={"PCR9": "0" * 96}),
            "lock: measurement 'PCR9': expected PCR0, PCR1, PCR2, PCR8, in hexadecimal",
        ),
        (
            changed(measurements={"PCR0": "0" * 95}),
            "lock: measurement 'PCR0': expected PCR0, PCR1, PCR2, PCR8, in hexadecimal",
        ),
        (bytes((1 << 20) + 1), "lock: more than 1048576 bytes"),
    ],
)
def test_what_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        Lock.parse(data)
    assert caught.value.message == message
