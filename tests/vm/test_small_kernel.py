# SPDX-License-Identifier: Apache-2.0
"""Our own kernel: what it is configured with, what it can do, how little it takes, and that it boots as on EC2."""

from __future__ import annotations

import contextlib
import json
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import HERE, Enclave, stop

from enclavekit.eif import FileContent, read
from enclavekit.image.kernel_features import LearnedFrom, kernel_features
from enclavekit.kernel.configuration import OFF, Target, fragments, merge, parse

pytestmark = pytest.mark.timeout(1800)  # its build, where there is none yet

MIB = 1 << 20
LARGEST = 3 * MIB
SUCCESS = 42
ANSWERS = 25
SKIPPABLE = {"kvm-clock", "ptp"}
"""Where the machine itself has no such thing: emulation has neither of KVM's clocks."""
CONNECT_TRIES = 300


@pytest.fixture(scope="module")
def root(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the program that uses each feature."""
    root = tmp_path_factory.mktemp("kernel") / "root"
    shutil.copytree(rootfs, root, symlinks=True)
    subprocess.run(
        [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-Os", "-static", "-s", "-o",
         root / "bin/features", HERE / "guest/features.c"],
        check=True,
    )  # fmt: skip
    return root


def build(enclave: Enclave, image: Path, root: Path, *words: str, kernel: str | None) -> str:
    named = ["--kernel", kernel] if kernel else []
    done = enclave("build", f"dir:{root}", "-o", image, "--logs", *named, "--", *words)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_it_is_configured_as_the_fragments_say(small_kernel: Path) -> None:
    """What the kernel itself carries, hardening above all, against every option that we ask for."""
    with small_kernel.open("rb") as file:
        found = kernel_features(FileContent(file, 0, small_kernel.stat().st_size, "kernel"))
    assert found.learned_from is LearnedFrom.CONFIGURATION
    wanted = merge(option for name, text in fragments(Target.X86_64) for option in parse(text, name))
    assert len(wanted) > 100
    wrong = {
        option.name: found.configuration.get(option.name)
        for option in wanted.values()
        if found.configuration.get(option.name, OFF) != option.value
    }
    assert wrong == {}
    assert "CONFIG_NETFILTER" not in found.configuration
    assert small_kernel.stat().st_size <= LARGEST


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data = self.request.recv(16)
        self.request.sendall(data)


@contextlib.contextmanager
def echo(path: Path) -> Iterator[None]:
    """A program of the parent's that gives back what it gets."""
    with socketserver.ThreadingUnixStreamServer(str(path), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def answers(root: Path, small_kernel_name: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the program inside says of each feature: one boot, with four CPUs and five GiB, on a machine like EC2's."""
    directory = tmp_path_factory.mktemp("features")
    enclave, image = Enclave(directory), directory / "features.eif"
    build(enclave, image, root, "/bin/features", "4", "5120", kernel=small_kernel_name)
    with echo(directory / "echo.sock"):
        process = enclave.start(
            "run", image, "--name", "features", "--cpus", "4", "--memory", "5G", "--platform", "nitro", "--listen",
            f"7001=unix:{directory / 'echo.sock'}",
        )  # fmt: skip
        try:
            called = ""
            for _ in range(CONNECT_TRIES):  # until it listens, nobody answers
                called = enclave("connect", "features", "7002").stdout
                if called or process.poll() is not None:
                    break
            output, said = process.communicate(timeout=300)
        finally:
            stop(process)
    assert called == "world", (output, said)
    found = dict(line.split(": ", 1) for line in output.decode().splitlines() if ": " in line)
    assert (process.returncode == SUCCESS) is not any(answer.startswith("no") for answer in found.values()), output
    return found


@pytest.mark.parametrize(
    "feature",
    ["cpus", "memory", "vsock-loopback", "vsock-out", "vsock-in", "nsm", "hwrng", "random", "cgroups", "namespaces",
     "seccomp", "bpf", "landlock", "overlay", "tun", "ipv4", "ipv6", "sysv", "no-netfilter", "no-memory-files",
     "no-modules", "no-acpi", "sysctls", "kvm-clock", "ptp"],
)  # fmt: skip
def test_each_promised_feature_inside(answers: dict[str, str], feature: str) -> None:
    assert len(answers) == ANSWERS
    if answers[feature].startswith("skipped: "):
        assert feature in SKIPPABLE
        pytest.skip(f"{feature}: {answers[feature].removeprefix('skipped: ')}")
    assert answers[feature] == "yes"


def test_it_takes_little_memory(enclave: Enclave, root: Path, small_kernel_name: str, tmp_path: Path) -> None:
    """Of 128 MiB: all that is not free but the root file system, which is memory too."""
    image = tmp_path / "memory.eif"
    build(enclave, image, root, "/bin/cat", "/proc/meminfo", kernel=small_kernel_name)
    with image.open("rb") as file:
        ramdisks = sum(section.size for section in read(file).ramdisks)
    done = enclave("run", image, "--memory", "128M", "--platform", "nitro")
    assert done.returncode == 0, done.stderr
    free = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("MemFree:"))
    taken = 128 * MIB - free * 1024 - ramdisks
    assert taken <= 24 * MIB


@pytest.mark.parametrize(
    "words",
    [[], ["--platform", "nitro"], ["--boot", "linux"], ["--boot", "pvh"], ["--boot", "realmode"]],
    ids=["default", "nitro", "linux", "pvh", "realmode"],
)
def test_one_image_boots_on_every_machine(
    enclave: Enclave, root: Path, small_kernel_name: str, tmp_path: Path, words: list[str]
) -> None:
    image = tmp_path / "one.eif"
    said = build(enclave, image, root, "/bin/sh", "-c", "uname -r; exit 42", kernel=small_kernel_name)
    assert "EC2" not in said
    done = enclave("run", image, *words)
    assert (done.returncode, done.stdout.strip()) == (SUCCESS, small_kernel_name.partition("+")[0]), done.stderr


def test_debians_kernel_is_told_why_it_would_not_boot_on_ec2(enclave: Enclave, root: Path, tmp_path: Path) -> None:
    image = tmp_path / "debian.eif"
    assert "does not boot on EC2" in build(enclave, image, root, "/bin/true", kernel=None)
    done = enclave("run", image, "--platform", "nitro", "--json")
    assert done.returncode == 125
    error = json.loads(done.stderr)["error"]
    assert "no virtio-mmio devices from the command line and no MP table" in error["message"]
    assert "enclave kernel build" in error["hint"]
    assert enclave.left() == []


def test_lint_warns_of_a_kernel_that_cannot_boot_on_ec2(
    enclave: Enclave, root: Path, small_kernel_name: str, tmp_path: Path
) -> None:
    for kernel, expected in ((None, True), (small_kernel_name, False)):
        image = tmp_path / "linted.eif"
        build(enclave, image, root, "/bin/true", kernel=kernel)
        assert ("ec2-discovery" in enclave("lint", image, "--json").stdout) is expected


def test_the_lock_pins_it_and_names_its_compiler(
    enclave: Enclave, root: Path, small_kernel: Path, small_kernel_name: str, tmp_path: Path
) -> None:
    lock = tmp_path / "enclave.lock"
    words = ("build", f"dir:{root}", "-o", tmp_path / "a.eif", "--lock", lock, "--kernel")
    assert enclave(*words, small_kernel_name, "--", "/bin/true").returncode == 0
    pinned = next(one for one in json.loads(lock.read_text())["inputs"] if one["name"] == "kernel")
    assert "gcc" in pinned["what"]
    # Without a word about the kernel, the lock chooses it: by its digest.
    locked = enclave("build", f"dir:{root}", "-o", tmp_path / "b.eif", "--lock", lock, "--locked", "--", "/bin/true")
    assert locked.returncode == 0, locked.stderr
    assert (tmp_path / "a.eif").read_bytes() == (tmp_path / "b.eif").read_bytes()


def test_what_was_built_is_found_again(enclave: Enclave, small_kernel: Path) -> None:
    done = enclave("kernel", "build", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cached"] is True
    assert found["kernel"]["path"] == str(small_kernel)
    assert {name: on["boots"] for name, on in found["kernel"]["boots"].items()} == {
        "qemu": "yes", "kvm": "yes", "nitro": "yes",
    }  # fmt: skip
