# SPDX-License-Identifier: Apache-2.0
"""Kernels that are known by name or digest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from struct import pack_into

import pytest

from enclavekit.errors import FileError, FormatError, KernelError, NoKernelError, UsageError
from enclavekit.runtime.kernels import Kernels


def bzimage(banner: bytes) -> bytes:
    data = bytearray(0x4000)
    data[0x1F1], data[0x211] = 1, 1
    data[0x202:0x206] = b"HdrS"
    pack_into("<H", data, 0x1FE, 0xAA55)
    pack_into("<H", data, 0x206, 0x20F)
    pack_into("<H", data, 0x20E, 0x100)
    pack_into("<I", data, 0x230, 0x200000)
    pack_into("<H", data, 0x236, 3)
    data[0x300 : 0x300 + len(banner)] = banner
    return bytes(data)


@pytest.fixture
def kernels(tmp_path: Path) -> Kernels:
    return Kernels(tmp_path / "kernels", tmp_path / "runtime")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz-6.1.2"
    path.write_bytes(bzimage(b"6.1.2-test (a@b) #1"))
    return path


def test_a_kernel_is_copied_with_all_that_belongs_to_it(kernels: Kernels, file: Path, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    (modules / "kernel").mkdir(parents=True)
    (modules / "kernel/a.ko").write_bytes(b"module")
    (modules / "build").symlink_to("/")
    (tmp_path / "c").write_text("CONFIG_A=y\n")
    added = kernels.add(file, name=None, modules=modules, config=tmp_path / "c")
    assert (added.name, added.version, added.origin) == ("6.1.2-test", "6.1.2-test", "imported")
    assert added.digest == "sha384:" + hashlib.sha384(file.read_bytes()).hexdigest()
    assert added.path.read_bytes() == file.read_bytes()
    assert added.path.with_name("kernel.config").read_text() == "CONFIG_A=y\n"
    assert added.modules is not None
    assert sorted(path.name for path in added.modules.rglob("*")) == ["a.ko", "kernel"]
    assert kernels.all() == [added]
    assert sorted(path.name for path in kernels.root.iterdir()) == ["6.1.2-test"]


def test_they_are_chosen_by_name_by_digest_or_by_path(kernels: Kernels, file: Path, tmp_path: Path) -> None:
    one = kernels.add(file, name="one", modules=None, config=None)
    file.write_bytes(bzimage(b"6.1.3 (a@b) #1"))
    two = kernels.add(file, name=None, modules=None, config=None)
    assert (one.name, two.name) == ("one", "6.1.3")
    assert kernels.choose("one", None) == one.kernel
    assert kernels.choose(None, None, two.digest) == two.kernel
    assert kernels.choose("one", None, two.digest) == one.kernel
    assert kernels.choose("one", str(tmp_path)).modules == tmp_path
    assert kernels.choose(str(file), None).path == file


def test_the_same_one_again_is_the_same(kernels: Kernels, file: Path) -> None:
    added = kernels.add(file, name="a", modules=None, config=None)
    assert kernels.add(file, name="a", modules=None, config=None) == added
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UsageError) as caught:
        kernels.add(file, name="a", modules=None, config=None)
    assert caught.value.message == "kernel a: there is another one of that name"


def test_a_kernel_for_aarch64_has_no_version(kernels: Kernels, tmp_path: Path) -> None:
    path = tmp_path / "Image"
    path.write_bytes(bytes(0x38) + b"ARM\x64" + bytes(100))
    added = kernels.add(path, name=None, modules=None, config=None)
    assert (added.name, added.version) == ("Image", "")


def test_what_is_refused(kernels: Kernels, file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        NoKernelError, match=r"^kernel 'none': no such file, and no kernel of that name \(known: none\)$"
    ):
        kernels.choose("none", None)
    with pytest.raises(NoKernelError, match=r"^no guest kernel: "):
        kernels.choose(None, None, "sha384:" + "0" * 96)
    for name in ("../a", ".a", "a/b", "a b"):
        with pytest.raises(UsageError, match=r"^kernel name "):
            kernels.add(file, name=name, modules=None, config=None)
    with pytest.raises(FileError):
        kernels.add(tmp_path / "none", name=None, modules=None, config=None)
    (tmp_path / "odd").write_bytes(b"odd")
    with pytest.raises(KernelError, match=r"odd: "):
        kernels.add(tmp_path / "odd", name=None, modules=None, config=None)
    with pytest.raises(FileError):
        kernels.add(file, name=None, modules=tmp_path / "none", config=None)
    assert not kernels.root.exists() or list(kernels.root.iterdir()) == []


def test_a_record_that_is_damaged(kernels: Kernels, file: Path) -> None:
    added = kernels.add(file, name="a", modules=None, config=None)
    added.path.with_name("kernel.json").write_text("{}")
    with pytest.raises(FormatError) as caught:
        kernels.all()
    assert caught.value.message == f"{kernels.root / 'a' / 'kernel.json'}: damaged"
