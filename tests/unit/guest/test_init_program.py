# SPDX-License-Identifier: Apache-2.0
"""What can be said of init without booting it: the programs as the build hook made them, and the numbers they share."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.resources import files
from pathlib import Path
from struct import unpack_from

import pytest

from enclavekit.codec import init_config, init_frames

SOURCES = Path(__file__).parents[3] / "guest" / "init"
MACHINES = {"x86_64": 62, "aarch64": 183}
PT_INTERP = 3
REFUSAL = b"init: not process 1: this program is for the inside of an enclave\n"


def program(arch: str) -> Path:
    path = Path(str(files("enclavekit.image"))) / f"init.{arch}"
    if not path.exists():
        pytest.skip("the guest code is not built; installing the package does")
    return path


@pytest.mark.parametrize("arch", MACHINES)
def test_it_is_a_small_static_program(arch: str) -> None:
    data = program(arch).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    assert unpack_from("<H", data, 18) == (MACHINES[arch],)
    (headers,) = unpack_from("<Q", data, 32)
    size, count = unpack_from("<HH", data, 54)
    types = [unpack_from("<I", data, headers + size * index)[0] for index in range(count)]
    assert types
    assert PT_INTERP not in types
    assert len(data) <= 72 << 10


@pytest.mark.parametrize("arch", MACHINES)
def test_it_carries_no_path_of_the_machine_that_built_it(arch: str) -> None:
    data = program(arch).read_bytes()
    assert str(SOURCES).encode() not in data
    assert b"guest/init" not in data


def test_outside_an_enclave_it_does_nothing(tmp_path: Path) -> None:
    path = tmp_path / "init"  # the package's own is data, and not executable
    path.write_bytes(program(platform.machine()).read_bytes())
    path.chmod(0o755)
    # An init that does not refuse would mount, load modules and reboot: look before trying.
    assert REFUSAL in path.read_bytes()
    done = subprocess.run([path], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", REFUSAL)


def constants(*names: str) -> dict[str, int]:
    """Numbers that have a name, as in ``#define A 5``, ``#define A (64 << 10)`` and ``A = 0x05,``."""
    text = "".join((SOURCES / name).read_text() for name in names)
    found = re.findall(r"(\w+) (?:= )?\(?(0x[0-9a-f]+|\d+)(?: << (\d+)\))?[,\s]", text)
    return {name: int(value, 0) << int(shift or 0) for name, value, shift in found}


def test_frames_are_the_hosts() -> None:
    ours = constants("frame.h")
    assert {
        name: ours[f"FRAME_{name}"] for name in init_frames.FrameType.__members__
    } == init_frames.FrameType.__members__
    assert {
        name: ours[name]
        for name in ("PROTOCOL_VERSION", "FRAME_HEADER", "MAX_PAYLOAD", "HELLO_LOGS", "HELLO_WAITS", "HELLO_ATTESTS")
    } == {
        "PROTOCOL_VERSION": init_frames.PROTOCOL_VERSION,
        "FRAME_HEADER": init_frames.HEADER.size,
        "MAX_PAYLOAD": init_frames.MAX_PAYLOAD,
        "HELLO_LOGS": init_frames.HELLO_LOGS,
        "HELLO_WAITS": init_frames.HELLO_WAITS,
        "HELLO_ATTESTS": init_frames.HELLO_ATTESTS,
    }
    assert constants("attest.h") == {"MAX_NONCE": init_frames.MAX_NONCE, "MAX_DOCUMENT": init_frames.MAX_DOCUMENT}
    assert constants("supervise.h")["MAX_MESSAGE"] <= init_frames.MAX_MESSAGE


def test_limits_are_the_builders() -> None:
    assert constants("config.c")["MAX_SIZE"] == init_config.MAX_SIZE
    assert constants("config.h")["MAX_LAUNCH_VALUES"] == init_config.MAX_LAUNCH_VALUES
    longest = constants("config.c")["MAX_LAUNCH_NAME"]
    assert init_config.LAUNCH_NAME.fullmatch(b"a" * longest)
    assert not init_config.LAUNCH_NAME.fullmatch(b"a" * (longest + 1))
