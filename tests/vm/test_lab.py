# SPDX-License-Identifier: Apache-2.0
"""``enclave lab``: the kernel's unmodified driver in a parent of ours launches real images, which really run."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Enclave, qemu_of
from ne_machine import compiled

from enclavekit.virtio.nsm import text_pcr

EXAMPLES = Path(__file__).parents[2] / "examples"
INSTANCE_ID = "i-0123456789abcdef0"
ROLE = "arn:aws:iam::123456789012:role/lab"
NONCE = "00112233445566778899aabbccddeeff"
UP_TIMEOUT_S = 150

DIAL = """
import socket, sys
s = socket.socket(socket.AF_VSOCK)
s.connect((int(sys.argv[1]), 5005))
peer, _ = s.getpeername()
s.sendall(b"from the parent's kernel")
s.shutdown(socket.SHUT_WR)
print(s.makefile().read(), peer)
"""


@dataclass(frozen=True)
class Lab:
    """One that is up."""

    enclave: Enclave
    state: dict[str, object]

    def run(self, *words: str | Path, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.enclave.words("lab", "run", "--", *words), capture_output=True, text=True, timeout=timeout_s,
            env=self.enclave.environment(), stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    def script(self, text: str, timeout_s: float = 100) -> list[str]:
        """Lines that a shell script in the parent writes; it must not fail."""
        done = self.run("bash", "-ec", text, timeout_s=timeout_s)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout.splitlines()

    @property
    def pid(self) -> int:
        return int(str(self.state["pid"]))

    @property
    def machines(self) -> set[int]:
        """QEMU processes of the enclaves."""
        return set(qemu_of(self.pid)) - {int(str(self.state["qemu_pid"]))}


def up(home: Path, *words: str) -> Lab:
    enclave = Enclave(home)
    done = subprocess.run(
        enclave.words("lab", "up", "--json", *words), capture_output=True, text=True, timeout=UP_TIMEOUT_S,
        env=enclave.environment(), stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Lab(enclave, json.loads(done.stdout))


def wait_for(*pids: int) -> None:
    """For the end of processes that are no children of ours."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            try:
                assert select.select([process], [], [], 30)[0], f"process {pid} still runs"
            finally:
                os.close(process)


@pytest.fixture(scope="module", autouse=True)
def _root() -> None:
    """What the parent's root file system is made of: fetched the first time."""
    done = subprocess.run(Enclave(Path()).words("lab", "install"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def images(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that goes into the parent; with our own kernel, if it was built, which boots in a fraction."""
    directory = tmp_path_factory.mktemp("lab") / "images"
    directory.mkdir()
    program = Enclave(directory.parent)
    kernels = json.loads(program("kernel", "list", "--json").stdout)["kernels"]
    built = [f"--kernel={one['name']}" for one in kernels if one["origin"] == "built"][:1]
    for name, words in {
        "echo": ("sh", "-c", "vsock echo 5005; exit 42"),
        "sleeper": ("/bin/busybox", "sleep", "600"),
        "quick": ("/bin/busybox", "true"),
    }.items():
        done = program(
            "build", "-q", *built, f"dir:{rootfs}", "-o", directory / f"{name}.eif", "--name", name, "--attest", "--",
            *words,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    compiled(EXAMPLES / "basic_flow.c", directory)
    (directory / "basic_flow.py").write_bytes((EXAMPLES / "basic_flow.py").read_bytes())
    (directory / "dial.py").write_text(DIAL)
    return directory


@pytest.fixture(scope="module")
def lab(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = up(
        tmp_path_factory.mktemp("home"), "--cpus", "6", "--enclave-memory", "576M", "--instance-id", INSTANCE_ID,
        "--role", ROLE,
    )  # fmt: skip
    copied = made.enclave("lab", "cp", images, "lab:/root/images")
    assert copied.returncode == 0, copied.stderr
    yield made
    made.enclave("lab", "down")
    assert made.enclave.left() == []


def test_an_enclave_by_the_unmodified_driver(lab: Lab, images: Path, tmp_path: Path) -> None:
    """It runs, answers over the parent kernel's AF_VSOCK, attests, and ends, which the driver tells."""
    lines = lab.script(
        f"""
        cd images
        cat /sys/class/dmi/id/board_asset_tag
        enclave run -q -d --carrier nitro --cpus 2 --memory 128M --name one echo.eif >&2
        enclave attest one --nonce {NONCE} > /root/document
        python3 dial.py 16
        enclave wait one || echo "ended with $?"
        """
    )
    assert lines == [INSTANCE_ID, "from the parent's kernel 16", "ended with 42"]
    document = tmp_path / "document"
    assert lab.enclave("lab", "cp", "lab:/root/document", document).returncode == 0
    words: list[str | Path] = ["verify", document, "--eif", images / "echo.eif", "--nonce", NONCE, "--dev-root"]
    words += ["--instance-id", INSTANCE_ID, "--pcr", f"3={text_pcr(ROLE).hex()}"]
    verified = lab.enclave(*words)
    assert verified.returncode == 0, verified.stderr
    assert lab.machines == set()


def test_the_samples_in_c_and_python(lab: Lab) -> None:
    lines = lab.script("cd images; ./basic_flow quick.eif 128 2; python3 basic_flow.py quick.eif")
    assert [line.partition(",")[0] for line in lines if "CID" not in line] == ["ended", "running", "ended"]
    assert len([line for line in lines if "CID" in line]) == 2


def test_nitro_clis_commands(lab: Lab) -> None:
    (said,) = lab.script(
        """
        cd images
        run="$(enclave nitro-cli run-enclave --eif-path sleeper.eif --memory 128 --cpu-count 2 --debug-mode)"
        id="$(echo "$run" | sed -n 's/.*"EnclaveID": "\\(.*\\)",/\\1/p')"
        described="$(enclave nitro-cli describe-enclaves)"
        console="$(enclave nitro-cli console --enclave-id $id --disconnect-timeout 1 | grep -c .)"
        ended="$(enclave nitro-cli terminate-enclave --enclave-id $id)"
        after="$(enclave nitro-cli describe-enclaves)"
        echo "[$run,$described,$console,$ended,$after]" | tr -d '\\n'
        """
    )
    run, described, console, ended, after = json.loads(said)
    assert (run["NumberOfCPUs"], run["MemoryMiB"]) == (2, 128)
    assert run["EnclaveID"].startswith(f"{INSTANCE_ID}-enc")
    assert [(one["State"], one["Flags"], one["EnclaveCID"]) for one in described] == [
        ("RUNNING", "DEBUG_MODE", run["EnclaveCID"])
    ]
    assert console > 0
    assert (ended["Terminated"], ended["EnclaveID"], after) == (True, run["EnclaveID"], [])


def test_an_ordinary_user_of_the_group(lab: Lab) -> None:
    """Nothing need be said of memory and CPUs."""
    lines = lab.script(
        """
        cp images/quick.eif /home/user
        su user -c 'cd; touch /no 2>/dev/null || id -Gn; enclave run -q quick.eif && echo ran'
        """
    )
    assert lines == ["user ne", "ran"]


def test_the_allocator_sets_aside_anew(lab: Lab) -> None:
    lines = lab.script(
        """
        mkdir -p /etc/nitro_enclaves
        printf -- '---\\nmemory_mib: 512\\ncpu_count: 4\\n' > /etc/nitro_enclaves/allocator.yaml
        enclave allocate >&2
        cat /sys/module/nitro_enclaves/parameters/ne_cpus
        grep HugePages_Total /proc/meminfo
        enclave doctor --json | grep -c '"chosen": "nitro"'
        """
    )
    assert lines == ["2,3,4,5", "", "HugePages_Total:     256", "1"]


def test_two_at_once_and_one_that_is_killed(lab: Lab) -> None:
    """The parent sees that one's end, and the other goes on."""
    first, second = lab.script(
        """
        cd images
        for name in first second; do
          enclave run -q -d --cpus 2 --memory 128M --name $name --json echo.eif | tr -d '\\n'; echo
        done
        """
    )
    cids = json.loads(first)["cid"], json.loads(second)["cid"]
    assert len({*cids}) == 2
    machines = lab.machines
    assert len(machines) == 2
    os.kill(max(machines, key=_started), signal.SIGKILL)
    done = lab.run("enclave", "wait", "second")
    assert done.returncode == 125, done.stderr
    assert lab.script(f"python3 images/dial.py {cids[0]}; enclave wait first || echo $?") == [
        f"from the parent's kernel {cids[0]}",
        "42",
    ]


def test_the_parent_killed_in_the_middle_leaves_nothing(lab: Lab) -> None:
    lab.script("enclave run -q -d --cpus 2 --memory 128M images/sleeper.eif >&2")
    machines = lab.machines
    assert len(machines) == 1
    os.kill(int(str(lab.state["qemu_pid"])), signal.SIGKILL)
    wait_for(*machines, lab.pid)
    assert lab.enclave("lab", "status", "--json").stdout == '{\n  "schema": 1,\n  "labs": []\n}\n'
    assert [path.name for path in (lab.enclave.home / "enclavekit-labs").iterdir()] == [".lock"]


def test_a_killed_lab_takes_its_parent_along(tmp_path: Path) -> None:
    made = up(tmp_path, "--memory", "512M", "--enclave-memory", "64M")
    twice = made.enclave("lab", "up")
    assert (twice.returncode, twice.stderr) == (
        1,
        "enclave: lab lab: is up already\nhint: enclave lab status, or enclave lab down\n",
    )
    os.kill(made.pid, signal.SIGKILL)
    wait_for(made.pid, int(str(made.state["qemu_pid"])))
    done = made.run("true")
    assert (done.returncode, done.stderr) == (125, "enclave: lab lab: is not up\nhint: enclave lab up\n")


def _started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
