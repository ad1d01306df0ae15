# SPDX-License-Identifier: Apache-2.0
"""nitro-cli's commands for enclaves that run, and each of their failures from what really causes it.

What a launch needs a machine for is in tests/vm/test_nitro_run.py.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kernel_files import bzimage

from enclavekit import eif
from enclavekit.eif import BytesContent, Section, SectionType
from enclavekit.enclave.directory import claim
from enclavekit.errors import (
    DriverError,
    Error,
    HeartbeatError,
    LaunchError,
    NotEnoughHugePagesError,
    NotEnoughMemoryError,
)
from enclavekit.nitro_cli import cpus
from enclavekit.nitro_cli.codes import Code
from enclavekit.nitro_cli.command import NitroCliError
from enclavekit.nitro_cli.enclave_process import failure_of
from enclavekit.nitro_cli.enclaves import hypervisor_console
from enclavekit.nitro_cli.main import run_command
from enclavekit.nitro_cli.server import EnclaveServer
from enclavekit.nitro_cli.wire import CONFIRMATION, LENGTH, frame, read_frame, read_number, read_reply
from enclavekit.signing.certificate import self_signed
from enclavekit.signing.pem import PemSigner

ID = "i-0000000000000000-enc432cff93"
DESCRIBED = {"EnclaveName": "web", "EnclaveID": ID, "Flags": "NONE", "State": "RUNNING"}


class FakeEnclave:
    """What an enclave's process knows."""

    name, enclave_id, cid, flags = "web", ID, 16, 0

    def __init__(self) -> None:
        self.ended = 0
        self.was_removed = threading.Event()
        self.broken = False

    def describe(self, *, metadata: bool) -> dict[str, Any]:
        if self.broken:
            raise LaunchError("cannot be measured")
        return DESCRIBED | ({"ImageName": "web"} if metadata else {})

    def terminate(self) -> dict[str, Any]:
        if self.broken:
            raise LaunchError("it has not ended within 30 s")
        self.ended += 1
        return {"EnclaveName": self.name, "EnclaveID": self.enclave_id, "Terminated": True}

    def removed(self) -> None:
        self.was_removed.set()


@pytest.fixture(autouse=True)
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("sockets", "logs", "run", "bin"):
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.setenv("NITRO_CLI_SOCKETS_PATH", str(tmp_path / "sockets"))
    monkeypatch.setenv("NITRO_CLI_LOGS_PATH", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in ("RUST_LOG", "BACKTRACE", "ENCLAVEKIT_CARRIER"):
        monkeypatch.delenv(name, raising=False)
    qemu = tmp_path / "bin/qemu-system-x86_64"
    qemu.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "QEMU emulator version 11.1.0" && exit\nexit 1\n')
    qemu.chmod(0o755)
    monkeypatch.setenv("ENCLAVEKIT_QEMU", str(qemu))
    monkeypatch.setattr(cpus, "NE_CPUS", tmp_path / "ne_cpus")
    (tmp_path / "ne_cpus").write_text("1-3,9\n\n")
    monkeypatch.chdir(tmp_path)
    Path("a.eif").write_bytes(bytes(3 << 20))
    return tmp_path / "sockets"


@pytest.fixture
def web(sockets: Path) -> Iterator[FakeEnclave]:
    made = FakeEnclave()
    server = EnclaveServer(sockets / "432cff93.sock", made)
    yield made
    server.close()


@pytest.fixture
def web2(sockets: Path) -> Iterator[FakeEnclave]:
    made = FakeEnclave()
    made.enclave_id, made.cid, made.flags = "i-0000000000000000-enc1", 17, 1
    server = EnclaveServer(sockets / "1.sock", made)
    yield made
    server.close()


# What they print ------------------------------------------------------------------------------------------------------


def test_describe_enclaves(web: FakeEnclave, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["describe-enclaves"]) == 0
    assert capsys.readouterr().out == json.dumps([DESCRIBED], indent=2) + "\n"
    assert run_command(["describe-enclaves", "--metadata"]) == 0
    assert json.loads(capsys.readouterr().out) == [DESCRIBED | {"ImageName": "web"}]


def test_no_enclaves(sockets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["describe-enclaves"]) == 0
    assert capsys.readouterr().out == "[]\n"
    assert run_command(["terminate-enclave", "--all"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_a_socket_that_nobody_listens_at_is_removed(sockets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(sockets / "77.sock"))
    (sockets / "notes.txt").touch()
    assert run_command(["describe-enclaves"]) == 0
    assert capsys.readouterr().out == "[]\n"
    assert os.listdir(sockets) == ["notes.txt"]  # noqa: PTH208 - names


@pytest.mark.parametrize("named", [["--enclave-id", ID], ["--enclave-name", "web"]])
def test_terminate_enclave(web: FakeEnclave, named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["terminate-enclave", *named]) == 0
    captured = capsys.readouterr()
    assert captured.out == f'{{\n  "EnclaveName": "web",\n  "EnclaveID": "{ID}",\n  "Terminated": true\n}}\n'
    assert captured.err == f"Successfully terminated enclave {ID}.\n"
    assert web.ended == 1


def test_terminate_all(web: FakeEnclave, web2: FakeEnclave, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["terminate-enclave", "--all"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [one["EnclaveID"] for one in made] == [web2.enclave_id, ID]
    assert all(one["Terminated"] for one in made)


def test_the_console_of_an_enclave_that_is_ours(
    web2: FakeEnclave, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    directory = claim(tmp_path / "run/enclavekit", cid=web2.cid)
    (directory.path / "console.log").write_bytes(b"Linux version\r\n\xff")
    assert run_command(["console", "--enclave-name", "web", "--disconnect-timeout", "0"]) == 0
    directory.remove()
    assert capfdbinary.readouterr().out == (
        b"Connecting to the console for enclave 17...\nSuccessfully connected to the console.\nLinux version\r\n\xff"
    )


class Hypervisor:
    """Consoles, by port of CID 0."""

    def __init__(self, consoles: dict[int, socket.socket]) -> None:
        self.consoles = consoles

    def listen(self, port: int) -> socket.socket:
        raise NotImplementedError

    def connect(self, cid: int, port: int, timeout_s: float) -> socket.socket:
        assert cid == 0
        if port not in self.consoles:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return self.consoles[port]


def test_the_console_of_an_enclave_that_nitro_cli_started() -> None:
    ours, theirs = socket.socketpair()
    chunks = hypervisor_console(ID, 17, Hypervisor({10017: theirs}))
    assert next(chunks) == b""
    ours.sendall(b"Linux version\r\n\xff")
    assert next(chunks) == b"Linux version\r\n\xff"
    ours.close()
    assert list(chunks) == []
    with pytest.raises(NitroCliError) as caught:
        hypervisor_console(ID, 16, Hypervisor({}))
    assert (caught.value.code, caught.value.message) == (Code.CONSOLE_CONNECTION, f"{ID}: connection reset by peer")


# The protocol, byte by byte -------------------------------------------------------------------------------------------


def connect(sockets: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(sockets / "432cff93.sock"))
    return sock


def test_a_frame() -> None:
    assert frame("Run").hex() == "04000000000000006352756e"


def test_what_any_client_of_nitro_clis_gets(web: FakeEnclave, sockets: Path) -> None:
    with connect(sockets) as sock:
        sock.sendall(2 * frame("Describe") + frame({"metadata": False}))
        assert sock.recv(8, socket.MSG_WAITALL) == bytes.fromhex("c0ee000000000000")
        reply = read_reply(sock)
    assert (json.loads(reply.stdout), reply.status) == (DESCRIBED, 0)
    for name, number in (("GetEnclaveCID", 16), ("GetEnclaveFlags", 0)):
        with connect(sockets) as sock:
            sock.sendall(2 * frame(name))
            assert (read_number(sock), sock.recv(1)) == (number, b"")
    with connect(sockets) as sock:
        sock.sendall(2 * frame("GetIDbyName"))
        assert read_number(sock) == CONFIRMATION
        sock.sendall(frame("other"))
        assert [read_frame(sock), read_frame(sock)] == [{"Status": 0}, None]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x01", LENGTH.pack(1 << 62), LENGTH.pack(1) + b"\xff", frame("Describe") + frame("Terminate"),
        2 * frame("Run"), 2 * frame("NotPermitted"), 2 * frame(7), 2 * frame("Describe") + b"\x05" + bytes(7),
    ],
)  # fmt: skip
def test_hostile_clients(web: FakeEnclave, sockets: Path, data: bytes) -> None:
    with connect(sockets) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert len(sock.recv(1000)) in (0, 8)
    with connect(sockets) as sock:
        sock.sendall(2 * frame("GetEnclaveCID"))
        assert read_number(sock) == 16
    assert web.ended == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_other_users_may_look_and_no_more(web: FakeEnclave, sockets: Path) -> None:
    with tempfile.TemporaryDirectory() as shared:  # which other users reach
        Path(shared).chmod(0o755)
        path = Path(shared) / "432cff93.sock"
        server = EnclaveServer(path, web)
        try:
            for name, answered in (("GetEnclaveCID", True), ("Terminate", False)):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(10)
                    os.seteuid(65534)
                    try:
                        sock.connect(str(path))
                    finally:
                        os.seteuid(0)
                    sock.sendall(2 * frame(name))
                    assert (sock.recv(100) != b"") == answered
        finally:
            server.close()
    assert web.ended == 0


def test_whoever_removes_the_socket_ends_the_enclave(web: FakeEnclave, sockets: Path) -> None:
    (sockets / "432cff93.sock").unlink()
    assert web.was_removed.wait(60)


# Errors ---------------------------------------------------------------------------------------------------------------


def config(**words: Any) -> str:
    Path("config.json").write_text(json.dumps(words))
    return "config.json"


def nothing() -> None:
    """No preparation is needed."""


def put(path: str, text: str) -> Callable[[], None]:
    def prepare() -> None:
        Path(path).write_text(text)

    return prepare


def variable(name: str, value: str) -> Callable[[], None]:
    def prepare() -> None:
        os.environ[name] = value  # monkeypatch has set it before, and restores it

    return prepare


RUN = ["run-enclave", "--eif-path", "a.eif", "--memory", "64"]
EIF = {"eif_path": "a.eif", "memory_mib": 64}

ERRORS: list[tuple[Callable[[], object], list[str], str, int]] = [
    (lambda: config(**EIF), ["run-enclave", "--config", "config.json"], "E01", 1),
    (lambda: config(**EIF, cpu_count=1, cpu_ids=[1]), ["run-enclave", "--config", "config.json"], "E02", 2),
    (nothing, [*RUN[:3], "--memory", "2x", "--cpu-count", "1"], "E03", 3),
    (nothing, [*RUN, "--cpu-count", "two"], "E03", 3),
    (nothing, [*RUN, "--cpu-count", "1", "--enclave-cid", "3"], "E03", 3),
    (nothing, [*RUN, "--cpu-count", "1", "--enclave-cid", "4294967296"], "E03", 3),
    (variable("NITRO_CLI_SOCKETS_PATH", "none"), ["describe-enclaves"], "E07", 7),
    (nothing, ["terminate-enclave", "--enclave-id", "i-1-enc77"], "E11", 11),
    (nothing, ["terminate-enclave", "--enclave-id", "../x"], "E11", 11),
    (nothing, ["console", "--enclave-id", ID], "E11", 11),
    (put("config.json", "{"), ["run-enclave", "--config", "config.json"], "E17", 17),
    (lambda: config(memory_mib=64, cpu_count=1), ["run-enclave", "--config", "config.json"], "E17", 17),
    (lambda: config(**EIF, cpu_count="1"), ["run-enclave", "--config", "config.json"], "E17", 17),
    (lambda: config(**EIF, cpu_count=1, cpus=1), ["run-enclave", "--config", "config.json"], "E17", 17),
    (nothing, ["run-enclave", "--config", "none.json"], "E19", 19),
    (variable("NITRO_CLI_LOGS_PATH", "none"), ["describe-enclaves"], "E19", 19),
    (nothing, ["run-enclave", "--eif-path", "none.eif", "--memory", "64", "--cpu-count", "1"], "E19", 39),
    (nothing, [*RUN, "--cpu-ids", "1", "2", "1"], "E20", 39),
    (nothing, [*RUN, "--cpu-ids", "1", "4"], "E21", 39),
    (nothing, [*RUN, "--cpu-count", "5"], "E22", 39),
    (put("ne_cpus", "1,x"), [*RUN, "--cpu-count", "1"], "E23", 39),
    (put("ne_cpus", "3-1"), [*RUN, "--cpu-count", "1"], "E24", 39),
    (nothing, [*RUN[:3], "--memory", "11", "--cpu-count", "1"], "E26", 39),
    (nothing, [*RUN[:3], "--memory", "0", "--cpu-count", "1"], "E26", 39),
    (nothing, [*RUN[:3], "--memory", "900T", "--cpu-count", "1"], "E27", 39),
    (nothing, [*RUN, "--cpu-count", "0"], "E29", 39),
    (variable("ENCLAVEKIT_QEMU", "/none"), [*RUN, "--cpu-count", "1"], "E19", 39),
    (nothing, ["terminate-enclave", "--enclave-name", "web"], "E58", 58),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prepare", "words", "code", "status"), ERRORS, ids=[f"{number}-{error[2]}" for number, error in enumerate(ERRORS)]
)
def test_errors(
    prepare: Callable[[], object], words: list[str], code: str, status: int, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    prepare()
    assert run_command(words) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"[ {code} ] ")
    assert f"https://docs.aws.amazon.com/enclaves/latest/user/cli-errors.html#{code}\n" in captured.err
    if status == 39:
        assert "\nFailed connections: 1\n[ E39 ] " in captured.err


def test_two_of_one_name(web: FakeEnclave, web2: FakeEnclave, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["terminate-enclave", "--enclave-name", "web"]) == 58
    assert "2 enclaves have the name 'web'" in capsys.readouterr().err
    assert web.ended + web2.ended == 0


def test_a_command_that_fails(web: FakeEnclave, capsys: pytest.CaptureFixture[str]) -> None:
    web.broken = True
    assert run_command(["describe-enclaves"]) == 39  # it said nothing that could be printed
    assert capsys.readouterr().err.startswith("Failed connections: 1\n[ E39 ]")


@pytest.mark.parametrize("named", [["--enclave-id", ID], ["--all"]])
def test_an_enclave_that_does_not_end(web: FakeEnclave, named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    web.broken = True
    assert run_command(["terminate-enclave", *named]) == 38
    assert "it has not ended within 30 s\n" in capsys.readouterr().err


def test_another_users_words_cannot_play_with_a_terminal(sockets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Hostile(FakeEnclave):
        def terminate(self) -> dict[str, Any]:
            raise LaunchError("\x1b[2J\x9b")

    server = EnclaveServer(sockets / "432cff93.sock", Hostile())
    try:
        assert run_command(["terminate-enclave", "--enclave-id", ID]) == 38
    finally:
        server.close()
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "\\x1b[2J\\x9b" in error


def test_no_console_in_production_mode(web: FakeEnclave, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["console", "--enclave-name", "web"]) == 44
    assert capsys.readouterr().err.startswith("[ E44 ]")


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: b"no image", "E35"),
        (lambda: signed(datetime.now(UTC) - timedelta(days=11)), "E59"),
        (lambda: signed(datetime.now(UTC)), "E29"),  # a QEMU that fails
    ],
)
def test_what_its_process_finds(make: Callable[[], bytes], code: str) -> None:
    Path("b.eif").write_bytes(make())
    program = (
        "import sys; from pathlib import Path; from enclavekit.nitro_cli import cpus, main;"
        "cpus.NE_CPUS = Path('ne_cpus'); sys.exit(main.run_command(sys.argv[1:]))"
    )
    Path("ne_cpus").write_text(",".join(map(str, sorted(os.sched_getaffinity(0)))))
    done = subprocess.run(
        [sys.executable, "-c", program, "run-enclave", "--eif-path", "b.eif", "--memory", "256", "--cpu-count", "1"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (39, "")
    assert f"[ {code} ]" in done.stderr
    assert done.stderr.startswith("Start allocating memory...\n")
    assert "\nFailed connections: 1\n[ E39 ]" in done.stderr
    assert list(Path("sockets").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotEnoughHugePagesError("x"), Code.INSUFFICIENT_MEMORY),
        (NotEnoughMemoryError("x"), Code.INSUFFICIENT_MEMORY_REQUESTED),
        (HeartbeatError("x"), Code.ENCLAVE_BOOT),
        (DriverError("x"), Code.IOCTL),
    ],
)
def test_the_code_of_an_error(error: Error, code: Code) -> None:
    assert failure_of(error, "a.eif").code is code


def signed(first: datetime) -> bytes:
    key = PemSigner.generate("P-384")
    certificate = self_signed(key, common_name="x", first=first, days=10)
    out = io.BytesIO()
    parts = {
        SectionType.KERNEL: bzimage(b"payload"),
        SectionType.CMDLINE: b"quiet",
        SectionType.METADATA: b"{}",
        SectionType.RAMDISK: b"",
    }
    eif.write(
        out,
        [Section(kind, BytesContent(data)) for kind, data in parts.items()],
        arch=eif.Arch.X86_64,
        sign=lambda measurements: bytes(eif.sign(measurements.pcr0, certificate, key)),
    )
    return out.getvalue()


# Logs -----------------------------------------------------------------------------------------------------------------


def test_the_log_and_the_file_of_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["terminate-enclave", "--enclave-id", "i-1-enc\x1b77"]) == 11
    assert "\nThe backtrace is in " in capsys.readouterr().err
    log = tmp_path / "logs/nitro_enclaves.log"
    first, second = log.read_text().splitlines()
    when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(rf"\[nitro-cli:{os.getpid()}\]\[INFO\]\[{when}\]\[main\.py:\d+\] terminate-enclave", first)
    assert "][ERROR][" in second
    assert "\\x1b" in second
    assert log.stat().st_mode & 0o777 == 0o766
    (written,) = (tmp_path / "logs").glob("err*.log")
    assert re.fullmatch(r"err\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}\+00:00\.log", written.name)
    assert [line.split(":")[0] for line in written.read_text().splitlines() if line.startswith("  ")][:2] == [
        "  Action", "  Subactions",
    ]  # fmt: skip


def test_a_backtrace_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("BACKTRACE", "1")
    monkeypatch.setenv("RUST_LOG", "error")
    assert run_command(["run-enclave", "--config", "none.json"]) == 19
    error = capsys.readouterr().err
    assert "\nFile: 'none.json', failing operation: 'Open'.\n" in error
    lines = error[error.index("Backtrace:") :].splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "Backtrace", "  Action", "  Subactions", "    cannot read none.json", "    [Errno 2] No such file or directory",
        "  Root error file", "  Root error line", "  Version",
    ]  # fmt: skip
    assert "INFO" not in Path("logs/nitro_enclaves.log").read_text()
