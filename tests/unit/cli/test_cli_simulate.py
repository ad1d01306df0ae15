# SPDX-License-Identifier: Apache-2.0
"""``enclave simulate`` with a program in Python: its descriptors, the driver's errors, signals, wrong words."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from enclavekit.cli.main import run_command
from enclavekit.cli.simulate import parse_fault
from enclavekit.errors import MissingError, UnsupportedHostError, UsageError
from enclavekit.linux.nitro_enclaves import NE_MAGIC
from enclavekit.linux.seccomp import spawn
from enclavekit.testing.nitro_driver import Command

PROGRAM = """
import ctypes, errno, fcntl, os, select, sys
node = os.open("/dev/../dev/nitro_enclaves", os.O_RDWR)
assert not os.get_inheritable(node)
enclave = fcntl.ioctl(node, 0x8008ae20, bytearray(8), True)
assert not os.get_inheritable(enclave)
info = bytearray((1).to_bytes(8, "little") + bytes(8))
fcntl.ioctl(enclave, 0xc010ae22, info, True)
assert int.from_bytes(info[8:], "little") == 8 << 20
try:
    fcntl.ioctl(enclave, 0xc010ae24, bytearray(16), True)
except OSError as error:
    print(error.errno)
poller = select.poll()
poller.register(enclave, select.POLLIN)
print(poller.poll(0))
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(257, -100, ctypes.c_void_p(16), 0), errno.errorcode[ctypes.get_errno()])
print(libc.syscall(437, -100, b"/dev/nitro_enclaves", ctypes.c_void_p(16), 24), errno.errorcode[ctypes.get_errno()])
print(libc.syscall(41, 40, 1, 0), errno.errorcode[ctypes.get_errno()])
sys.exit(7)
"""


@pytest.fixture
def permitted() -> None:
    try:
        pid, listener = spawn(["true"], 0)
    except MissingError as error:
        pytest.skip(f"programs against a simulated driver: {error}")
    listener.close()
    os.waitpid(pid, 0)


@pytest.mark.usefixtures("permitted")
def test_a_program_in_python(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    enclave = Path(sys.executable).with_name("enclave")
    done = subprocess.run(
        [enclave, "simulate", "--", sys.executable, program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "266\n[]\n-1 EFAULT\n-1 EFAULT\n-1 EAFNOSUPPORT\n"
    assert done.returncode == 7


@pytest.mark.usefixtures("permitted")
def test_the_signal_that_ends_us_is_the_programs() -> None:
    enclave = Path(sys.executable).with_name("enclave")
    with subprocess.Popen(
        [enclave, "simulate", "--", "sh", "-c", "echo up; exec sleep 100"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.usefixtures("permitted")
def test_the_pool_can_be_read() -> None:
    enclave = Path(sys.executable).with_name("enclave")
    words = ["cat", "/sys/module/nitro_enclaves/parameters/ne_cpus"]
    for _ in range(2):
        done = subprocess.run([enclave, "simulate", "--", *words], capture_output=True, timeout=60, check=False)
        assert (done.stdout, done.returncode) == (b"1,2,3,5,6,7\n", 0)


def test_faults() -> None:
    assert parse_fault("SLOT_ADD_MEM=ENOMEM") == (Command.SLOT_ADD_MEM, 12)
    assert parse_fault("ENCLAVE_START=110") == (Command.ENCLAVE_START, 110)


@pytest.mark.parametrize("text", ["", "SLOT_ADD_MEM", "SLOT_ADD_MEM=", "SLOT_ADD_MEM=0", "NOTHING=EIO", "SLOT_FREE=EX"])
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_fault(text)
    assert str(caught.value) == f"--fail {text!r}: expected COMMAND=ERRNO, as in SLOT_ADD_MEM=ENOMEM"


def test_words_that_do_not_fit(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["simulate", "--carrier", "qemu", "--end-after", "1", "--", "true"]) == 125
    assert capfd.readouterr().err == "enclave: --end-after: with --carrier qemu, enclaves end by themselves\n"


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UnsupportedHostError) as caught:
        spawn(["true"], NE_MAGIC)
    assert str(caught.value) == "machine aarch64: programs can only be run against a simulated driver on x86_64"


@pytest.mark.usefixtures("permitted")
def test_where_seccomp_may_not_be_used() -> None:
    """A filter that has a listener admits no second one: as good a refusal as any."""
    program = (
        "from enclavekit.errors import MissingError\n"
        "from enclavekit.linux.seccomp import spawn\n"
        "try:\n    spawn(['true'], 0)\n"
        "except MissingError as error:\n    print(error.code, error)\n"
    )
    enclave = Path(sys.executable).with_name("enclave")
    done = subprocess.run(
        [enclave, "simulate", "--", sys.executable, "-c", program],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "missing seccomp user notification: device or resource busy\n"
