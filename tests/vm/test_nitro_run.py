# SPDX-License-Identifier: Apache-2.0
"""nitro-cli's commands for enclaves, over a machine that really runs: what they print, key by key and in order."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Enclave

ID = re.compile(r"i-[0-9a-f]{8,17}-enc[0-9a-f]{1,16}")
RUN_KEYS = ["EnclaveName", "EnclaveID", "ProcessID", "EnclaveCID", "NumberOfCPUs", "CPUIDs", "MemoryMiB"]


class NitroCli:
    """The program by that name, with directories of the test's own."""

    def __init__(self, enclave: Enclave) -> None:
        self.enclave = enclave
        self.sockets, self.logs = enclave.home / "sockets", enclave.home / "logs"
        self.sockets.mkdir()
        self.logs.mkdir()
        self.program = enclave.home / "nitro-cli"
        self.program.symlink_to(enclave.words()[0])

    def __call__(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program, *words], capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, check=False,
            env={
                **self.enclave.environment(),
                "NITRO_CLI_SOCKETS_PATH": str(self.sockets),
                "NITRO_CLI_LOGS_PATH": str(self.logs),
            },
        )  # fmt: skip


@pytest.fixture
def nitro_cli(enclave: Enclave) -> Iterator[NitroCli]:
    made = NitroCli(enclave)
    yield made
    made("terminate-enclave", "--all")


@pytest.fixture(scope="module")
def image(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "sleeper.eif"
    program = Enclave(path.parent)
    done = program("build", f"dir:{rootfs}", "-o", path, "--name", "sleeper", "--", "/bin/busybox", "sleep", "600")
    assert done.returncode == 0, done.stderr
    return path


def pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def wait_for_end(pid: int) -> None:
    """Of a process that is no child of ours."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            select.select([process], [], [], 60)
        finally:
            os.close(process)


def test_the_life_of_an_enclave(nitro_cli: NitroCli, image: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    words = ["--eif-path", str(image), "--memory", "256", "--debug-mode", "--enclave-cid", "0"]
    started = nitro_cli("run-enclave", *words, "--cpu-ids", str(cpu))
    assert started.returncode == 0, started.stderr
    made = json.loads(started.stdout)
    assert started.stdout == pretty(made)
    assert list(made) == RUN_KEYS
    assert ID.fullmatch(made["EnclaveID"])
    assert made | {"EnclaveID": "", "ProcessID": 0} == {
        "EnclaveName": "sleeper", "EnclaveID": "", "ProcessID": 0, "EnclaveCID": 16, "NumberOfCPUs": 1,
        "CPUIDs": [cpu], "MemoryMiB": 256,
    }  # fmt: skip
    assert started.stderr.splitlines()[-2:] == [
        "Start allocating memory...",
        f"Started enclave with enclave-cid: 16, memory: 256 MiB, cpu-ids: [{cpu}]",
    ]
    os.kill(made["ProcessID"], 0)  # it is there
    slot = made["EnclaveID"].rpartition("-enc")[2]
    assert (nitro_cli.sockets / f"{slot}.sock").stat().st_mode & 0o777 == 0o766

    described = nitro_cli("describe-enclaves", "--metadata")
    assert described.returncode == 0, described.stderr
    (one,) = json.loads(described.stdout)
    assert described.stdout == pretty([one])
    assert list(one) == [*RUN_KEYS, "State", "Flags", "Measurements", "ImageName", "ImageVersion", "Metadata"]
    of_file = json.loads(nitro_cli("describe-eif", "--eif-path", image).stdout)
    assert one == made | {
        "State": "RUNNING", "Flags": "DEBUG_MODE", "Measurements": of_file["Measurements"],
        "ImageName": "sleeper", "ImageVersion": of_file["ImageVersion"], "Metadata": of_file["Metadata"],
    }  # fmt: skip
    assert list(one["Measurements"]) == ["HashAlgorithm", "PCR0", "PCR1", "PCR2"]

    console = nitro_cli("console", "--enclave-name", "sleeper", "--disconnect-timeout", "1")
    assert console.returncode == 0, console.stderr
    assert console.stdout.startswith(
        "Connecting to the console for enclave 16...\nSuccessfully connected to the console.\n["
    )

    ended = nitro_cli("terminate-enclave", "--enclave-id", made["EnclaveID"])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == pretty({"EnclaveName": "sleeper", "EnclaveID": made["EnclaveID"], "Terminated": True})
    assert ended.stderr == f"Successfully terminated enclave {made['EnclaveID']}.\n"
    assert nitro_cli("describe-enclaves").stdout == "[]\n"
    assert list(nitro_cli.sockets.iterdir()) == []
    assert nitro_cli.enclave.left() == []
    log = (nitro_cli.logs / "nitro_enclaves.log").read_text()
    assert f"[enc-{slot}:{made['ProcessID']}][INFO]" in log
    assert re.search(r"\[nitro-cli:[0-9]+\]\[INFO\].*\] terminate-enclave$", log, re.MULTILINE)


def test_an_attached_console(nitro_cli: NitroCli, rootfs: Path, tmp_path: Path) -> None:
    """To the enclave's own end, after which it is gone from all lists."""
    short = tmp_path / "short.eif.eif"
    made = nitro_cli.enclave("build", f"dir:{rootfs}", "-o", short, "--", "/bin/busybox", "sleep", "8")
    assert made.returncode == 0, made.stderr
    words: list[str | Path] = ["--eif-path", short, "--memory", "256M", "--cpu-count", "1", "--enclave-name", "short"]
    done = nitro_cli("run-enclave", *words, "--attach-console")
    assert done.returncode == 0, done.stderr
    end = done.stdout.index("\n}\n") + 3
    made_of = json.loads(done.stdout[:end])
    assert list(made_of) == RUN_KEYS
    wait_for_end(made_of["ProcessID"])
    console = done.stdout[end:]
    assert console.startswith("Connecting to the console for enclave 16...\nSuccessfully connected to the console.\n[")
    assert nitro_cli("describe-enclaves").stdout == "[]\n"
    assert nitro_cli("console", "--enclave-name", "short").returncode == 58


def test_two_of_a_name_and_all_ended(nitro_cli: NitroCli, image: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"eif_path": str(image), "memory_mib": 256, "cpu_count": 1, "enclave_name": "twin"}))
    with ThreadPoolExecutor(2) as both:  # side by side, which nitro-cli's one heartbeat port does not allow
        done = list(both.map(lambda _: nitro_cli("run-enclave", "--config", config), range(2)))
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    made = sorted((json.loads(one.stdout) for one in done), key=lambda one: str(one["EnclaveName"]))
    assert [one["EnclaveName"] for one in made] == ["twin", "twin_1"]
    assert {one["EnclaveCID"] for one in made} == {16, 17}
    assert [one["Flags"] for one in json.loads(nitro_cli("describe-enclaves").stdout)] == ["NONE", "NONE"]
    assert nitro_cli("console", "--enclave-name", "twin").returncode == 44
    # Whoever removes the socket of an enclave ends it.
    (nitro_cli.sockets / f"{made[0]['EnclaveID'].rpartition('-enc')[2]}.sock").unlink()
    nitro_cli.enclave("wait", "twin")
    ended = nitro_cli("terminate-enclave", "--all")
    assert json.loads(ended.stdout) == [
        {"EnclaveName": "twin_1", "EnclaveID": made[1]["EnclaveID"], "Terminated": True}
    ]
    assert nitro_cli.enclave.left() == []


def test_no_heartbeat(nitro_cli: NitroCli, rootfs: Path, tmp_path: Path) -> None:
    """A kernel that does not find its init."""
    bad = tmp_path / "bad.eif"
    cmdline = "console=ttyS0 reboot=k panic=-1 rdinit=/none"
    made = nitro_cli.enclave("build", f"dir:{rootfs}", "-o", bad, "--cmdline", cmdline, "--", "/bin/busybox")
    assert made.returncode == 0, made.stderr
    done = nitro_cli("run-enclave", "--eif-path", bad, "--memory", "256", "--cpu-count", "1")
    assert (done.returncode, done.stdout) == (39, "")
    assert "[ E36 ] " in done.stderr
    assert "\nFailed connections: 1\n[ E39 ] " in done.stderr
    assert nitro_cli.enclave.left() == []
