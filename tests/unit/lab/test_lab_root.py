# SPDX-License-Identifier: Apache-2.0
"""The parent's root file system, of packages made up here: what is in it, and that it is made once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from enclavekit.eif import ImageSection, SectionType
from enclavekit.errors import BuildError, FileError
from enclavekit.image.initramfs import open_ramdisk
from enclavekit.lab.root import LIBRARY, LOADER, join, make_system, package_ramdisk, prune, system_of

DAY_S = 86400


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """With this machine's Python as theirs, and shell scripts as the other programs."""
    root = tmp_path / "parent-1"
    for name, text in {
        LOADER: 'shift 3; unset PYTHONHOME; exec "$0.python" "$@"',
        "usr/bin/busybox": "echo sh; echo ls; echo bash",
        "usr/bin/bash": "true",
        "usr/bin/python3.13": "true",
        "usr/share/doc/bash/README": "much",
        "usr/lib/python3/dist-packages/given.py": "",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n" if path.suffix != ".py" else "WORD = 1\n")
        path.chmod(0o755)
    (root / f"{LOADER}.python").symlink_to(sys.executable)
    (root / "etc").mkdir()
    (root / "usr/bin/python3").symlink_to("python3.13")
    (root / "bin").symlink_to("usr/bin")
    return root


def bring(root: Path) -> None:
    (root / LIBRARY / "brought.py").write_text("WORD = 2\n")


def contents(path: Path) -> dict[str, bytes]:
    with path.open("rb") as file:
        section = ImageSection(SectionType.RAMDISK, -12, path.stat().st_size)
        with open_ramdisk(file, section, name=path.name) as ramdisk:
            assert ramdisk.trouble is None
            return {one.entry.name.decode(): b"".join(one.content.chunks()) for one in ramdisk.files}


def test_a_system_is_made_once(packages: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    system = make_system(packages, cache, bring)
    assert system == system_of(packages, cache)
    found = contents(system.ramdisk)
    assert found["usr/bin/sh"] == found["usr/bin/ls"] == b"busybox"
    assert found["usr/bin/bash"].startswith(b"#!")  # not busybox's
    assert found["bin"] == b"usr/bin"
    assert b"from enclavekit.cli.main import main" in found["usr/bin/enclave"]
    assert b"ne:x:990:user" in found["etc/group"]
    assert any(name.startswith(f"{LIBRARY}/__pycache__/brought.") for name in found)
    assert not any(name.startswith("usr/share/doc") for name in found)
    before = system.ramdisk.stat().st_mtime_ns

    def never(root: Path) -> None:
        raise AssertionError(root)

    assert make_system(packages, cache, never).ramdisk.stat().st_mtime_ns == before
    assert not list(cache.glob("making-*"))


def test_this_package_compiled(packages: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    system = make_system(packages, cache, bring)
    ramdisk = package_ramdisk(system, cache)
    found = contents(ramdisk)
    assert found[f"{LIBRARY}/enclavekit/lab/agent.py"]
    assert any(name.startswith(f"{LIBRARY}/enclavekit/lab/__pycache__/agent.") for name in found)
    assert package_ramdisk(system, cache) == ramdisk


def test_what_was_not_used_goes(packages: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert prune(cache, 0) == (0, 0)
    system = make_system(packages, cache, bring)
    package_ramdisk(system, cache)
    assert prune(cache, DAY_S) == (0, 0)
    size = system.ramdisk.stat().st_size
    os.utime(system.ramdisk, (0, 0))
    assert prune(cache, DAY_S) == (1, size)
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_programs_that_fail(packages: Path, tmp_path: Path) -> None:
    (packages / "usr/bin/busybox").write_text("#!/bin/sh\necho no >&2; exit 1\n")
    with pytest.raises(BuildError) as caught:
        make_system(packages, tmp_path / "cache", bring)
    assert caught.value.message == "parent's root file system: busybox fails: no"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_packages_without_python(packages: Path, tmp_path: Path) -> None:
    (packages / "usr/bin/python3.13").unlink()
    with pytest.raises(BuildError, match=r"no Python in the packages$"):
        make_system(packages, tmp_path / "cache", bring)


def test_a_cache_that_cannot_be(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(FileError) as caught:
        make_system(packages, tmp_path / "cache", bring)
    assert caught.value.message == f"cannot write {tmp_path / 'cache'}: file exists"


def test_joined_archives_start_at_multiples_of_four(tmp_path: Path) -> None:
    for name, data in (("a", b"12345"), ("b", b"6")):
        (tmp_path / name).write_bytes(data)
    with (tmp_path / "joined").open("wb") as file:
        join([tmp_path / "a", tmp_path / "b"], file.fileno())
    assert (tmp_path / "joined").read_bytes() == b"12345\0\0\0" + b"6\0\0\0"
