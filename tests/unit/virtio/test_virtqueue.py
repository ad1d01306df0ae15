# SPDX-License-Identifier: Apache-2.0
"""Split virtqueue: what good drivers do, and every way to break it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from enclavekit.errors import VirtqueueError
from enclavekit.testing.virtio import MockQueue
from enclavekit.virtio.memory import GuestMemory, MemoryRegion
from enclavekit.virtio.queue import (
    DESCRIPTOR,
    USED_ELEMENT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    Virtqueue,
)

NEXT, WRITE = VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE
SIZE, SLOT = 8, 256


class Rig:
    """A driver and a device on 64 KiB of memory."""

    def __init__(self, base: int = 0) -> None:
        self.buffer = memoryview(bytearray(0x10000))
        self.driver = MockQueue("tx", self.buffer, 0, size=SIZE, slot=SLOT)
        self.memory = GuestMemory([MemoryRegion(0, self.buffer)])
        self.device = self.driver.for_device(self.memory, base)


def test_layouts() -> None:
    assert DESCRIPTOR.size == 16
    assert USED_ELEMENT.size == 8


def test_an_empty_queue_gives_nothing() -> None:
    assert Rig().device.pop() is None


def test_chains_come_in_order_with_readable_and_writable_parts() -> None:
    rig = Rig()
    first = rig.driver.add(readable=[b"abc", b"de"], writable=[4, 8])
    second = rig.driver.add(readable=[b"x"])
    chain = rig.device.pop()
    assert chain is not None
    assert chain.head == first
    assert [bytes(part) for part in chain.readable] == [b"abc", b"de"]
    assert [len(part) for part in chain.writable] == [4, 8]
    chain = rig.device.pop()
    assert chain is not None
    assert (chain.head, chain.writable) == (second, [])
    assert rig.device.pop() is None


def test_what_the_device_writes_reaches_the_driver() -> None:
    rig = Rig()
    head = rig.driver.add(writable=[4, 8])
    chain = rig.device.pop()
    assert chain is not None
    chain.writable[0][:] = b"1234"
    chain.writable[1][:2] = b"56"
    rig.device.push(chain.head, 6)
    assert rig.driver.take_used() == [(head, b"123456")]


def test_indices_wrap_around() -> None:
    rig = Rig()
    for number in range(0x10000 + 2 * SIZE):
        head = rig.driver.add(readable=[b"%d" % number])
        chain = rig.device.pop()
        assert chain is not None
        assert chain.head == head
        rig.device.push(head, 0)
        assert rig.driver.take_used() == [(head, b"")]
    assert rig.device.base == 2 * SIZE


def test_one_interrupt_for_all_that_was_pushed_and_none_for_nothing() -> None:
    rig = Rig()
    rig.device.signal()
    assert rig.driver.interrupts == 0
    for _ in range(3):
        rig.driver.add(readable=[b"x"])
        chain = rig.device.pop()
        assert chain is not None
        rig.device.push(chain.head, 0)
    rig.device.signal()
    rig.device.signal()
    assert rig.driver.interrupts == 1


def test_a_driver_that_polls_is_not_interrupted_until_it_stops() -> None:
    rig = Rig()
    for polls, interrupts in ((True, 0), (False, 1), (True, 1)):
        rig.driver.poll(polls)
        head = rig.driver.add(readable=[b"x"])
        assert rig.device.pop() is not None
        rig.device.push(head, 0)
        rig.device.signal()
        assert rig.driver.interrupts == interrupts
        assert rig.driver.take_used() == [(head, b"")]


def test_kicks_are_wanted_unless_more_comes_while_the_device_works() -> None:
    rig = Rig()
    assert rig.driver.wants_kicks()
    for wanted in (True, False, False):
        rig.driver.add(readable=[b"x"])
        assert rig.device.pop() is not None
        assert rig.driver.wants_kicks() == wanted
    assert rig.device.pop() is None
    assert rig.driver.wants_kicks()
    rig.driver.add(readable=[b"x"])
    assert rig.device.pop() is not None
    assert rig.driver.wants_kicks()
    rig.driver.add(readable=[b"x"])
    assert rig.device.pop() is not None
    assert not rig.driver.wants_kicks()
    rig.driver.for_device(rig.memory)  # a new start
    assert rig.driver.wants_kicks()


def test_what_comes_as_the_device_asks_for_kicks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    for _ in range(2):
        rig.driver.add(readable=[b"x"])
        assert rig.device.pop() is not None
    assert not rig.driver.wants_kicks()
    monkeypatch.setattr(rig.device, "_fence", lambda: rig.driver.add(readable=[b"y"]))
    chain = rig.device.pop()
    assert chain is not None
    assert bytes(chain.readable[0]) == b"y"


def test_an_interrupt_that_the_driver_asks_for_at_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.driver.poll(True)
    rig.device.push(rig.driver.add(writable=[1]), 1)
    monkeypatch.setattr(rig.device, "_fence", lambda: rig.driver.poll(False))
    rig.device.signal()
    assert rig.driver.interrupts == 1


def test_chains_given_back_at_once() -> None:
    rig = Rig()
    heads = [rig.driver.add(readable=[b"x"]) for _ in range(3)]
    while rig.device.pop() is not None:
        pass
    rig.device.push_read(heads)
    assert [head for head, _ in rig.driver.take_used()] == heads


def test_chains_put_back_are_available_again() -> None:
    rig = Rig()
    heads = [rig.driver.add(readable=[b"x"]) for _ in range(3)]
    for _ in range(3):
        rig.device.pop()
    assert rig.device.base == 3
    rig.device.put_back(2)
    assert rig.device.base == 1
    again = [rig.device.pop(), rig.device.pop()]
    assert [chain.head for chain in again if chain] == heads[1:]


def test_a_queue_goes_on_from_its_base() -> None:
    rig = Rig(base=2)
    heads = [rig.driver.add(readable=[b"x"]) for _ in range(3)]
    chain = rig.device.pop()
    assert chain is not None
    assert chain.head == heads[2]
    assert rig.device.pop() is None


def broken(rig: Rig) -> str:
    with pytest.raises(VirtqueueError) as caught:
        rig.device.pop()
    return str(caught.value)


def test_more_chains_than_the_ring_holds() -> None:
    rig = Rig()
    rig.driver.announce(SIZE + 1)
    assert broken(rig) == "tx queue: 9 chains available in a ring of 8"


def test_head_outside_of_the_table() -> None:
    rig = Rig()
    rig.driver.offer(SIZE)
    assert broken(rig) == "tx queue: descriptor 8 is not in a table of 8"


def test_next_outside_of_the_table() -> None:
    rig = Rig()
    rig.driver.describe(0, 0, 1, NEXT, 0xFFFF)
    rig.driver.offer(0)
    assert broken(rig) == "tx queue: descriptor 65535 is not in a table of 8"


def test_a_loop() -> None:
    rig = Rig()
    rig.driver.describe(0, 0, 1, NEXT, 1)
    rig.driver.describe(1, 0, 1, NEXT, 0)
    rig.driver.offer(0)
    assert broken(rig) == "tx queue: the chain from descriptor 0 has no end"


def test_the_longest_chain_is_all_descriptors() -> None:
    rig = Rig()
    rig.driver.add(readable=[b"x"] * SIZE)
    chain = rig.device.pop()
    assert chain is not None
    assert len(chain.readable) == SIZE


def test_readable_after_writable() -> None:
    rig = Rig()
    rig.driver.describe(0, 0, 1, NEXT | WRITE, 1)
    rig.driver.describe(1, 0, 1)
    rig.driver.offer(0)
    assert broken(rig) == "tx queue: descriptor 1 is readable after writable ones"


def test_an_indirect_descriptor_stands_for_its_table() -> None:
    rig = Rig()
    head = rig.driver.add(readable=[b"abc", b"de"], writable=[4, 8], indirect=True)
    chain = rig.device.pop()
    assert chain is not None
    assert chain.head == head
    assert [bytes(part) for part in chain.readable] == [b"abc", b"de"]
    assert [len(part) for part in chain.writable] == [4, 8]
    assert rig.device.pop() is None


def test_a_table_that_was_read_before() -> None:
    """At the same place, and elsewhere: what it says counts."""
    rig = Rig()

    def read(where: int, buffer: int) -> int:
        table = rig.driver.table_gpa(where)
        rig.driver.describe(0, rig.driver.buffer_gpa(buffer), 3, NEXT, 1, table=table)
        rig.driver.describe(1, rig.driver.buffer_gpa(buffer), 4, table=table)
        rig.driver.describe(where, table, 32, VIRTQ_DESC_F_INDIRECT)
        rig.driver.offer(where)
        chain = rig.device.pop()
        assert chain is not None
        assert chain.head == where
        assert [len(part) for part in chain.readable] == [3, 4]
        chain.readable[0][:1] = b"!"
        return bytes(rig.memory.view(rig.driver.buffer_gpa(0), SLOT * SIZE)).index(b"!") // SLOT

    for where, buffer in ((0, 5), (0, 5), (0, 6), (3, 6), (3, 5), (0, 6)):
        rig.memory.view(rig.driver.buffer_gpa(0), SLOT * SIZE)[:] = bytes(SLOT * SIZE)
        assert read(where, buffer) == buffer


EDGES = st.sampled_from([0, 1, 0xFFF, 0x1000, 0x1001, 0xFFFF, 0x10000, 1 << 32, (1 << 64) - 1])
DESCRIPTORS = st.tuples(EDGES, EDGES.map(lambda value: value & 0xFFFFFFFF), st.integers(0, 7), st.integers(0, 3))


@given(first=DESCRIPTORS, second=DESCRIPTORS, gpa=st.sampled_from([0, 0x1000]))
@example(first=(0x1000, 1, NEXT, 1), second=(0x1000, 0xFFF, 0, 0), gpa=0)
@example(first=(0x1000, 1, NEXT | WRITE, 1), second=(0x1000, 0xFFF, WRITE, 0), gpa=0)
@example(first=(0x1000, 1, NEXT, 1), second=(0x1000, 0x10000, 0, 0), gpa=0x1000)
@example(first=(0x1000, 1, NEXT, 0), second=(0x1000, 1, 0, 0), gpa=0)
@example(first=(0x1000, 1, NEXT, 1), second=(0x1000, 1, NEXT, 0), gpa=0)
@example(first=(0, 1, NEXT, 1), second=(0x1000, 0xF000, 0, 0), gpa=0x1000)
def test_a_table_of_two_is_read_as_any_other(
    first: tuple[int, int, int, int], second: tuple[int, int, int, int], gpa: int
) -> None:
    """Which has a way of its own, by which there must be no other answer."""
    buffer = memoryview(bytearray(0x10000))
    queue = MockQueue("tx", buffer, gpa, size=SIZE, slot=SLOT)
    regions = [MemoryRegion(start, buffer[start:end]) for start, end in ((0, gpa), (gpa, len(buffer))) if start < end]
    device = queue.for_device(GuestMemory(regions))
    table = queue.table_gpa(0)
    queue.describe(0, *first, table=table)
    queue.describe(1, *second, table=table)
    queue.describe(0, table, 32, VIRTQ_DESC_F_INDIRECT)
    queue.offer(0)

    def seen(read: Callable[[], object]) -> object:
        try:
            return read()
        except VirtqueueError as error:
            return str(error)

    def popped() -> object:
        chain = device.pop()
        assert chain is not None
        return places(chain.readable), places(chain.writable)

    def walked() -> object:
        readable, writable = device._walk(0, device._descriptors, SIZE, 0)
        return places(readable), places(writable)

    def places(parts: list[memoryview]) -> list[tuple[int, int]]:
        here = address_of(buffer)
        return [(address_of(part) - here, len(part)) for part in parts]

    assert seen(popped) == seen(walked)


def address_of(view: memoryview) -> int:
    """In this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_who_peeks_is_not_kicked_until_a_look_that_finds_nothing() -> None:
    rig = Rig()
    assert not rig.device.peek()
    assert not rig.driver.wants_kicks()
    head = rig.driver.add(readable=[b"x"])
    assert rig.device.peek()
    chain = rig.device.pop()
    assert chain is not None
    assert chain.head == head
    assert not rig.device.peek()
    assert rig.device.pop() is None
    assert rig.driver.wants_kicks()


def test_what_comes_while_kicks_are_being_asked_for_again_is_seen() -> None:
    rig = Rig()
    assert not rig.device.peek()
    rig.driver.add(readable=[b"x"])  # without a kick, as the driver may still see that none is wanted
    assert rig.device.pop() is not None


def test_an_indirect_descriptor_may_end_a_chain() -> None:
    rig = Rig()
    table = rig.driver.table_gpa(1)
    rig.driver.describe(0, rig.driver.buffer_gpa(0), 3, NEXT, 1)
    rig.driver.describe(1, table, 16, VIRTQ_DESC_F_INDIRECT)
    rig.driver.describe(0, rig.driver.buffer_gpa(1), 5, table=table)
    rig.driver.offer(0)
    chain = rig.device.pop()
    assert chain is not None
    assert [len(part) for part in chain.readable] == [3, 5]


def test_a_table_as_long_as_the_queue() -> None:
    rig = Rig()
    table = rig.driver.table_gpa(0)
    for index in range(SIZE):
        rig.driver.describe(index, 0, 1, NEXT if index < SIZE - 1 else 0, index + 1, table=table)
    rig.driver.describe(0, table, SIZE * 16, VIRTQ_DESC_F_INDIRECT)
    rig.driver.offer(0)
    chain = rig.device.pop()
    assert chain is not None
    assert len(chain.readable) == SIZE


@pytest.mark.parametrize(
    ("length", "flags", "entry", "message"),
    [
        (16, NEXT, (0, 1, 0, 0), "descriptor 0 is indirect and has a next one"),
        (0, 0, (0, 1, 0, 0), "descriptor 0: table of 0 bytes, expected 1 to 8 descriptors"),
        (24, 0, (0, 1, 0, 0), "descriptor 0: table of 24 bytes, expected 1 to 8 descriptors"),
        (9 * 16, 0, (0, 1, 0, 0), "descriptor 0: table of 144 bytes, expected 1 to 8 descriptors"),
        (16, 0, (0, 1, VIRTQ_DESC_F_INDIRECT, 0), "descriptor 0 of a table is indirect itself"),
        (16, 0, (0, 1, NEXT, 1), "descriptor 1 is not in a table of 1"),
        (32, 0, (0, 1, NEXT, 0), "the chain from descriptor 0 has no end"),
        (16, 0, (0, 0, 0, 0), "descriptor 0 is empty"),
    ],
)
def test_tables_that_lie(length: int, flags: int, entry: tuple[int, int, int, int], message: str) -> None:
    rig = Rig()
    table = rig.driver.table_gpa(0)
    rig.driver.describe(*(0, *entry), table=table)
    rig.driver.describe(0, table, length, flags | VIRTQ_DESC_F_INDIRECT, 1)
    rig.driver.offer(0)
    assert broken(rig) == f"tx queue: {message}"


def test_a_table_in_a_table() -> None:
    rig = Rig()
    table = rig.driver.table_gpa(0)
    rig.driver.describe(0, 0, 1, NEXT, 1, table=table)
    rig.driver.describe(1, table, 16, VIRTQ_DESC_F_INDIRECT, table=table)
    rig.driver.describe(0, table, 32, VIRTQ_DESC_F_INDIRECT)
    rig.driver.offer(0)
    assert broken(rig) == "tx queue: descriptor 1 of a table is indirect itself"


def test_a_table_outside_of_memory() -> None:
    rig = Rig()
    rig.driver.describe(0, 0x1_0000, 16, VIRTQ_DESC_F_INDIRECT)
    rig.driver.offer(0)
    assert "are not in one region" in broken(rig)


def test_an_indirect_descriptor_that_was_not_agreed_on() -> None:
    rig = Rig()
    rig.device = rig.driver.for_device(rig.memory, indirect=False)
    rig.driver.describe(0, 0, 16, VIRTQ_DESC_F_INDIRECT)
    rig.driver.offer(0)
    assert broken(rig) == "tx queue: descriptor 0 is indirect, which was not agreed on"


def test_empty_descriptor() -> None:
    rig = Rig()
    rig.driver.describe(3, 0, 0)
    rig.driver.offer(3)
    assert broken(rig) == "tx queue: descriptor 3 is empty"


def test_buffer_outside_of_memory() -> None:
    rig = Rig()
    rig.driver.describe(0, 0xFFFF, 2)
    rig.driver.offer(0)
    assert broken(rig) == "guest memory: 0x2 bytes at 0x000000000000ffff are not in one region"


@given(rings=st.binary(min_size=4 * SIZE * 16, max_size=4 * SIZE * 16), base=st.integers(0, 0xFFFF))
def test_any_memory_gives_chains_or_our_error(rings: bytes, base: int) -> None:
    """All three arrays and the memory that they point to are random."""
    memory = GuestMemory([MemoryRegion(0, memoryview(bytearray(rings)))])
    size = 4
    queue = Virtqueue(
        "any",
        memory,
        size,
        descriptors=memory.view(0, 16 * size),
        available=memory.view(64, 4 + 2 * size),
        used=memory.view(80, 4 + 8 * size),
        base=base,
        interrupt=lambda: None,
    )
    try:
        for _ in range(size + 1):
            chain = queue.pop()
            if chain is None:
                break
            assert 0 < len(chain.readable) + len(chain.writable) <= size
            queue.push(chain.head, 0)
    except VirtqueueError:
        pass
