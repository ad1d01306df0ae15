# SPDX-License-Identifier: Apache-2.0
"""Draws the sequences of docs/the-nitro-device.md: what is in them was recorded, from the device itself.

    python tools/device_pictures.py

A driver that does what Linux's does, and a hypervisor that answers, play each scene; every access to a register, every
interrupt and every call becomes an arrow. ``tests/unit/lab/test_device_pictures.py`` holds the files against a fresh
recording.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/unit/lab"))

from vfio_client import VfioClient

from enclavekit.lab.dma import DmaMaps
from enclavekit.lab.interrupts import Interrupts
from enclavekit.lab.ne_device import Fault, NeDevice
from enclavekit.lab.ne_registers import (
    NE_COMMAND,
    NE_ENABLE,
    NE_RECV_DATA,
    NE_SEND_DATA,
    NE_VERSION,
    REGISTER_BAR,
    REPLY,
    REQUESTS,
    VECTORS,
    Command,
    Reply,
)
from enclavekit.lab.slots import Answer, Slot
from enclavekit.lab.vfio_user import VfioUser
from enclavekit.lab.vfio_user_message import DEVICE_INFO, HEADER, IRQ_INFO, REGION_INFO, Flags
from enclavekit.lab.vfio_user_message import Command as Message

MIB = 1 << 20
RAM = 256 * MIB
LEFT, TOP, STEP = 90, 34, 30
WORDS = {
    Command.ENCLAVE_START: "slot, CID, flags",
    Command.ENCLAVE_STOP: "slot",
    Command.SLOT_ALLOC: "one byte",
    Command.SLOT_FREE: "slot",
    Command.SLOT_ADD_MEM: "slot, address, size",
    Command.SLOT_ADD_VCPU: "slot, CPU",
    Command.SLOT_INFO: "slot",
}


@dataclass(frozen=True, slots=True)
class Arrow:
    """From one lane to another; within one, it is a remark."""

    source: str
    target: str
    text: str
    answer: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """Lanes from left to right, arrows from above."""

    lanes: Sequence[str]
    arrows: Sequence[Arrow]
    gap: int = 290

    def svg(self) -> str:
        """A picture that needs nothing else."""
        places = {lane: LEFT + self.gap * number for number, lane in enumerate(self.lanes)}
        width, height = 2 * LEFT + self.gap * (len(self.lanes) - 1), TOP + STEP * (len(self.arrows) + 1)
        drawn = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            'font-size="12"><rect width="100%" height="100%" fill="#fff"/><defs><marker id="head" markerWidth="8" '
            'markerHeight="8" refX="8" refY="4" orient="auto"><path d="M0 0 8 4 0 8z" fill="#08306b"/></marker></defs>'
        ]
        for lane, x in places.items():
            drawn.append(
                f'<text x="{x}" y="18" text-anchor="middle" font-weight="bold">{escape(lane)}</text>'
                f'<line x1="{x}" y1="{TOP - 8}" x2="{x}" y2="{height - 8}" stroke="#9ecae1" stroke-width="2"/>'
            )
        for number, arrow in enumerate(self.arrows, 1):
            drawn.append(_drawn(arrow, places[arrow.source], places[arrow.target], TOP + STEP * number))
        return "\n".join([*drawn, "</svg>\n"])


def _drawn(arrow: Arrow, start: int, end: int, y: int) -> str:
    text = escape(arrow.text)
    if start == end:
        return f'<text x="{start + 6}" y="{y - 4}" fill="#2171b5" font-style="italic">{text}</text>'
    dashes = ' stroke-dasharray="5 4"' if arrow.answer else ""
    return (
        f'<text x="{(start + end) // 2}" y="{y - 5}" text-anchor="middle">{text}</text>'
        f'<line x1="{start}" y1="{y}" x2="{end}" y2="{y}" stroke="#08306b"{dashes} marker-end="url(#head)"/>'
    )


class Scene:
    """A device, whose surroundings are all played here and write down what they see. One thread, no clock."""

    def __init__(self) -> None:
        self.arrows: list[Arrow] = []
        self.answers: list[Answer] = []
        self._calls: list[Callable[[], None]] = []
        self._ram = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self._ram, RAM)
        self._memory = DmaMaps()
        self._memory.add(0, RAM, 3, self._ram, 0)
        self.device = NeDevice(self, self._memory.find, self._signal, self)
        self.device.write(REGISTER_BAR, NE_ENABLE, b"\1")

    def close(self) -> None:
        self.device.close()
        self._memory.close()
        os.close(self._ram)

    def picture(self) -> Picture:
        return Picture(("program", "driver", "device", "hypervisor"), self.arrows)

    def say(self, source: str, target: str, text: str, *, answer: bool = False) -> None:
        self.arrows.append(Arrow(source, target, text, answer))

    # What is behind the device

    def call(self, call: Callable[[], None]) -> bool:
        self._calls.append(call)
        return True

    def call_later(self, delay_s: float, call: Callable[[], None]) -> object:
        return self.call(call)

    def turn(self) -> None:
        """The device hears what other threads have told it."""
        while self._calls:
            self._calls.pop(0)()

    def start(self, slot: Slot, cid: int, flags: int, answer: Answer) -> None:
        del slot, flags
        self.say("device", "hypervisor", f"start, CID {cid or 'any'}")
        self.answers.append(answer)

    def stop(self, slot: Slot) -> None:
        del slot
        self.say("device", "hypervisor", "stop")

    def free(self, slot: Slot) -> None:
        del slot
        self.say("device", "hypervisor", "free: zeroed pages go back")

    def answered(self, rc: int, cid: int) -> None:
        self.say("hypervisor", "device", "it runs" if not rc else f"refused: {errno.errorcode[-rc]}", answer=True)
        self.answers.pop()(rc, cid)
        self.turn()

    def ended(self, uid: int) -> None:
        self.say("hypervisor", "device", "it has ended")
        self.device.ended(uid)
        self.turn()

    def _signal(self, vector: int) -> None:
        self.say("device", "driver", f"interrupt {vector}", answer=not vector)

    # The driver

    def post(self, command: Command, *words: int) -> None:
        request = REQUESTS[command].pack(*words) or b"\0"
        self.say("driver", "device", f"NE_SEND_DATA: {WORDS[command]}")
        self.device.write(REGISTER_BAR, NE_SEND_DATA, request)
        self.say("driver", "device", f"NE_COMMAND: {int(command)} {command.name}")
        self.device.write(REGISTER_BAR, NE_COMMAND, command.to_bytes(4, "little"))

    def reply(self) -> Reply:
        reply = Reply.parse(self.device.read(REGISTER_BAR, NE_RECV_DATA, REPLY.size))
        self.say("driver", "device", f"reads NE_RECV_DATA: {said(reply)}")
        return reply

    def do(self, command: Command, *words: int) -> Reply:
        self.post(command, *words)
        return self.reply()

    def build(self) -> int:
        """An enclave that can be started; not drawn."""
        before, self.arrows = self.arrows, []
        uid = self.do(Command.SLOT_ALLOC).slot_uid
        self.do(Command.SLOT_ADD_MEM, uid, 128 * MIB, 64 * MIB)
        self.do(Command.SLOT_ADD_VCPU, uid, 2)
        self.arrows = before
        return uid


def said(reply: Reply) -> str:
    """What matters of it, and is not zero."""
    words = [f"rc {reply.rc}"]
    shown = ("slot_uid", "enclave_cid", "state") + (("mem_regions",) if not reply.mem_size else ())
    for field in fields(reply)[1:]:
        value = getattr(reply, field.name)
        if value and field.name in shown:
            words.append({"slot_uid": "slot"}.get(field.name) or f"{field.name.removeprefix('enclave_')} {value}")
    return ", ".join(words)


def start() -> Picture:
    """From nothing to a running enclave, and its end by a close."""
    scene = Scene()
    scene.say("program", "driver", "NE_CREATE_VM")
    uid = scene.do(Command.SLOT_ALLOC).slot_uid
    scene.say("driver", "program", "a descriptor, the slot's id", answer=True)
    scene.say("program", "driver", "NE_SET_USER_MEMORY_REGION")
    scene.say("driver", "driver", "pins the pages, merges those that follow one another; each range:")
    scene.do(Command.SLOT_ADD_MEM, uid, 128 * MIB, 64 * MIB)
    scene.say("driver", "program", "0", answer=True)
    scene.say("program", "driver", "NE_ADD_VCPU, twice")
    scene.do(Command.SLOT_ADD_VCPU, uid, 2)
    scene.do(Command.SLOT_ADD_VCPU, uid, 3)
    scene.say("driver", "program", "the CPU's number", answer=True)
    scene.say("program", "driver", "NE_START_ENCLAVE")
    scene.post(Command.ENCLAVE_START, uid, 0, 0)
    scene.say("device", "device", "the hypervisor checks, measures and boots the image")
    scene.answered(0, 16)
    scene.reply()
    scene.say("driver", "program", "CID 16", answer=True)
    scene.say("program", "driver", "close")
    scene.do(Command.ENCLAVE_STOP, uid)
    scene.do(Command.SLOT_FREE, uid)
    scene.close()
    return scene.picture()


def end() -> Picture:
    """An enclave that ends by itself."""
    scene = Scene()
    uid = scene.build()
    before, scene.arrows = scene.arrows, []
    scene.post(Command.ENCLAVE_START, uid, 0, 0)
    scene.answered(0, 16)
    scene.arrows = before
    scene.say("program", "driver", "poll")
    scene.ended(uid)
    scene.say("driver", "driver", "asks for each enclave that runs, newest first:")
    scene.do(Command.SLOT_INFO, uid)
    scene.say("driver", "program", "POLLHUP", answer=True)
    scene.say("program", "driver", "close")
    scene.do(Command.SLOT_FREE, uid)
    scene.close()
    return scene.picture()


def silent() -> Picture:
    """A start that nobody answers."""
    scene = Scene()
    uid = scene.build()
    scene.device.faults.append((Command.ENCLAVE_START, Fault(lost=True)))
    scene.say("program", "driver", "NE_START_ENCLAVE")
    scene.post(Command.ENCLAVE_START, uid, 0, 0)
    scene.say("driver", "driver", "waits 120 s")
    scene.say("driver", "program", "ETIMEDOUT; the enclave is as before", answer=True)
    scene.say("program", "driver", "close")
    scene.do(Command.SLOT_FREE, uid)
    scene.close()
    return scene.picture()


def connect() -> Picture:
    """QEMU and the server, and the driver's first accesses: names of messages as they come."""
    arrows: list[Arrow] = []
    theirs, ours = socket.socketpair()
    memory, interrupts = DmaMaps(), Interrupts(VECTORS)
    scene = Scene()
    server = VfioUser(theirs, scene.device, memory, interrupts)

    def received() -> None:
        _, command, size, flags, _ = HEADER.unpack(theirs.recv(HEADER.size, socket.MSG_PEEK))
        arrows.append(Arrow("QEMU", "server", f"{Message(command).name}, {size} bytes"))
        server.process()
        if not flags & Flags.NO_REPLY:
            _, _, size, _, _ = HEADER.unpack(ours.recv(HEADER.size, socket.MSG_PEEK))
            arrows.append(Arrow("server", "QEMU", f"reply, {size} bytes", answer=True))

    client = VfioClient(ours, received)
    ram = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(ram, RAM)
    eventfds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(VECTORS)]
    client.negotiate()
    client.ask(Message.DEVICE_GET_INFO, bytes(DEVICE_INFO.size))
    client.ask(Message.DEVICE_GET_REGION_INFO, REGION_INFO.pack(REGION_INFO.size, 0, REGISTER_BAR, 0, 0, 0))
    client.ask(Message.DEVICE_GET_IRQ_INFO, IRQ_INFO.pack(IRQ_INFO.size, 0, 2, 0))
    arrows.append(Arrow("QEMU", "QEMU", "the same for the other regions and interrupts"))
    client.ask(Message.DEVICE_RESET)
    client.map(0, RAM, ram)
    arrows.append(Arrow("QEMU", "QEMU", "with the file's descriptor; maps go and come while firmware runs"))
    client.set_eventfds(eventfds)
    arrows.append(Arrow("QEMU", "QEMU", "the driver: off, version, on"))
    for place, value in ((NE_ENABLE, b"\0"), (NE_VERSION, b"\1\0"), (NE_ENABLE, b"\1")):
        client.write(REGISTER_BAR, place, value)
        client.read(REGISTER_BAR, place, len(value))
    interrupts.signal(0)
    arrows.append(Arrow("server", "QEMU", "eventfd: interrupt 0"))
    server.close()
    ours.close()
    for fd in (ram, *eventfds):
        os.close(fd)
    scene.close()
    return Picture(("QEMU", "server"), arrows, 420)


PICTURES: dict[str, Callable[[], Picture]] = {
    "nitro-device-connect.svg": connect,
    "nitro-device-start.svg": start,
    "nitro-device-end.svg": end,
    "nitro-device-silent.svg": silent,
}

if __name__ == "__main__":
    for name, scene in PICTURES.items():
        (ROOT / "docs" / name).write_text(scene().svg())
