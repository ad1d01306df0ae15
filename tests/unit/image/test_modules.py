# SPDX-License-Identifier: Apache-2.0
"""Kernel modules: found, read, and put in load order."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.eif import Arch
from enclavekit.errors import FileError, KernelError, NoKernelError
from enclavekit.image import modules as modules_module
from enclavekit.image.modules import Modules, parse_module, resolve

RELEASE = "6.12.0-test"


def module(name: str, depends: str = "", *, machine: int = 62, release: str = RELEASE) -> bytes:
    """The smallest ELF file that has a .modinfo section."""
    info = f"license=GPL\0depends={depends}\0name={name}\0vermagic={release} SMP mod_unload\0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(info) + len(names)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 1, machine, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    for name_offset, offset, size in ((1, 64, len(info)), (10, 64 + len(info), len(names))):
        sections += struct.pack("<IIQQQQIIQQ", name_offset, 1, 0, 0, offset, size, 0, 0, 1, 0)
    return header + info + names + sections


GRAPH = {
    "virtio_mmio": "",
    "vmw_vsock_virtio_transport": "vmw_vsock_virtio_transport_common,vsock",
    "vmw_vsock_virtio_transport_common": "vsock",
    "vsock": "",
    "nsm": "",
    "unrelated": "",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "kernel/net").mkdir(parents=True)
    for name, depends in GRAPH.items():
        (tmp_path / "kernel/net" / f"{name.replace('_', '-')}.ko").write_bytes(module(name, depends))
    return tmp_path


def path_of(directory: Path, name: str) -> Path:
    return directory / "kernel/net" / f"{name.replace('_', '-')}.ko"


def names(directory: Path) -> list[str]:
    return [one.name for one in resolve(directory, arch=Arch.X86_64, release=RELEASE).modules]


ORDER = ["virtio_mmio", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "nsm"]


def test_load_order(directory: Path) -> None:
    assert names(directory) == ORDER
    made = resolve(directory, arch=Arch.X86_64, release="")
    assert made.modules[1].data == module("vsock")
    assert made.missing == ()


def test_compressed(directory: Path) -> None:
    for name, compress in (("vsock", lzma.compress), ("nsm", gzip.compress)):
        plain = path_of(directory, name)
        plain.with_suffix(".ko.xz" if name == "vsock" else ".ko.gz").write_bytes(compress(plain.read_bytes()))
        plain.unlink()
    assert names(directory) == ORDER


def test_built_in(directory: Path) -> None:
    assert resolve(None, arch=Arch.X86_64, release=RELEASE) == Modules()
    path_of(directory, "virtio_mmio").unlink()
    path_of(directory, "nsm").unlink()
    (directory / "modules.builtin").write_text("kernel/drivers/virtio/virtio-mmio.ko\nkernel/drivers/misc/nsm.ko\n")
    made = resolve(directory, arch=Arch.X86_64, release=RELEASE)
    assert [one.name for one in made.modules] == ORDER[1:4]
    assert made.missing == ()


def test_missing_nsm_is_told(directory: Path) -> None:
    path_of(directory, "nsm").unlink()
    assert resolve(directory, arch=Arch.X86_64, release=RELEASE).missing == ("nsm",)


@pytest.mark.parametrize("name", ["virtio_mmio", "vmw_vsock_virtio_transport"])
def test_missing_required_module(directory: Path, name: str) -> None:
    path_of(directory, name).unlink()
    with pytest.raises(NoKernelError) as caught:
        names(directory)
    assert caught.value.message == f"{directory}: no module {name}"
    assert caught.value.hint == "an enclave's kernel needs virtio_mmio and vsock, built in or as modules"


def test_missing_dependency(directory: Path) -> None:
    path_of(directory, "vsock").unlink()
    with pytest.raises(NoKernelError) as caught:
        names(directory)
    assert caught.value.message == "module vmw_vsock_virtio_transport_common: depends on vsock, which is not there"


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        names(tmp_path / "none")
    assert caught.value.message == f"cannot read {tmp_path}/none: no such file or directory"


def test_too_many_files(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules_module, "MAX_FILES", 5)
    with pytest.raises(KernelError) as caught:
        names(directory)
    assert caught.value.message == f"{directory}: more than 5 files, expected a modules directory"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", ": not a 64-bit little-endian ELF file, expected a kernel module"),
        (module("nsm", machine=183), ": ELF machine 183, expected 62 (x86_64)"),
        (module("nsm")[:-1], ": ELF section headers at 0x96 lie outside of the file"),
        (module("nsm").replace(b".modinfo", b".modjunk"), ": no section .modinfo, expected a kernel module"),
        (module("nsm").replace(b"name=", b"main="), ": module name '', expected letters, digits and _"),
        (module("../x"), ": module name '../x', expected letters, digits and _"),
        (module("other"), ": holds module other, expected nsm"),
        (module("nsm", release="5.10"), f": made for kernel '5.10', expected '{RELEASE}'"),
    ],
)
def test_bad_module(directory: Path, data: bytes, message: str) -> None:
    path = path_of(directory, "nsm")
    path.write_bytes(data)
    with pytest.raises(KernelError) as caught:
        names(directory)
    assert caught.value.message == f"{path}{message}"


def test_modinfo_past_the_end() -> None:
    data = bytearray(module("nsm"))
    struct.pack_into("<Q", data, len(data) - 128 + 32, 1 << 40)
    with pytest.raises(KernelError) as caught:
        parse_module(bytes(data), "nsm.ko", Arch.X86_64)
    assert caught.value.message == f"nsm.ko: section .modinfo ends at 0x10000000040, the file at 0x{len(data):x}"


def test_circle(directory: Path) -> None:
    path_of(directory, "vsock").write_bytes(module("vsock", "vmw_vsock_virtio_transport"))
    with pytest.raises(KernelError) as caught:
        names(directory)
    message = "module vmw_vsock_virtio_transport: depends on itself, or on more than 100 others"
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (".xz", ": broken compressed data: input format not supported by decoder"),
        (".gz", ": broken compressed data: not a gzipped file (b'ju')"),
        (".zst", ": compressed with zstd, expected xz, gzip or none"),
    ],
)
def test_bad_compression(directory: Path, suffix: str, message: str) -> None:
    path_of(directory, "nsm").unlink()
    path = directory / f"nsm.ko{suffix}"
    path.write_bytes(b"junk")
    with pytest.raises(KernelError) as caught:
        names(directory)
    assert caught.value.message == f"{path}{message}"
    assert caught.value.hint == (f"unpack it: zstd -d {path}" if suffix == ".zst" else None)


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_too_large(directory: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules_module, "MAX_MODULE_SIZE", 1000)
    path_of(directory, "nsm").unlink()
    path = directory / f"nsm.ko{suffix}"
    compress: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}
    path.write_bytes(compress[suffix](bytes(2000)))
    with pytest.raises(KernelError) as caught:
        names(directory)
    assert caught.value.message == f"{path}: more than 1000 bytes, expected a kernel module"


def test_cut_off_xz(directory: Path) -> None:
    path = path_of(directory, "nsm")
    path.unlink()
    packed = path.with_suffix(".ko.xz")
    packed.write_bytes(lzma.compress(module("nsm"))[:-20])
    with pytest.raises(KernelError) as caught:
        names(directory)
    assert caught.value.message == f"{packed}: broken compressed data: it ends too early"


@given(st.integers(0, 60), st.binary(min_size=1, max_size=8), st.booleans())
def test_any_module_is_parsed_or_refused(position: int, junk: bytes, at_end: bool) -> None:
    data = bytearray(module("nsm", "vsock"))
    position = len(data) - 192 + position * 3 if at_end else position
    data[position : position + len(junk)] = junk
    try:
        made = parse_module(bytes(data), "nsm.ko", Arch.X86_64)
    except KernelError as error:
        assert error.message.startswith("nsm.ko: ")  # noqa: PT017  # either outcome is right
    else:
        assert made.name.isidentifier()
