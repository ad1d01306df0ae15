# SPDX-License-Identifier: Apache-2.0
"""What a kernel in an image can do, found in the kernel itself: its configuration if it carries one, else its strings.

Source: linux Documentation/arch/x86/boot.rst (payload), kernel/configs.c (IKCFG_ST), drivers/firmware/efi (zboot).
A driver that is built in leaves its name and its messages in the kernel, in every version from 4.14 on; one that is not
leaves none. What is only a module (``=m``) is not in the kernel, and counts as missing here.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from enclavekit.codec.bzimage import HDRS, READ_SIZE, BzImage
from enclavekit.eif import FileContent
from enclavekit.errors import FormatError, MissingError
from enclavekit.image.decompress import LONGEST_MAGIC, Decompression, compression_of

MIN_UNPACKED_SIZE = 128 << 20
MAX_UNPACKED_SIZE = 1 << 30
MAX_RATIO = 32
"""A kernel may become 128 MiB, or 32 times its compressed size: real ones become eight times as large at most."""
HISTORY = 1 << 27
"""Distributions compress with up to 128 MiB of history. A decompressor takes as much of it as the kernel is large."""
MAX_CONFIGURATION_SIZE = 1 << 20

_CONFIGURATION_START = b"IKCFG_ST"
_CONFIGURATION_MAGIC = _CONFIGURATION_START + b"\x1f\x8b\x08"
_CONFIGURATION_LINE = re.compile(r"(CONFIG_\w+)=(.*)")
_VERSION = re.compile(rb"Linux version ([0-9]+\.[0-9]+[!-~]{0,100}) ")
_OVERLAP = 256
"""Longer than anything that is looked for."""
_ZBOOT_MAGIC = b"zimg"


class Answer(Enum):
    """To a question about a kernel."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class LearnedFrom(Enum):
    """How sure an answer is: a configuration is certain, strings are evidence."""

    CONFIGURATION = "configuration"
    STRINGS = "strings"
    NOTHING = "nothing"


class _Evidence(NamedTuple):
    """``options`` are all set when a kernel has it, and then ``string`` is in it."""

    options: tuple[str, ...]
    string: bytes


class Feature(Enum):
    """What an enclave's boot depends on."""

    VIRTIO_MMIO = _Evidence(("CONFIG_VIRTIO_MMIO",), b"virtio-mmio\0")
    CMDLINE_DEVICES = _Evidence(("CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES",), b"virtio_mmio.device\0")
    VSOCK = _Evidence(("CONFIG_VSOCKETS", "CONFIG_VIRTIO_VSOCKETS"), b"vmw_vsock_virtio_transport\0")
    NSM = _Evidence(("CONFIG_NSM",), b"nsm-hwrng\0")
    MP_TABLE = _Evidence(("CONFIG_X86_MPPARSE",), b"Intel MultiProcessor Specification")
    ACPI = _Evidence(("CONFIG_ACPI",), b"ACPI: Core revision")
    SERIAL_CONSOLE = _Evidence(("CONFIG_SERIAL_8250_CONSOLE",), b"uart8250\0")
    INITRAMFS = _Evidence(("CONFIG_BLK_DEV_INITRD",), b"retain_initrd\0")
    DEVTMPFS = _Evidence(("CONFIG_DEVTMPFS",), b"devtmpfs: initialized")
    MODULES = _Evidence(("CONFIG_MODULES",), b"loading out-of-tree module taints kernel")
    GZIP = _Evidence(("CONFIG_RD_GZIP",), b"Not a gzip file\0")
    BZIP2 = _Evidence(("CONFIG_RD_BZIP2",), b"Data integrity error when decompressing.")
    LZMA = _Evidence(("CONFIG_RD_LZMA",), b"LZMA data is corrupt")
    XZ = _Evidence(("CONFIG_RD_XZ",), b"Input is not in the XZ format (wrong magic bytes)")
    LZO = _Evidence(("CONFIG_RD_LZO",), b"dest len longer than block size")
    LZ4 = _Evidence(("CONFIG_RD_LZ4",), b"chunk length is longer than allocated")
    ZSTD = _Evidence(("CONFIG_RD_ZSTD",), b"Input is not in the ZSTD format (wrong magic bytes)")


@dataclass(slots=True)
class KernelFeatures:
    """``release`` as in ``uname -r``, or "". ``configuration``: what is set. ``trouble``: why nothing is known."""

    learned_from: LearnedFrom = LearnedFrom.NOTHING
    release: str = ""
    configuration: Mapping[str, str] = field(default_factory=dict)
    found: frozenset[Feature] = frozenset()
    trouble: FormatError | MissingError | None = None

    def has(self, feature: Feature) -> Answer:
        """Whether it is built in."""
        if self.learned_from is LearnedFrom.NOTHING:
            return Answer.UNKNOWN
        return Answer.YES if feature in self.found else Answer.NO


def kernel_features(kernel: FileContent) -> KernelFeatures:
    """From the bytes of a bzImage, an Image, or any of these compressed; FileError when they cannot be read.

    Kernels that cannot be understood, or unpacked here, give ``trouble``.
    """
    scan = _Scan()
    try:
        for chunk in _unpacked(kernel):
            scan.feed(chunk)
        return scan.features()
    except (FormatError, MissingError) as error:
        return KernelFeatures(trouble=error)


def _unpacked(kernel: FileContent) -> Iterator[bytes]:
    """The kernel proper."""
    payload = _payload(kernel)
    chunks = payload.chunks()
    compression = compression_of(_head(payload, LONGEST_MAGIC))
    if compression is None:
        return chunks
    limit = min(max(MIN_UNPACKED_SIZE, MAX_RATIO * payload.size), MAX_UNPACKED_SIZE)
    return iter(Decompression(chunks, compression, "kernel", limit=limit, history=HISTORY))


def _payload(kernel: FileContent) -> FileContent:
    head = _head(kernel, READ_SIZE)
    if head[0x202:0x206] == HDRS:
        image = BzImage.parse(head, kernel.size)
        return _part(kernel, image.protected_mode_offset + image.payload_offset, image.payload_length)
    if head[:2] == b"MZ" and head[4:8] == _ZBOOT_MAGIC:
        return _part(kernel, *(int.from_bytes(head[at : at + 4], "little") for at in (8, 12)))
    return kernel


def _part(kernel: FileContent, offset: int, size: int) -> FileContent:
    if not size or offset + size > kernel.size:
        raise FormatError(f"kernel: compressed part of 0x{size:x} bytes at 0x{offset:x} of 0x{kernel.size:x} bytes")
    return FileContent(kernel.file, kernel.offset + offset, size, kernel.name)


def _head(content: FileContent, size: int) -> bytes:
    return b"".join(FileContent(content.file, content.offset, min(size, content.size), content.name).chunks())


class _Scan:
    """Takes a kernel in pieces, and keeps no more of it than it must."""

    def __init__(self) -> None:
        self._missing = set(Feature)
        self._release = ""
        self._tail = b""
        self._collected = b""
        self._configuration: dict[str, str] = {}

    def feed(self, chunk: bytes) -> None:
        data = self._tail + chunk
        self._tail = data[-_OVERLAP:]
        self._missing -= {feature for feature in self._missing if feature.value.string in data}
        if not self._release and (match := _VERSION.search(data)):
            self._release = match[1].decode("ascii")
        if self._collected:
            self._collect(chunk)
        elif not self._configuration and (start := data.find(_CONFIGURATION_MAGIC)) >= 0:
            self._collect(data[start + len(_CONFIGURATION_START) :])

    def features(self) -> KernelFeatures:
        if not self._release and not self._configuration:
            raise FormatError("kernel: unpacked, and no Linux version in it")
        if not self._configuration:
            found = frozenset(set(Feature) - self._missing)
            return KernelFeatures(LearnedFrom.STRINGS, self._release, found=found)
        found = frozenset(
            feature
            for feature in Feature
            if all(self._configuration.get(option) == "y" for option in feature.value.options)
        )
        return KernelFeatures(LearnedFrom.CONFIGURATION, self._release, self._configuration, found)

    def _collect(self, data: bytes) -> None:
        """Compressed bytes of the configuration, until they are whole or proved to be none."""
        self._collected += data[: MAX_CONFIGURATION_SIZE - len(self._collected)]
        unpacker = zlib.decompressobj(wbits=31)
        try:
            text = unpacker.decompress(self._collected, MAX_CONFIGURATION_SIZE)
        except zlib.error:
            self._collected = b""
            return
        if unpacker.eof:
            lines = text.decode("utf-8", "replace").splitlines()
            matches = (_CONFIGURATION_LINE.fullmatch(line) for line in lines)
            self._configuration = {match[1]: match[2] for match in matches if match}
        if unpacker.eof or len(text) == MAX_CONFIGURATION_SIZE or len(self._collected) == MAX_CONFIGURATION_SIZE:
            self._collected = b""
