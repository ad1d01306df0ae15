# SPDX-License-Identifier: Apache-2.0
"""The mock driver keeps the rules that it lets others break."""

from __future__ import annotations

import pytest

from enclavekit.testing.virtio import MockQueue, MockVsockDriver, PacketLayout
from enclavekit.virtio.vsock_packet import HEADER, Header, Op


@pytest.mark.parametrize("layout", PacketLayout)
@pytest.mark.parametrize("size", [HEADER.size, HEADER.size + 1, HEADER.size + 2, 4096])
def test_every_layout_holds_the_whole_packet(layout: PacketLayout, size: int) -> None:
    lengths = layout.parts(size)
    assert sum(lengths) == size
    assert all(length > 0 for length in lengths)


def test_layouts_differ() -> None:
    assert [layout.parts(100) for layout in PacketLayout] == [[100], [44, 56], [20, 20, 5, 55], [44, 56]]


def test_a_full_queue_says_so_and_has_room_again_once_used() -> None:
    memory = memoryview(bytearray(0x8000))
    queue = MockQueue("tx", memory, 0, size=4, slot=64)
    for _ in range(2):
        queue.add(readable=[b"x"], writable=[1])
    with pytest.raises(ValueError, match=r"^tx queue: no room for a chain of 1 descriptors$"):
        queue.add(readable=[b"x"])
    driver = MockVsockDriver(bytearray(0x8000), 16, size=4)
    device = driver.tx.for_device(driver.memory)
    for _ in range(10):
        driver.send(Op.RW, 1, 2, b"payload")
        chain = device.pop()
        assert chain is not None
        packet = b"".join(chain.readable)
        assert Header.parse(packet) == Header(16, 3, 1, 2, 7, 1, Op.RW, 0, 256 * 1024, 0)
        assert packet[HEADER.size :] == b"payload"
        device.push(chain.head, 0)
    assert driver.tx.used_index == 10


def test_a_part_larger_than_its_buffer_is_refused() -> None:
    queue = MockQueue("rx", memoryview(bytearray(0x8000)), 0, size=4, slot=64)
    with pytest.raises(ValueError, match=r"^rx queue: no room for a chain of 1 descriptors$"):
        queue.add(writable=[65])


@pytest.mark.parametrize("layout", PacketLayout)
def test_rx_buffers_fill_the_queue(layout: PacketLayout) -> None:
    driver = MockVsockDriver(bytearray(0x20000), 16, size=16, layout=layout)
    driver.fill_rx()
    driver.fill_rx()  # full: nothing happens
    device = driver.rx.for_device(driver.memory)
    chains = 0
    while (chain := device.pop()) is not None:
        assert sum(map(len, chain.writable)) == driver.slot
        chains += 1
    assert chains == 16 // len(layout.parts(4096))
