# SPDX-License-Identifier: Apache-2.0
"""The hypervisor behind the device, over a parent's true memfd and machines that are descriptors only."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cbor2
import pytest
from fake_machines import MIB, SIZE, TIMEOUT_S, FakeEnclave, Lab, image

from enclavekit import eif
from enclavekit.errors import CarrierError, UsageError
from enclavekit.hypervisor.contract import Mode
from enclavekit.lab.hypervisor import FIRST_CID, LabHypervisor
from enclavekit.lab.slots import DonatedRange, Slot
from enclavekit.signing.certificate import self_signed
from enclavekit.signing.pem import PemSigner
from enclavekit.testing.vsock_guest import MockGuest
from enclavekit.virtio.nsm import INSTANCE_PCR, ROLE_PCR, text_pcr
from enclavekit.virtio.vsock_packet import PARENT_CID, Op


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path / "authority")
    yield lab
    lab.close()


def booted(lab: Lab, slot: Slot, *, flags: int = 0) -> FakeEnclave:
    assert lab.start(slot, flags=flags)[0] == 0
    return lab.carrier.started.get(timeout=TIMEOUT_S)


def pcr(enclave: FakeEnclave, index: int) -> bytes:
    """As its security module tells it."""
    assert enclave.spec.nsm is not None
    data = cbor2.loads(enclave.spec.nsm.answer(cbor2.dumps({"DescribePCR": {"index": index}})))["DescribePCR"]["data"]
    assert isinstance(data, bytes)
    return data


def empty(memory: bytes) -> bool:
    return memory.count(0) == len(memory)


def contents(enclave: FakeEnclave) -> bytes:
    return os.pread(enclave.memory_fd, SIZE, 0)


# Memory


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_memory_is_gathered_in_the_order_of_donation(lab: Lab, order: tuple[int, ...]) -> None:
    pieces = [(64 * MIB, 10 * MIB), (200 * MIB, 6 * MIB), (2 * MIB, 48 * MIB)]
    slot = lab.memory.slot(1, [pieces[index] for index in order], image())
    assert contents(booted(lab, slot)) == bytes(8 * MIB) + image() + bytes(SIZE - 8 * MIB - len(image()))


def test_an_image_in_single_huge_pages_that_lie_backwards(lab: Lab) -> None:
    content = image(ramdisk=os.urandom(5 * MIB))
    slot = lab.memory.slot(1, [(offset, 2 * MIB) for offset in range(62 * MIB, -1, -2 * MIB)], content)
    assert contents(booted(lab, slot))[8 * MIB :].startswith(content)


def test_nothing_comes_along_but_the_image(lab: Lab) -> None:
    slot = lab.slot(1)
    for one in slot.memory:
        os.pwrite(lab.memory.fd, b"unmeasured", one.offset + 12 * MIB)
    os.pwrite(lab.memory.fd, b"unmeasured", slot.memory[0].offset)
    assert b"unmeasured" not in contents(booted(lab, slot))


def test_the_parent_no_longer_sees_what_it_gave_and_the_enclave_nothing_that_the_parent_writes(lab: Lab) -> None:
    slot = lab.slot(1)
    used = lab.memory.used
    assert used >= len(image())
    enclave = booted(lab, slot)
    assert lab.memory.used < used
    assert empty(lab.memory.read(slot))
    os.pwrite(lab.memory.fd, b"parent" * 1000, slot.memory[0].offset)
    os.pwrite(enclave.memory_fd, b"secret" * 1000, 0)
    assert b"parent" not in contents(enclave)
    assert b"secret" not in lab.memory.read(slot)


def test_memory_comes_back_zeroed(lab: Lab) -> None:
    slot = lab.slot(1)
    booted(lab, slot)
    os.pwrite(lab.memory.fd, b"left by the parent", slot.memory[0].offset)
    lab.hypervisor.stop(slot)
    assert not empty(lab.memory.read(slot))
    lab.hypervisor.free(slot)
    assert empty(lab.memory.read(slot))
    assert lab.memory.used == 0


def test_other_memory_of_the_parent_is_left_alone(lab: Lab) -> None:
    slot = lab.memory.slot(1, [(4 * MIB, SIZE)], image())
    os.pwrite(lab.memory.fd, b"below", 4 * MIB - 5)
    os.pwrite(lab.memory.fd, b"above", 4 * MIB + SIZE)
    booted(lab, slot)
    lab.hypervisor.free(slot)
    assert os.pread(lab.memory.fd, 5, 4 * MIB - 5) == b"below"
    assert os.pread(lab.memory.fd, 5, 4 * MIB + SIZE) == b"above"


# Images


def damaged(at: int) -> bytes:
    data = bytearray(image())
    data[at] ^= 1
    return bytes(data)


def resized() -> bytes:
    """The last section's size, in table and section header, far beyond the memory."""
    data = bytearray(image())
    data[0x11C + 3 * 8 : 0x11C + 4 * 8] = (1 << 40).to_bytes(8, "big")
    return bytes(data)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", r"EIF header: magic b'\x00\x00\x00\x00', expected b'.eif'"),
    "magic": (lambda: damaged(0), "EIF header: magic b'/eif', expected b'.eif'"),
    "version": (lambda: damaged(4), "EIF header: version 260, expected 2, 3 or 4"),
    "size": (resized, "EIF header: sections end at 0x10000000"),
    "content": (lambda: damaged(-1), "image checksum: got 0x"),
    "architecture": (lambda: image(arch=eif.Arch.AARCH64), "image for aarch64, expected x86_64, as this machine is"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_does_not_start_and_stays_where_it_is(lab: Lab, kind: str) -> None:
    make, why = REFUSED[kind]
    content = make()
    slot = lab.slot(1, content=content)
    assert lab.start(slot) == (-errno.EINVAL, 0)
    assert lab.log[0].startswith(f"enclave 16 does not start: {why}")
    assert os.pread(lab.memory.fd, len(content), slot.memory[0].offset + 8 * MIB) == content
    assert lab.carrier.made == []


def signed(first: datetime, *, of: bytes = b"") -> bytes:
    key = PemSigner.generate("P-256")
    certificate = self_signed(key, common_name="x", first=first, days=10)
    return image(sign=lambda measured: bytes(eif.sign(of or measured.pcr0, certificate, key)))


def test_a_signature_that_holds_is_measured(lab: Lab) -> None:
    assert any(pcr(booted(lab, lab.slot(1, content=signed(datetime.now(UTC)))), 8))


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: signed(datetime.now(UTC) - timedelta(days=20)), "certificate: valid from "),
        (lambda: signed(datetime.now(UTC), of=bytes(48)), "signature: for an image with PCR0 0000000000000000..."),
    ],
    ids=["expired", "of another image"],
)
def test_a_signature_that_does_not_hold(lab: Lab, made: Callable[[], bytes], why: str) -> None:
    assert lab.start(lab.slot(1, content=made())) == (-errno.EINVAL, 0)
    assert lab.log[0].startswith(f"enclave 16 does not start: {why}")


def test_memory_that_is_too_little_for_the_image(lab: Lab) -> None:
    slot = lab.memory.slot(1, [(0, 32 * MIB)], image())
    assert lab.start(slot) == (-errno.ENOMEM, 0)
    assert lab.log == ["enclave 16 does not start: memory: got 32 MiB, this image needs at least 64 MiB"]


def test_memory_that_ends_before_the_image_begins(lab: Lab) -> None:
    assert lab.start(lab.memory.slot(1, [(0, 2 * MIB)], b""))[0] == -errno.EINVAL


# What the enclave gets


def test_the_machine_is_as_the_slot_was(lab: Lab) -> None:
    slot = lab.slot(1)
    slot.cpus = [2, 3]
    enclave = booted(lab, slot)
    assert (enclave.donated, enclave.cpus, enclave.cid, enclave.mode) == (SIZE, 2, 16, Mode.PRODUCTION)
    assert enclave.spec.image_size == len(image())
    assert enclave.spec.enclave_id == f"{1:016x}"
    pcr0 = lab.log[0].split()[-1]
    assert lab.log == [f"enclave 16 started: 64 MiB, 2 CPUs, PCR0 {pcr0}"]


@pytest.mark.parametrize("flags", [0, 1])
def test_its_security_module_tells_of_image_and_parent(lab: Lab, flags: int) -> None:
    enclave = booted(lab, lab.slot(1), flags=flags)
    told = lab.log[0].split("PCR0 ")[1][:96]
    assert pcr(enclave, 0).hex() == ("0" * 96 if flags else told)
    assert any(pcr(enclave, 1)) == any(pcr(enclave, 2)) == (not flags)
    assert pcr(enclave, INSTANCE_PCR) == text_pcr("i-0123456789abcdef0")
    assert pcr(enclave, ROLE_PCR) == text_pcr("arn:aws:iam::123456789012:role/x")
    assert enclave.spec.nsm is not None
    assert enclave.spec.nsm.module_id == f"i-0123456789abcdef0-enc{1:016x}"


def test_without_an_authority_there_is_no_security_module() -> None:
    lab = Lab()
    assert booted(lab, lab.slot(1)).spec.nsm is None
    lab.close()


def test_an_instance_id_that_is_none() -> None:
    lab = Lab()
    host = type(lab.host)(lab.carrier, lab.switch, lab.log.append, instance_id="mine")
    with pytest.raises(UsageError):
        LabHypervisor(host, lab.ended.put)
    lab.close()


# CIDs


def test_cids_count_up(lab: Lab) -> None:
    for cid in (16, 17, 18):
        slot = lab.slot(1)
        assert lab.start(slot) == (0, cid)
        lab.hypervisor.free(slot)


def test_a_cid_may_be_chosen_and_is_one_enclaves(lab: Lab) -> None:
    assert lab.start(lab.slot(1), cid=16) == (0, 16)
    assert lab.start(lab.slot(2)) == (0, 17)
    assert lab.start(lab.slot(3), cid=17) == (-errno.EBUSY, 0)
    assert lab.start(lab.slot(3), cid=4) == (0, 4)


@pytest.mark.parametrize("cid", [1, 2, 3, 0xFFFF_FFFF, 1 << 32, (1 << 64) - 1])
def test_cids_that_no_enclave_can_have(lab: Lab, cid: int) -> None:
    assert lab.start(lab.slot(1), cid=cid) == (-errno.EINVAL, 0)
    assert lab.log == [f"slot 0x1 does not start: an enclave cannot have cid {cid}"]


def test_four_enclaves_and_not_one_more(lab: Lab) -> None:
    assert [lab.start(lab.slot(uid))[0] for uid in range(1, 6)] == [0, 0, 0, 0, -errno.ENOMEM]


def test_a_slot_that_runs_is_not_started_again(lab: Lab) -> None:
    slot = lab.slot(1)
    assert lab.start(slot)[0] == 0
    assert lab.start(slot) == (-errno.EBUSY, 0)


# Ends


def test_an_end_is_told_once_and_nothing_is_left(lab: Lab) -> None:
    slot = lab.slot(1)
    enclave = booted(lab, slot)
    enclave.end()
    assert lab.ended.get(timeout=TIMEOUT_S) == 1
    assert enclave.closes == 1
    assert lab.log[1:] == ["enclave 16 ended"]
    lab.hypervisor.stop(slot)
    lab.hypervisor.free(slot)
    assert lab.ended.empty()
    assert lab.start(lab.slot(1)) == (0, FIRST_CID + 1)


def test_why_a_machine_failed_is_said(lab: Lab) -> None:
    booted(lab, lab.slot(1)).end("QEMU was killed by signal 9")
    assert lab.ended.get(timeout=TIMEOUT_S) == 1
    assert lab.log[1:] == ["enclave 16 ended: QEMU was killed by signal 9"]


def test_one_that_is_stopped_did_not_end_by_itself(lab: Lab) -> None:
    slot = lab.slot(1)
    enclave = booted(lab, slot)
    lab.hypervisor.stop(slot)
    assert enclave.closes == 1
    lab.hypervisor.free(slot)
    assert lab.ended.empty()


def test_one_ends_and_the_other_runs_on(lab: Lab) -> None:
    first, second = booted(lab, lab.slot(1)), booted(lab, lab.slot(2))
    assert (first.cid, second.cid) == (16, 17)
    first.end()
    assert lab.ended.get(timeout=TIMEOUT_S) == 1
    assert second.closes == 0


def test_a_parent_that_goes_takes_all_with_it(lab: Lab) -> None:
    enclaves = [booted(lab, lab.slot(uid)) for uid in (1, 2)]
    lab.hypervisor.close()
    lab.hypervisor.close()
    assert [enclave.closes for enclave in enclaves] == [1, 1]
    assert lab.ended.empty()
    assert lab.start(lab.slot(3))[0] == -errno.ENOMEM


def test_a_carrier_that_fails(lab: Lab) -> None:
    lab.carrier.error = CarrierError("cannot run QEMU")
    assert lab.start(lab.slot(1)) == (-errno.EINVAL, 0)
    assert lab.log == ["enclave 16 does not start: cannot run QEMU"]
    assert lab.carrier.made[0].closes == 1


def test_a_bug_is_answered_and_said_too(lab: Lab) -> None:
    lab.carrier.error = ZeroDivisionError("a bug")
    slot = lab.slot(1)
    assert lab.start(slot) == (-errno.EIO, 0)
    lab.hypervisor.free(slot)
    lab.hypervisor.close()
    assert lab.log == ["enclave 16: ZeroDivisionError('a bug')"]


def test_without_another_thread_it_does_not_start_and_leaves_its_place(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    slot = lab.slot(1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        assert [lab.start(slot) for _ in range(5)] == [(-errno.EAGAIN, 0)] * 5
    assert lab.log == ["slot 0x1 does not start: this machine gives no more threads"] * 5
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    lab.hypervisor.stop(slot)
    assert lab.start(slot)[0] == 0
    assert lab.ended.empty()


def test_freed_while_it_boots(lab: Lab) -> None:
    """The parent has its pages back at once, and they are not touched any more; the machine goes when it can."""
    lab.carrier.go_on.clear()
    slot = lab.slot(1)
    lab.hypervisor.start(slot, 0, 0, lambda number, cid: lab.answers.put((number, cid)))
    enclave = lab.carrier.started.get(timeout=TIMEOUT_S)
    lab.hypervisor.free(slot)
    os.pwrite(lab.memory.fd, b"the parent's again", slot.memory[0].offset)
    with pytest.raises(queue.Empty):
        lab.answers.get_nowait()
    lab.carrier.go_on.set()
    assert lab.answers.get(timeout=TIMEOUT_S) == (0, 16)
    lab.hypervisor.close()
    assert enclave.closes == 1
    assert lab.ended.empty()
    assert lab.memory.read(slot).startswith(b"the parent's again")


def test_two_boot_at_once(lab: Lab) -> None:
    lab.carrier.go_on.clear()
    for uid in (1, 2):
        lab.hypervisor.start(lab.slot(uid), 0, 0, lambda number, cid: lab.answers.put((number, cid)))
    assert {lab.carrier.started.get(timeout=TIMEOUT_S).cid for _ in range(2)} == {16, 17}
    lab.carrier.go_on.set()
    assert {lab.answers.get(timeout=TIMEOUT_S) for _ in range(2)} == {(0, 16), (0, 17)}


def test_a_parent_that_goes_while_one_boots(lab: Lab) -> None:
    lab.carrier.go_on.clear()
    lab.hypervisor.start(lab.slot(1), 0, 0, lambda number, cid: lab.answers.put((number, cid)))
    enclave = lab.carrier.started.get(timeout=TIMEOUT_S)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(lab.hypervisor.close)
        lab.carrier.go_on.set()
        closing.result(TIMEOUT_S)
    assert enclave.closes == 1
    assert lab.ended.empty()


def test_nothing_stays_open(tmp_path: Path) -> None:
    def descriptors() -> list[str]:
        gc.collect()  # mappings of guest memory go with their last view
        return sorted(str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    def live() -> None:
        lab = Lab(tmp_path / "authority")
        booted(lab, lab.slot(1)).end()
        lab.ended.get(timeout=TIMEOUT_S)
        booted(lab, lab.slot(2), flags=1)
        booted(lab, lab.slot(3))
        lab.hypervisor.free(Slot(2))
        assert lab.start(lab.slot(4, content=b"no image"))[0] < 0
        lab.close()

    live()
    before = descriptors()
    live()
    assert descriptors() == before


def test_memory_that_is_no_longer_there_is_said(lab: Lab) -> None:
    closed = os.memfd_create("gone")
    os.close(closed)
    slot = Slot(1, [DonatedRange(0, SIZE, 1 << 20, 0)], [2])
    assert lab.start(slot) == (-errno.EBADF, 0)
    lab.hypervisor.free(slot)
    assert lab.log == [
        "slot 0x1 does not start: bad file descriptor",
        "slot 0x1: its memory cannot be given back: bad file descriptor",
    ]


# Console


def parent(lab: Lab) -> MockGuest:
    ours, theirs = socket.socketpair()
    lab.switch.start_parent(ours)
    return MockGuest(theirs, PARENT_CID)


def test_a_console_in_debug_mode_tells_also_what_was_said_before(lab: Lab) -> None:
    guest = parent(lab)
    enclave = booted(lab, lab.slot(1), flags=1)
    enclave.serial.sendall(b"Linux version")
    for port in (1024, 1025):
        guest.send(Op.REQUEST, port, 10016, cid=0)
        guest.expect(Op.RESPONSE)
        assert guest.read(13) == b"Linux version"
    guest.close()


def test_no_console_in_production_mode(lab: Lab) -> None:
    guest = parent(lab)
    booted(lab, lab.slot(1))
    guest.send(Op.REQUEST, 1024, 10016, cid=0)
    guest.expect(Op.RST)
    guest.close()
