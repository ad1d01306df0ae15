# SPDX-License-Identifier: Apache-2.0
"""The parent machine, with a program in QEMU's place that says how it was started."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enclavekit.eif import ImageSection, SectionType
from enclavekit.errors import CarrierError, LaunchError, NoQemuError, UsageError
from enclavekit.hypervisor.accel import Accel
from enclavekit.image.initramfs import open_ramdisk
from enclavekit.lab.parent import MIB, Parent, ParentOptions
from enclavekit.runtime.find import Kernel, Qemu

INSTANCE = "i-0123456789abcdef0"
FAKE = """
import json, os, sys
words = sys.argv[2:]
with open(words[words.index("-initrd") + 1], "rb") as file:
    ramdisk = file.read()
memory = next(word for word in words if word.startswith("memory-backend-file"))
size = os.stat(memory.partition("mem-path=")[2].partition(",")[0]).st_size
with open(sys.argv[1] + ".ramdisk", "wb") as file:
    file.write(ramdisk)
with open(sys.argv[1], "w") as file:
    json.dump({"words": words, "directory": os.getcwd(), "memory": size}, file)
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    path = tmp_path / "vmlinuz"
    path.touch()
    return Kernel("test", path, None)


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    made = [*socket.socketpair(), *socket.socketpair()]
    yield made
    for each in made:
        each.close()


def qemu(code: str, *words: str | Path, version: tuple[int, int, int] = (11, 0, 0)) -> Qemu:
    return Qemu((sys.executable, "-c", code, *map(str, words)), version, {})


def start(parent: Parent, directory: Path, sockets: list[socket.socket]) -> None:
    ramdisk = directory / "cache" / "root.cpio"
    ramdisk.parent.mkdir()
    ramdisk.write_bytes(b"root")
    parent.start([ramdisk], device=directory / "device.sock", vsock=sockets[0], console=sockets[2])


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_command_line(tmp_path: Path, kernel: Kernel, sockets: list[socket.socket]) -> None:
    said = tmp_path / "said"
    options = ParentOptions(INSTANCE, cpus=6, memory=512 * MIB, enclave_memory=128 * MIB, command_line="more")
    parent = Parent(qemu(FAKE, said), kernel, Accel.TCG, options)
    try:
        start(parent, tmp_path, sockets)
        assert select.select([parent], [], [], 20)[0]
        assert parent.failure() is None
    finally:
        parent.close()
    told: dict[str, Any] = json.loads(said.read_text())
    words = told["words"]
    assert (told["memory"], told["directory"]) == (640 * MIB, str(tmp_path))
    assert option(words, "-smp") == "6,sockets=1,cores=3,threads=2"
    assert option(words, "-smbios") == f"type=2,asset={INSTANCE}"
    assert json.loads(words[words.index("vhost-user-vsock-pci,chardev=vsock") + 2]) == {
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": "device.sock"},
        "addr": "02.0",
    }
    line = option(words, "-append").split()
    assert {"hugepagesz=2M", "hugepages=64", "tsc=reliable", "no_timer_check", "more"} <= set(line)
    assert "-sandbox" in words
    assert option(words, "-run-with") == "exit-with-parent=on"


def test_the_ramdisk_has_all_parts(tmp_path: Path, kernel: Kernel, sockets: list[socket.socket]) -> None:
    said = tmp_path / "said"
    parent = Parent(qemu(FAKE, said), kernel, Accel.TCG, ParentOptions(INSTANCE, cpus=8))
    try:
        start(parent, tmp_path, sockets)
        assert select.select([parent], [], [], 20)[0]
        assert parent.failure() is None
    finally:
        parent.close()
    ramdisk = tmp_path / "said.ramdisk"
    assert ramdisk.read_bytes().startswith(b"root")
    own = ramdisk.read_bytes()[4:]
    (tmp_path / "own").write_bytes(own)
    with (tmp_path / "own").open("rb") as file:
        section = ImageSection(SectionType.RAMDISK, -12, len(own))
        with open_ramdisk(file, section, name="own") as opened:
            (init,) = [each for each in opened.files if each.entry.name == b"init"]
            script = b"".join(init.content.chunks()).decode()
    assert "echo 2,3,4,5,6,7 > /sys/module/nitro_enclaves/parameters/ne_cpus" in script
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_qemu_that_fails(tmp_path: Path, kernel: Kernel, sockets: list[socket.socket]) -> None:
    code = "import sys; sys.stderr.write('qemu: warning: x\\nqemu: no such device\\n'); sys.exit(1)"
    parent = Parent(qemu(code), kernel, Accel.TCG, ParentOptions(INSTANCE))
    try:
        start(parent, tmp_path, sockets)
        assert select.select([parent], [], [], 20)[0]
        assert parent.failure() == "QEMU ended with exit status 1: qemu: no such device"
        assert os.read(parent.fileno(), 1) == b""
    finally:
        parent.close()


def test_a_qemu_that_is_not_there(tmp_path: Path, kernel: Kernel, sockets: list[socket.socket]) -> None:
    parent = Parent(Qemu(("/no/qemu",), (11, 0, 0)), kernel, Accel.TCG, ParentOptions(INSTANCE))
    try:
        with pytest.raises(CarrierError) as caught:
            start(parent, tmp_path, sockets)
        assert caught.value.message == "cannot run QEMU: /no/qemu: No such file or directory"
    finally:
        parent.close()


def test_a_qemu_without_vfio_user(kernel: Kernel) -> None:
    with pytest.raises(NoQemuError) as caught:
        Parent(qemu("", version=(10, 0, 13)), kernel, Accel.TCG, ParentOptions(INSTANCE))
    assert (caught.value.message, caught.value.hint) == (
        "QEMU 10.0.13: expected 10.1 or newer, which has vfio-user",
        "enclave runtime install",
    )


@pytest.mark.parametrize("cpus", [0, 2, 3, 5, -4])
def test_whole_cores_beside_the_first(cpus: int) -> None:
    with pytest.raises(LaunchError) as caught:
        ParentOptions(INSTANCE, cpus=cpus).check()
    assert caught.value.message == (
        f"CPUs: {cpus}, expected an even number from 4 to 64: two for each core, one core kept"
    )


def test_an_instance_id_that_is_none() -> None:
    with pytest.raises(UsageError):
        ParentOptions("i-0,x=y").check()


@pytest.mark.parametrize(("memory", "enclave_memory"), [(100 * MIB, 64 * MIB), (512 * MIB, MIB), (512 * MIB, 0)])
def test_sizes(memory: int, enclave_memory: int) -> None:
    with pytest.raises(LaunchError) as caught:
        ParentOptions(INSTANCE, memory=memory, enclave_memory=enclave_memory).check()
    assert caught.value.message in (
        "memory: 100 MiB, expected whole MiB, 384 or more",
        f"enclave memory: {enclave_memory >> 20} MiB, expected whole huge pages of 2 MiB",
    )
