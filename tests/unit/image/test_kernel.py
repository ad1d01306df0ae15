# SPDX-License-Identifier: Apache-2.0
"""Kernels: what is one, and how it finds its devices."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from enclavekit.eif import (
    Arch,
    BuildInfo,
    BytesContent,
    Discovery,
    KernelInfo,
    Metadata,
    Section,
    SectionType,
    read,
    write,
)
from enclavekit.errors import FileError, FormatError, KernelError
from enclavekit.image.kernel import Kernel, banner_discovery, image_discovery, open_kernel, parse_kernel

DEBIAN = "6.12.1+deb13-cloud-amd64 (x@y) #1 SMP Debian 6.12.1-1"


def bzimage(banner: str = DEBIAN, *, xloadflags: int = 1, size: int = 0x1000) -> bytes:
    made = bytearray(size)
    for offset, data in (
        (0x1F1, b"\x04"),
        (0x1FE, b"\x55\xaa"),
        (0x202, b"HdrS\x0f\x02"),
        (0x20E, b"\x00\x01"),
        (0x211, b"\x01"),
        (0x230, (0x200000).to_bytes(4, "little")),
        (0x236, xloadflags.to_bytes(2, "little")),
        (0x260, (0x3000000).to_bytes(4, "little")),
        (0x300, banner.encode()),
    ):
        made[offset : offset + len(data)] = data
    return bytes(made)


ARM64 = bytes(0x38) + b"ARM\x64" + bytes(100)


def opened(path: Path) -> Kernel:
    with path.open("rb") as file:
        kernel = open_kernel(file, path)
        assert b"".join(kernel.content.chunks()) == path.read_bytes()
        return kernel


def test_bzimage(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz-6.12.1"
    path.write_bytes(bzimage())
    kernel = opened(path)
    assert kernel.arch is Arch.X86_64
    assert kernel.banner == DEBIAN
    assert kernel.release == "6.12.1+deb13-cloud-amd64"
    assert kernel.init_size == 0x3000000
    assert kernel.discovery is Discovery.ACPI
    assert kernel.sha384 == hashlib.sha384(bzimage()).hexdigest()


def test_arm64_image(tmp_path: Path) -> None:
    path = tmp_path / "Image"
    path.write_bytes(ARM64)
    kernel = opened(path)
    assert (kernel.arch, kernel.banner, kernel.release, kernel.init_size) == (Arch.AARCH64, "", "", 0)


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        ("config-1", "CONFIG_A=y\nCONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y\n", Discovery.CMDLINE),
        ("vmlinuz-1.config", "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y\n", Discovery.CMDLINE),
        ("config-1", "# CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES is not set\n", Discovery.ACPI),
        ("config-2", "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y\n", Discovery.ACPI),  # another kernel's
    ],
)
def test_discovery_by_configuration(tmp_path: Path, config: str, text: str, expected: Discovery) -> None:
    path = tmp_path / "vmlinuz-1"
    path.write_bytes(bzimage())
    (tmp_path / config).write_text(text)
    assert opened(path).discovery is expected


def test_unreadable_configuration(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage())
    (tmp_path / "bzImage.config").mkdir()
    with pytest.raises(FileError) as caught:
        opened(path)
    assert caught.value.message == f"cannot read {path}.config: is a directory"


def test_discovery_by_banner() -> None:
    assert banner_discovery("6.8.0-31-generic (buildd@lcy02) #31-Ubuntu SMP") is Discovery.ACPI
    assert banner_discovery("4.14.256-209.484.amzn2.x86_64") is Discovery.CMDLINE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a kernel: no bzImage (x86_64) and no Image (aarch64)"),
        (b"\x7fELF" + bytes(0x1000), "not a kernel: no bzImage (x86_64) and no Image (aarch64)"),
        (bzimage(xloadflags=0), "a 32-bit kernel, expected one for x86_64"),
        (bzimage()[:0x800], "bzImage: protected-mode kernel at 0xa00 of a file of 0x800 bytes"),
    ],
)
def test_no_kernel(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_kernel(data, len(data))
    assert caught.value.message == message
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(KernelError) as named:
        opened(path)
    assert named.value.message == f"{path}: {message}"


def test_hint_for_a_vmlinux() -> None:
    with pytest.raises(KernelError) as caught:
        parse_kernel(b"\x7fELF", 4)
    assert caught.value.hint == ("vmlinux is not bootable; the bzImage is arch/x86/boot/bzImage, or /boot/vmlinuz-*")


def eif(kernel: bytes, metadata: bytes) -> io.BytesIO:
    out = io.BytesIO()
    parts = {
        SectionType.KERNEL: kernel,
        SectionType.CMDLINE: b"quiet",
        SectionType.METADATA: metadata,
        SectionType.RAMDISK: b"",
    }
    write(out, [Section(kind, BytesContent(data)) for kind, data in parts.items()], arch=Arch.X86_64)
    return out


def test_discovery_of_an_image() -> None:
    build = BuildInfo("", "", "", "", "")
    ours = Metadata("", "", build, kernel=KernelInfo("", "", Discovery.CMDLINE)).encode()
    for metadata, expected in (
        (ours, Discovery.CMDLINE),
        (Metadata("", "", build).encode(), Discovery.ACPI),
        (b"{}", Discovery.ACPI),
    ):
        file = eif(bzimage(), metadata)
        assert image_discovery(file, read(file)) is expected
    file = eif(b"junk", b"{}")
    with pytest.raises(KernelError):
        image_discovery(file, read(file))
