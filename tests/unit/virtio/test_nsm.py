# SPDX-License-Identifier: Apache-2.0
"""The security module: every request, conformance with a real one's registers, and a driver that breaks the rules."""

from __future__ import annotations

import random
from collections.abc import Mapping
from hashlib import sha384
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.errors import FileError
from enclavekit.testing.virtio import MockQueue
from enclavekit.virtio.memory import GuestMemory, MemoryRegion
from enclavekit.virtio.nsm import MAX_RESPONSE, Nsm, NsmDevice, text_pcr

IMAGE = sha384(b"image").digest()
INSTANCE = "i-0123456789abcdef0"
MODULE = f"{INSTANCE}-enc0123456789abcdef"
ROLE = "arn:aws:iam::123456789012:role/parent"


class Signer:
    """Remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[int, bytes], dict[str, bytes | None]]] = []
        self.error: FileError | None = None

    def __call__(self, pcrs: Mapping[int, bytes], **options: bytes | None) -> bytes:
        if self.error is not None:
            raise self.error
        self.seen.append((dict(pcrs), options))
        return b"document"


@pytest.fixture
def signer() -> Signer:
    return Signer()


@pytest.fixture
def nsm(signer: Signer) -> Nsm:
    return Nsm(MODULE, {0: IMAGE, 3: text_pcr(ROLE), 4: text_pcr(INSTANCE)}, signer)


def ask(nsm: Nsm, request: object) -> Any:
    return cbor2.loads(nsm.answer(cbor2.dumps(request)))


def test_describe_nsm(nsm: Nsm) -> None:
    assert ask(nsm, "DescribeNSM") == {
        "DescribeNSM": {
            "version_major": 1, "version_minor": 0, "version_patch": 0, "module_id": MODULE, "max_pcrs": 32,
            "locked_pcrs": list(range(16)), "digest": "SHA384",
        }
    }  # fmt: skip


def test_pcrs_at_the_start(nsm: Nsm) -> None:
    assert ask(nsm, {"DescribePCR": {"index": 0}}) == {"DescribePCR": {"lock": True, "data": IMAGE}}
    assert ask(nsm, {"DescribePCR": {"index": 4}})["DescribePCR"]["data"] == (
        sha384(bytes(48) + INSTANCE.encode()).digest()
    )
    assert ask(nsm, {"DescribePCR": {"index": 16}}) == {"DescribePCR": {"lock": False, "data": bytes(48)}}


def test_registers_are_a_real_ones(nsm: Nsm) -> None:
    """Values that an NSM on EC2 gave for the same requests."""
    for index, data, expected in (
        (16, bytes.fromhex("0b00374863ff5c65"), "b33da05a0fdb71627c8c68fc4232281fc440edd6f0ac7467fa497bbb907db32d"),
        (16, bytes.fromhex("6566ff00172c4d"), "022db9572e340c6fe4ae1ea55fc665226932209b42dd8c42556000e913aea3ff"),
        (17, b"", "8f0d145c0368ad6b70be22e41c400eea91b971d96ba220fec9fae25a58dffdaa"),
        (17, bytes(513), "881f42f6a310bb0d4f37d9d75b038a9010d052f0f01a1aac8a34b38f573ba5e4"),
        (17, bytes(4000), "ffbb97ea3c03451254d8059cbec835359939342226cb7b672a4fba3f90c3bd34"),
        (17, "hello world", "f79d5c4d198d4d050ae118f0dbb9f24df932300db1c5c85ed85ddf3eacc2dc98"),
    ):
        answer = ask(nsm, {"ExtendPCR": {"index": index, "data": data}})
        assert answer["ExtendPCR"]["data"].hex()[:64] == expected


def test_random_is_as_the_kernels_driver_compares_it(nsm: Nsm) -> None:
    first, second = (nsm.answer(cbor2.dumps("GetRandom")) for _ in range(2))
    head = b"\xa1\x69GetRandom\xa1\x66random\x59\x01\x00"
    assert first.startswith(head)
    assert len(first) == len(second) == len(head) + 256
    assert first != second


def test_locking(nsm: Nsm) -> None:
    assert ask(nsm, {"LockPCR": {"index": 16}}) == "LockPCR"
    assert ask(nsm, {"LockPCR": {"index": 16}}) == {"Error": "ReadOnlyIndex"}
    assert ask(nsm, {"ExtendPCR": {"index": 16, "data": b"x"}}) == {"Error": "ReadOnlyIndex"}
    assert ask(nsm, {"LockPCR": {"index": 0}}) == {"Error": "ReadOnlyIndex"}
    assert ask(nsm, {"LockPCRs": {"range": 20}}) == "LockPCRs"
    assert ask(nsm, {"LockPCRs": {"range": 20}}) == "LockPCRs"
    assert ask(nsm, {"LockPCRs": {"range": 33}}) == {"Error": "InvalidIndex"}
    assert ask(nsm, "DescribeNSM")["DescribeNSM"]["locked_pcrs"] == list(range(20))


def test_a_document_has_the_locked_pcrs_and_what_was_given(nsm: Nsm, signer: Signer) -> None:
    ask(nsm, {"LockPCRs": {"range": 20}})
    request = {"Attestation": {"user_data": b"", "nonce": b"n" * 1024, "public_key": "text"}}
    assert ask(nsm, request) == {"Attestation": {"document": b"document"}}
    ((pcrs, options),) = signer.seen
    assert sorted(pcrs) == list(range(20))
    assert options == {"user_data": b"", "nonce": b"n" * 1024, "public_key": b"text"}


def test_what_is_not_given_is_null(nsm: Nsm, signer: Signer) -> None:
    ask(nsm, {"Attestation": {"nonce": None}})
    assert signer.seen[0][1] == {"user_data": None, "nonce": None, "public_key": None}


def test_a_document_that_cannot_be_signed(nsm: Nsm, signer: Signer) -> None:
    signer.error = FileError("no keys")
    assert ask(nsm, {"Attestation": {}}) == {"Error": "InternalError"}
    assert nsm.error is signer.error


@pytest.mark.parametrize(
    ("request_bytes", "error"),
    [
        (bytes.fromhex("ffffffff"), "InvalidOperation"),
        (b"", "InvalidOperation"),
        (cbor2.dumps("DescribeNSM") + b"\0", "InvalidOperation"),
        (cbor2.dumps("LockPCR"), "InvalidOperation"),
        (cbor2.dumps({"DescribeNSM": {}, "GetRandom": {}}), "InvalidOperation"),
        (cbor2.dumps({"Unknown": {}}), "InvalidOperation"),
        (cbor2.dumps({"DescribePCR": {"index": 32}}), "InvalidIndex"),
        (cbor2.dumps({"DescribePCR": {"index": 65535}}), "InvalidIndex"),
        (cbor2.dumps({"DescribePCR": {"index": 65536}}), "InvalidOperation"),
        (cbor2.dumps({"DescribePCR": {"index": -1}}), "InvalidOperation"),
        (cbor2.dumps({"DescribePCR": {"index": True}}), "InvalidOperation"),
        (cbor2.dumps({"DescribePCR": {}}), "InvalidOperation"),
        (cbor2.dumps({"ExtendPCR": {"index": 16}}), "InvalidOperation"),
        (cbor2.dumps({"ExtendPCR": {"index": 16, "data": 7}}), "InvalidOperation"),
        (cbor2.dumps({"Attestation": {"nonce": [1]}}), "InvalidOperation"),
        (b"\x81" * 4096, "InvalidOperation"),
        (cbor2.dumps(b"x" * 4096), "InputTooLarge"),
    ],
)
def test_what_is_no_request(nsm: Nsm, request_bytes: bytes, error: str) -> None:
    assert cbor2.loads(nsm.answer(request_bytes)) == {"Error": error}


@given(st.binary(max_size=200))
def test_any_bytes_get_an_answer(data: bytes) -> None:
    answer = Nsm(MODULE, {}, Signer()).answer(data)
    cbor2.loads(answer)
    assert len(answer) <= MAX_RESPONSE


class Rig:
    """The device over a queue that a driver fills as Linux does, or otherwise."""

    def __init__(self, nsm: Nsm, *, slot: int = 0x4000) -> None:
        self.view = memoryview(bytearray(1 << 20))
        self.memory = GuestMemory([MemoryRegion(0, self.view)])
        self.queue = MockQueue("nsm", self.view, 0, size=16, slot=slot)
        self.device = NsmDevice(nsm)
        self.device.start(0, self.queue.for_device(self.memory))

    def process(self) -> None:
        while self.device.process():
            pass


def test_two_chains_come_back_in_order_with_one_interrupt(nsm: Nsm) -> None:
    rig = Rig(nsm)
    request = rig.queue.add(readable=[cbor2.dumps("DescribeNSM")])
    rig.process()
    assert rig.queue.take_used() == []
    response = rig.queue.add(writable=[0x3000])
    rig.process()
    (first, nothing), (second, data) = rig.queue.take_used()
    assert (first, nothing, second) == (request, b"", response)
    assert "DescribeNSM" in cbor2.loads(data)
    assert rig.queue.interrupts == 1


def test_one_chain_for_both_and_many_pieces(nsm: Nsm) -> None:
    rig = Rig(nsm)
    data = cbor2.dumps("DescribeNSM")
    rig.queue.add(readable=[data[:3], data[3:]], writable=[10, 20, 0x3000], indirect=True)
    rig.process()
    ((_, written),) = rig.queue.take_used()
    assert written == nsm.answer(data)


@pytest.mark.parametrize(("room", "expected"), [(100, {"Error": "BufferTooSmall"}), (5, None)])
def test_a_response_without_room(nsm: Nsm, room: int, expected: object) -> None:
    rig = Rig(nsm)
    rig.queue.add(readable=[cbor2.dumps("GetRandom")])
    rig.queue.add(writable=[room])
    rig.process()
    written = rig.queue.take_used()[1][1]
    assert (cbor2.loads(written) if written else None) == expected


def test_a_request_of_too_many_bytes(nsm: Nsm) -> None:
    rig = Rig(nsm)
    rig.queue.add(readable=[bytes(0x4000), bytes(0x4000)])
    rig.queue.add(writable=[0x3000])
    rig.process()
    assert cbor2.loads(rig.queue.take_used()[1][1]) == {"Error": "InputTooLarge"}


def test_room_without_a_request_and_two_requests_break_the_device_until_it_starts_anew(nsm: Nsm) -> None:
    for first in (False, True):
        rig = Rig(nsm)
        if first:
            rig.queue.add(readable=[b"\xf6"])
            rig.queue.add(readable=[b"\xf6"])
        else:
            rig.queue.add(writable=[64])
        rig.process()
        assert rig.device.error is not None
        rig.queue.reset()
        rig.device.start(0, rig.queue.for_device(rig.memory))
        rig.queue.add(readable=[cbor2.dumps("GetRandom")], writable=[0x3000])
        rig.process()
        assert len(rig.queue.take_used()) == 1


def test_a_request_that_waits_is_available_again_after_a_stop(nsm: Nsm) -> None:
    rig = Rig(nsm)
    queue = rig.queue.for_device(rig.memory)
    rig.device.start(0, queue)
    rig.queue.add(readable=[cbor2.dumps("GetRandom")])
    rig.process()
    rig.device.stop(0)
    assert queue.base == 0
    assert not rig.device.process()


@pytest.mark.parametrize("seed", range(20))
def test_a_hostile_driver_harms_only_its_own_device(nsm: Nsm, seed: int) -> None:
    """Random descriptors over random requests: it answers or is broken, and writes where it may."""
    random_source = random.Random(seed)  # noqa: S311 - to be repeated
    rig = Rig(nsm, slot=0x1000)
    end = rig.queue.end
    guard = bytes(random_source.randbytes(256))
    rig.view[end : end + 256] = guard
    requests = [cbor2.dumps("GetRandom"), cbor2.dumps({"LockPCRs": {"range": 40}}), b"\xbf", b"\xff" * 64]
    for _ in range(300):
        if random_source.random() < 0.5:
            try:
                rig.queue.add(readable=[random_source.choice(requests)])
                rig.queue.add(writable=[random_source.choice([1, 16, 0x1000])])
            except ValueError:  # it has given all its descriptors away
                rig.queue.reset()
                rig.device.start(0, rig.queue.for_device(rig.memory))
        else:
            index = random_source.randrange(16)
            rig.queue.describe(
                index,
                random_source.choice([rig.queue.buffer_gpa(index), 1 << 40, (1 << 64) - 1]),
                random_source.choice([0, 1, 0x1000]),
                random_source.randrange(8),
                random_source.randrange(20),
            )
            rig.queue.offer(random_source.randrange(20))
        rig.process()
        if rig.device.error is not None:
            rig.queue.reset()
            rig.device.start(0, rig.queue.for_device(rig.memory))
    assert bytes(rig.view[end : end + 256]) == guard
