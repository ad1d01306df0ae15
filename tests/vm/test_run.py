# SPDX-License-Identifier: Apache-2.0
"""``enclave run`` on real machines: output, status, limits, signals, and that nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
from pathlib import Path

import pytest
from conftest import Enclave, qemu_of, stop


def source(rootfs: Path) -> str:
    return f"dir:{rootfs}"


@pytest.mark.parametrize("status", [0, 42, 255])
def test_the_applications_status_is_ours(enclave: Enclave, rootfs: Path, status: int) -> None:
    done = enclave("run", source(rootfs), "--", "sh", "-c", f"exit {status}")
    assert done.returncode == status, done.stderr
    assert enclave.left() == []


def test_a_signal_is_128_and_its_number(enclave: Enclave, rootfs: Path) -> None:
    done = enclave("run", source(rootfs), "--json", "--", "sh", "-c", "kill -9 $$")
    assert done.returncode == 137, done.stderr
    result = json.loads(done.stdout)
    assert (result["reason"], result["exit_code"], result["signal"]) == ("signalled", None, 9)


def test_output_by_the_images_own_choice(enclave: Enclave, rootfs: Path) -> None:
    done = enclave("run", source(rootfs), "--logs", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert done.returncode == 3
    assert sorted(done.stdout.split()) == ["err", "out"]
    assert done.stderr == ""


def test_a_long_output_comes_whole(enclave: Enclave, rootfs: Path) -> None:
    script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"
    done = enclave("run", source(rootfs), "--logs", "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"line {number}\n" for number in range(20000))


def test_without_either_one_line_says_how_to_see_output(enclave: Enclave, rootfs: Path) -> None:
    done = enclave("run", source(rootfs), "--", "sh", "-c", "echo out; exit 0")
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr == (
        "enclave: the image keeps its output to itself: build it with --logs, or run it with --debug\n"
    )


def test_debug_mode_shows_the_console(enclave: Enclave, rootfs: Path) -> None:
    done = enclave("run", source(rootfs), "--debug", "--", "sh", "-c", "echo from the application")
    assert done.returncode == 0
    assert "from the application" in done.stdout


@pytest.mark.parametrize("cpus", [1, 2])
def test_cpus_memory_and_kernel_command_line(enclave: Enclave, rootfs: Path, cpus: int) -> None:
    script = "nproc; awk '/MemTotal/ {print $2}' /proc/meminfo; cat /proc/cmdline"
    done = enclave("run", source(rootfs), "--logs", "--cpus", str(cpus), "--memory", "512M", "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    count, memory, cmdline = done.stdout.splitlines()
    assert int(count) == cpus
    assert 400 << 10 < int(memory) <= 512 << 10
    assert cmdline.startswith("reboot=k panic=1 pci=off console=ttyS0 quiet ")


def test_values_that_differ_from_launch_to_launch(enclave: Enclave, rootfs: Path, tmp_path: Path) -> None:
    image, secret = tmp_path / "a.eif", tmp_path / "secret"
    secret.write_bytes(bytes(range(256)) * 200)
    declared = [word for name in ("NAME", "tls.key", "NONE") for word in ("--launch-value", name)]
    script = "cd /run/enclave; stat -c '%n %s %a %U' *; cat NAME; sha256sum < tls.key; touch x; [ -f NONE ] || echo no"
    built = enclave(
        "build", source(rootfs), "-o", image, "--logs", "--user", "app", *declared, "--", "sh", "-c", script
    )
    assert built.returncode == 0, built.stderr
    done = enclave("run", image, "--set", "NAME=one\n", "--secret-file", f"tls.key={secret}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "NAME 4 400 app",
        "tls.key 51200 400 app",
        "one",
        f"{hashlib.sha256(secret.read_bytes()).hexdigest()}  -",
        "touch: x: Permission denied",
        "no",
    ]
    refused = enclave("run", image, "--set", "NAM=x")
    assert refused.returncode == 125
    assert refused.stderr.startswith("enclave: launch value 'NAM': not one that the image declares (NAME, tls.key")


def test_the_images_configuration(enclave: Enclave, rootfs: Path) -> None:
    strange = "a\nb \udcff="
    done = enclave(
        "run", source(rootfs), "--logs", "--user", "app", "--workdir", "/made/for/it", "--env", f"STRANGE={strange}",
        "--", "sh", "-c", 'printf %s "$STRANGE"; echo; id -u; id -g; pwd; echo $PATH; [ "$1" = "x\ny" ]', "sh", "x\ny",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == f"{strange}\n1000\n1000\n/made/for/it\n/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
    )


def test_programs_are_looked_up_in_the_images_own_path(enclave: Enclave, rootfs: Path, tmp_path: Path) -> None:
    done = enclave("run", source(rootfs), "--env", "PATH=/nowhere:/etc/../bin", "--", "sh", "-c", "exit 7")
    assert done.returncode == 7, done.stderr


def test_a_program_that_is_not_there(enclave: Enclave, rootfs: Path) -> None:
    done = enclave("run", source(rootfs), "--json", "--", "/bin/absent")
    assert done.returncode == 125
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["code"] == "guest"
    assert error["message"] == "init: cannot run /bin/absent: no such file or directory"


def test_timeout(enclave: Enclave, rootfs: Path) -> None:
    done = enclave("run", source(rootfs), "--timeout", "12", "--", "sleep", "1000")
    assert done.returncode == 124
    assert "enclave: stopped after 12 s" in done.stderr
    assert enclave.left() == []


def test_a_kernel_panic_is_told_from_an_end(enclave: Enclave, rootfs: Path) -> None:
    done = enclave(
        "run", source(rootfs), "--json", "--cmdline", "reboot=k panic=1 console=ttyS0 rdinit=/absent init=/absent",
        "--", "sh",
    )  # fmt: skip
    assert done.returncode == 125
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["code"] == "panic"
    assert "Kernel panic - not syncing" in error["message"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 5), (signal.SIGTERM, 5)])
def test_a_signal_to_us_stops_the_application(
    enclave: Enclave, rootfs: Path, number: signal.Signals, code: int
) -> None:
    script = f"trap 'exit {code}' TERM; echo ready; while :; do sleep 1; done"
    process = enclave.start("run", source(rootfs), "--logs", "--", "sh", "-c", script)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(30) == code
        assert enclave.left() == []
    finally:
        stop(process)


def test_qemu_does_not_outlive_us(enclave: Enclave, rootfs: Path) -> None:
    process = enclave.start("run", source(rootfs), "--logs", "--", "sh", "-c", "echo ready; sleep 1000")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (qemu,) = qemu_of(process.pid)
        pidfd = os.pidfd_open(qemu)
        process.kill()
        ended, _, _ = select.select([pidfd], [], [], 10)
        os.close(pidfd)
        assert ended, "QEMU runs on after its parent was killed"
    finally:
        stop(process)
    assert len(enclave.left()) == 1
    done = enclave("run", source(rootfs), "--", "sh", "-c", "exit 0")
    assert done.returncode == 0, done.stderr
    assert enclave.left() == [], "what the killed one left is swept by the next"


def test_a_qemu_that_somebody_ends_is_told_from_an_application_that_ended(enclave: Enclave, rootfs: Path) -> None:
    process = enclave.start("run", source(rootfs), "--logs", "--json", "--", "sh", "-c", "echo ready; sleep 1000")
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == b"ready\n"
        (qemu,) = qemu_of(process.pid)
        os.kill(qemu, signal.SIGTERM)
        assert process.wait(30) == 125
        error = json.loads(process.stderr.read())["error"]
        assert (error["code"], error["message"]) == ("carrier", "QEMU was ended by a signal from outside")
    finally:
        stop(process)
    assert enclave.left() == []


def test_two_at_once_have_their_own_ids_and_cids(enclave: Enclave, rootfs: Path, tmp_path: Path) -> None:
    image = tmp_path / "two.eif"
    assert (
        enclave("build", source(rootfs), "-o", image, "--logs", "--", "sh", "-c", "echo ready; sleep 3").returncode == 0
    )
    both = [enclave.start("run", image) for _ in range(2)]
    try:
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        states = [json.loads((enclave.directory / name / "state.json").read_text()) for name in enclave.left()]
        assert sorted(state["cid"] for state in states) == [16, 17]
        assert [process.wait(60) for process in both] == [0, 0]
    finally:
        for process in both:
            stop(process)
    assert enclave.left() == []
