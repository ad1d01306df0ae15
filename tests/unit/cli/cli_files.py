# SPDX-License-Identifier: Apache-2.0
"""A user's directory, with a kernel and a root file system."""

from __future__ import annotations

from pathlib import Path
from struct import pack_into

import pytest


def go_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No runtime, no variables of the user's, a directory of the test's own."""
    for name in ("ENCLAVEKIT_QEMU", "ENCLAVEKIT_KERNEL", "ENCLAVEKIT_MODULES", "SOURCE_DATE_EPOCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def make_kernel(tmp_path: Path) -> Path:
    """A bzImage as far as a setup header tells."""
    data = bytearray(0x4000)
    pack_into("<H", data, 0x1FE, 0xAA55)
    data[0x1F1], data[0x211], data[0x234] = 1, 1, 1
    data[0x202:0x206] = b"HdrS"
    pack_into("<H", data, 0x206, 0x20F)
    pack_into("<H", data, 0x236, 3)
    pack_into("<I", data, 0x22C, 0x7FFFFFFF)
    pack_into("<I", data, 0x230, 0x200000)
    pack_into("<I", data, 0x238, 2047)
    pack_into("<Q", data, 0x258, 0x1000000)
    pack_into("<I", data, 0x260, 0x2000000)
    path = tmp_path / "bzImage"
    path.write_bytes(data)
    return path


def make_rootfs() -> Path:
    (Path("rootfs/bin")).mkdir(parents=True)
    Path("rootfs/bin/app").write_bytes(b"\x7fELF" + bytes(100_000))
    return Path("rootfs")
