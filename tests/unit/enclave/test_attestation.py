# SPDX-License-Identifier: Apache-2.0
"""Requests for documents on their way to init and back."""

from __future__ import annotations

from typing import Any

import pytest

from enclavekit.codec.init_frames import Attest, AttestationDocument, Frame
from enclavekit.enclave.attestation import MAX_WAITING, Attestation


@pytest.fixture
def sent() -> list[Frame]:
    return []


@pytest.fixture
def attestation(sent: list[Frame]) -> Attestation:
    made = Attestation(sent.append)
    made.greet(attests=True)
    return made


def test_one_at_a_time_in_turn(attestation: Attestation, sent: list[Frame]) -> None:
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []
    attestation.ask(b"1", first.append)
    attestation.ask(b"2", second.append)
    assert sent == [Attest(1, b"1")]
    attestation.take(AttestationDocument(9, b"stale"))
    assert (first, second) == ([], [])
    attestation.take(AttestationDocument(1, b"\x84\x44"))
    assert (first, second) == ([{"document": "8444"}], [])
    assert sent[1:] == [Attest(2, b"2")]
    attestation.take(AttestationDocument(2, None, "cannot open /dev/nsm: no such file or directory"))
    assert second == [{"error": "no document: cannot open /dev/nsm: no such file or directory"}]


def test_no_more_wait_than_are_bounded(attestation: Attestation, sent: list[Frame]) -> None:
    replies: list[dict[str, Any]] = []
    for _ in range(MAX_WAITING + 2):
        attestation.ask(b"n", replies.append)
    assert replies == [{"error": f"{MAX_WAITING} requests for documents wait already"}]
    assert len(sent) == 1
    attestation.end()
    assert replies[1:] == [{"error": "it has ended"}] * (MAX_WAITING + 1)


def test_an_image_that_has_not_opted_in() -> None:
    replies: list[dict[str, Any]] = []
    made = Attestation(lambda frame: pytest.fail(f"sent {frame}"))
    made.ask(b"n", replies.append)
    made.greet(attests=False)
    made.ask(b"n", replies.append)
    assert replies == [
        {"error": "its init does not answer: it is still booting, has ended, or is not enclavekit's"},
        {"error": "its image does not let the host ask for documents, which build --attest does"},
    ]
