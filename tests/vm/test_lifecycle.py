# SPDX-License-Identifier: Apache-2.0
"""Enclaves in the background: seen, followed, talked to, stopped; and every way in which one can end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Enclave, qemu_of, stop

SERVICE = "trap 'echo stopping; exit 5' TERM; echo up; while true; do sleep 1 & wait $!; done"


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, rootfs: Path) -> Path:
    """Runs until it is stopped, and then exits with 5."""
    path = tmp_path_factory.mktemp("image") / "service.eif"
    done = Enclave(path.parent)("build", f"dir:{rootfs}", "-o", path, "--logs", "--", "sh", "-c", SERVICE)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def ending(enclave: Enclave) -> Iterator[None]:
    """Whatever a test leaves running is stopped."""
    yield
    names = [state["id"] for state in states(enclave) if state["state"] != "ended"]
    if names:
        enclave("stop", "--grace", "0", *names)


def states(enclave: Enclave, *words: str) -> list[dict[str, Any]]:
    done = enclave("ps", "--json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["enclaves"]  # type: ignore[no-any-return]


def detach(enclave: Enclave, *words: str | Path) -> str:
    done = enclave("run", "-d", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def last(enclave: Enclave) -> dict[str, Any]:
    return states(enclave, "--all")[-1]


@pytest.mark.usefixtures("ending")
def test_a_life(enclave: Enclave, image: Path) -> None:
    made = detach(enclave, image, "--name", "web")
    (state,) = states(enclave)
    assert (state["id"], state["name"], state["cid"], state["state"]) == (made, "web", 16, "running")
    assert state["uptime_s"] > 0
    assert state["cpu_s"] > 0
    assert state["resident"] > 1 << 20
    assert (state["vsock_received"] > 0, state["connections"]) == (True, 1)
    described = json.loads(enclave("describe", "web", "--json").stdout)["enclave"]
    assert {key: described[key] for key in ("id", "cid", "pid")} == {key: state[key] for key in ("id", "cid", "pid")}
    assert enclave("logs", "web").stdout == "up\n"
    refused = enclave("run", "-d", image, "--name", "web")
    assert (refused.returncode, refused.stderr.splitlines()[0]) == (125, f"enclave: name web: enclave {made} has it")
    follower, waiter = enclave.start("logs", "-f", made), enclave.start("wait", "web")
    try:
        done = enclave("stop", "web")
        assert (done.returncode, done.stdout) == (0, "web: exited 5\n")
        assert follower.communicate(timeout=10)[0] == b"up\nstopping\n"
        assert waiter.wait(10) == 5
    finally:
        stop(follower)
        stop(waiter)
    assert states(enclave) == []
    state = last(enclave)
    assert (state["reason"], state["exit_code"], state["state"]) == ("exited", 5, "ended")
    assert enclave("logs", "web").stdout == "up\nstopping\n"
    assert enclave("wait", made).returncode == 5
    assert enclave("stop", "web").returncode == 1
    assert enclave.left() == []


@pytest.mark.usefixtures("ending")
def test_an_application_that_does_not_end_is_ended(enclave: Enclave, rootfs: Path) -> None:
    detach(enclave, f"dir:{rootfs}", "--name", "x", "--", "sh", "-c", "trap '' TERM; while true; do sleep 1; done")
    done = enclave("stop", "x", "--grace", "1")
    assert (done.returncode, done.stdout) == (0, "x: signalled 9\n")


def test_one_that_does_not_come_up_says_why(enclave: Enclave, rootfs: Path) -> None:
    done = enclave("run", "-d", f"dir:{rootfs}", "--json", "--", "/none")
    assert done.returncode == 125
    assert done.stdout == ""
    error = json.loads(done.stderr)["error"]
    assert (error["code"], error["message"]) == ("guest", "init: cannot run /none: no such file or directory")
    assert last(enclave)["reason"] == "guest"
    assert enclave.left() == []


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_process_leaves_nothing(enclave: Enclave, image: Path) -> None:
    detach(enclave, image, "--name", "web")
    (state,) = states(enclave)
    machines = qemu_of(state["pid"])
    assert len(machines) == 1
    waiter = enclave.start("wait", "web")
    try:
        while not Path(f"/proc/{waiter.pid}/fd").exists():
            pass
        os.kill(state["pid"], signal.SIGKILL)
        wait_gone(machines)
        assert waiter.wait(20) == 125
    finally:
        stop(waiter)
    assert states(enclave) == []
    assert last(enclave)["reason"] == "killed"
    assert enclave.left() == []
    assert detach(enclave, image, "--name", "web")
    assert [state["cid"] for state in states(enclave)] == [16]
    assert enclave("stop", "web").returncode == 0


def test_a_killed_machine_is_told(enclave: Enclave, image: Path) -> None:
    detach(enclave, image, "--name", "web")
    (state,) = states(enclave)
    os.kill(qemu_of(state["pid"])[0], signal.SIGKILL)
    assert enclave("wait", "web").returncode == 125
    state = last(enclave)
    assert (state["reason"], state["message"]) == ("carrier", "QEMU was killed by signal 9")


def test_a_panic_and_a_lack_of_memory_are_told_apart(enclave: Enclave, rootfs: Path) -> None:
    for script, reason in (
        ("echo c > /proc/sysrq-trigger; sleep 60", "panic"),
        # tmpfs, and so nothing that the kernel could kill, fills the memory: then there is only the shell itself.
        ("a=x; while true; do a=$a$a; done", "out-of-memory"),
    ):
        words = ["run", f"dir:{rootfs}", "--memory", "256M", "--", "sh", "-c", script]
        done = enclave(*words)
        assert last(enclave)["reason"] == reason, done.stderr


@pytest.mark.usefixtures("ending")
def test_a_web_client_by_tcp_and_by_unix_socket(enclave: Enclave, rootfs: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["run", "-d", f"dir:{rootfs}", "--name", "echo", "--publish", f"{port}:7000", "--logs"]
    done = enclave(*words, "--", "sh", "-c", "while true; do vsock echo 7000; done")
    assert done.returncode == 0, done.stderr
    for _ in range(3):
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), 10) as client:
                client.sendall(b"hello")
                client.shutdown(socket.SHUT_WR)
                received = b""
                while part := client.recv(100):
                    received += part
                if received:
                    break
            assert time.monotonic() < deadline  # between two of its lives nobody listens there
        assert received == b"hello"
    connected = subprocess.Popen(
        [*enclave.words("connect", "echo", "7000")],
        env=enclave.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert connected.communicate(b"by the command", timeout=30)[0] in (b"by the command", b"")
    assert enclave("connect", "echo", "7001").returncode == 1


@pytest.mark.usefixtures("ending")
def test_where_the_parents_ports_lead(enclave: Enclave, rootfs: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp:
        unix.bind(str(tmp_path / "sock"))
        tcp.bind(("127.0.0.1", 0))
        words = [
            "run", f"dir:{rootfs}", "--logs", "--listen", f"5000=unix:{tmp_path}/sock",
            "--listen", f"5001=tcp:127.0.0.1:{tcp.getsockname()[1]}", "--",
            "sh", "-c", "vsock dial 5000 one; vsock dial 5001 two",
        ]  # fmt: skip

        def serve(listener: socket.socket) -> None:
            listener.listen()
            client, _ = listener.accept()
            with client:
                data = b""
                while part := client.recv(100):
                    data += part
                client.sendall(data.upper())

        threads = [threading.Thread(target=serve, args=(listener,)) for listener in (unix, tcp)]
        for thread in threads:
            thread.start()
        done = enclave(*words)
        for thread in threads:
            thread.join(30)
    assert done.stdout == "ONETWO", done.stderr


@pytest.mark.usefixtures("ending")
def test_the_console_is_for_debug_mode_only(enclave: Enclave, image: Path) -> None:
    detach(enclave, image, "--name", "quiet")
    done = enclave("console", "quiet")
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2,
        "enclave: enclave quiet: runs in production mode, which has no console",
    )
    assert not list(enclave.directory.glob("*/console.log"))
    assert enclave("stop", "quiet").returncode == 0
    detach(enclave, image, "--name", "loud", "--debug")
    assert enclave("console", "loud", "--no-follow").returncode == 0


def own_memory(pid: int) -> int:
    """Proportional bytes of a supervisor, its guest's memory left out."""
    total, guest = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            guest = "memfd:enclave-memory" in line
        elif words[0] == "Pss:" and not guest:
            total += int(words[1]) << 10
    return total


def answer(enclave: Enclave, name: str, port: int, question: bytes) -> bytes:
    """What a program inside says; it may not listen yet."""
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            enclave.words("connect", name, str(port)),
            env=enclave.environment(), input=question, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        if done.stdout or time.monotonic() > deadline:
            return done.stdout


@pytest.mark.usefixtures("ending")
def test_ten_at_once(enclave: Enclave, rootfs: Path, tmp_path: Path) -> None:
    script = "trap 'exit 5' TERM; while true; do vsock echo 7000 & wait $!; done"
    image = tmp_path / "echo.eif"
    done = enclave("build", f"dir:{rootfs}", "-o", image, "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    names = [f"e{number}" for number in range(10)]
    starting = [enclave.start("run", "-d", image, "--memory", "128M", "--name", name) for name in names]
    try:
        said = [one.communicate(timeout=200) for one in starting]
    finally:
        for one in starting:
            stop(one)
    assert [one.returncode for one in starting] == [0] * 10, said
    found = states(enclave)
    assert len({state["id"] for state in found}) == 10
    assert sorted(state["cid"] for state in found) == list(range(16, 26))
    assert [answer(enclave, name, 7000, name.encode()) for name in names] == [name.encode() for name in names]
    memory = max(own_memory(state["pid"]) for state in found)
    print(f"one of ten: {memory / (1 << 20):.1f} MiB")  # noqa: T201
    assert memory < 40 << 20
    done = enclave("stop", *names)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name}: exited 5" for name in names]
    assert enclave.left() == []


@pytest.mark.usefixtures("ending")
def test_a_flood_of_output_is_bounded_and_holds_nobody_up(enclave: Enclave, rootfs: Path) -> None:
    script = "cat /dev/zero | head -c 104857600; echo; echo end; exit 4"
    detach(enclave, f"dir:{rootfs}", "--name", "flood", "--logs", "--", "sh", "-c", script)
    done = enclave("wait", "flood")
    assert done.returncode == 4, done.stderr
    place = enclave.directory / "ended" / last(enclave)["id"]
    sizes = {path.name: path.stat().st_size for path in place.iterdir() if path.name.startswith("output")}
    assert set(sizes) == {"output.log", "output.log.1"}
    assert max(sizes.values()) <= 4 << 20
    kept = (place / "output.log.1").read_bytes() + (place / "output.log").read_bytes()
    assert kept.endswith(b"\0\nend\n")


@pytest.mark.usefixtures("ending")
def test_a_flood_on_the_console_is_bounded(enclave: Enclave, rootfs: Path) -> None:
    script = "i=0; while [ $i -lt 40 ]; do cat /proc/kallsyms | head -c 200000; i=$((i+1)); done; exit 4"
    words = ["run", "-d", f"dir:{rootfs}", "--name", "loud", "--debug", "--", "sh", "-c", script]
    assert enclave(*words).returncode == 0
    assert enclave("wait", "loud").returncode == 4
    place = enclave.directory / "ended" / last(enclave)["id"]
    assert max(path.stat().st_size for path in place.glob("console.log*")) <= 4 << 20
    assert b"init: " not in (place / "console.log").read_bytes()


def test_a_reader_that_never_reads_does_not_keep_the_enclave(enclave: Enclave, rootfs: Path) -> None:
    process = enclave.start("run", f"dir:{rootfs}", "--logs", "--timeout", "12", "--", "sh", "-c", "cat /dev/zero")
    try:
        assert process.wait(60) == 124
    finally:
        stop(process)
    assert enclave.left() == []


def test_a_state_directory_that_somebody_removed(enclave: Enclave, image: Path) -> None:
    detach(enclave, image, "--name", "web")
    (state,) = states(enclave)
    machines = qemu_of(state["pid"])
    shutil.rmtree(enclave.directory / state["id"])
    assert states(enclave) == []
    other = detach(enclave, image, "--name", "web")
    assert [state["id"] for state in states(enclave)] == [other]
    os.kill(state["pid"], signal.SIGTERM)  # asks the application to end, as ever
    wait_gone([state["pid"], *machines])
    assert enclave("stop", "web").returncode == 0
