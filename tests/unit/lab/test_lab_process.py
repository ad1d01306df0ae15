# SPDX-License-Identifier: Apache-2.0
"""The process of a lab with a program in QEMU's place: whatever does not come up leaves nothing."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from enclavekit.errors import FileError, LabError
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.qemu import QemuCarrier
from enclavekit.lab.directory import claim
from enclavekit.lab.parent import ParentOptions
from enclavekit.lab.process import Lab, LabOptions, connect_agent
from enclavekit.runtime.find import Kernel, Qemu

CONSOLE = """
import socket, sys
console = next(word for word in sys.argv if word.startswith("socket,id=console"))
console = socket.socket(fileno=int(console.rpartition("=")[2]))
console.sendall(b"booting\\r\\nKernel \\x1bpanic\\r\\n")
"""
STAYS = f"{CONSOLE}sys.stdin.close(); console.recv(1)"
FAILS = f"{CONSOLE}sys.exit('no such device')"


def lab(tmp_path: Path, code: str, boot_timeout_s: float = 60) -> Lab:
    kernel, ramdisk = tmp_path / "vmlinuz", tmp_path / "cache" / "root.cpio"
    ramdisk.parent.mkdir()
    kernel.touch()
    ramdisk.touch()
    qemu = Qemu((sys.executable, "-c", code), (11, 0, 0), {})
    options = LabOptions(
        qemu=qemu,
        kernel=Kernel("test", kernel, None),
        accel=Accel.TCG,
        ramdisks=[ramdisk],
        parent=ParentOptions("i-0123456789abcdef0"),
        carrier=QemuCarrier(qemu.command, {}, qemu.version, Accel.TCG),
        attestation_directory=tmp_path / "attestation",
        boot_timeout_s=boot_timeout_s,
    )
    return Lab(claim(tmp_path / "labs", "lab"), options)


def never(state: object) -> None:
    raise AssertionError(state)


def fails(made: Lab, tmp_path: Path) -> str:
    """How, and that nothing is left of it in this process."""
    before = _children()
    with pytest.raises(LabError) as caught:
        made.run(never)
    assert {thread.name for thread in threading.enumerate()}.isdisjoint({"agent", "nitro device", "vsock parent"})
    assert _children() == before
    assert [path.name for path in (tmp_path / "labs").iterdir()] == [".lock"]
    return caught.value.message


def _children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_a_qemu_that_fails(tmp_path: Path) -> None:
    assert fails(lab(tmp_path, FAILS), tmp_path) == (
        "the parent did not come up: QEMU ended with exit status 1: no such device; its last words: Kernel panic"
    )


def test_a_parent_that_does_not_come_up(tmp_path: Path) -> None:
    # Whether it has said anything by then is the machine's business.
    said = fails(lab(tmp_path, STAYS, 0.5), tmp_path)
    assert said.startswith("the parent did not come up: no sign of life within 0 s")


def test_stopped_while_it_boots(tmp_path: Path) -> None:
    made = lab(tmp_path, STAYS)
    threading.Timer(0.5, made.stop).start()
    assert fails(made, tmp_path).startswith("the parent did not come up: stopped")


def test_nobody_to_ask(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        connect_agent(tmp_path)
    assert caught.value.message == f"cannot speak with {tmp_path}/agent.sock: no such file or directory"
