# SPDX-License-Identifier: Apache-2.0
"""What a kernel can do: by its configuration, by its strings, of every kind of file, and of hostile ones."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_files import RELEASE, arm64_image, bzimage, kernel_proper, zboot

from enclavekit.eif import FileContent
from enclavekit.errors import FormatError, MissingError, TruncatedError
from enclavekit.image import kernel_features as module
from enclavekit.image.kernel_features import Answer, Feature, KernelFeatures, LearnedFrom, kernel_features

Learn = Callable[[bytes], KernelFeatures]


@pytest.fixture
def learn(tmp_path: Path) -> Learn:
    """The features of a kernel that stands in the middle of a file."""

    def learn(data: bytes) -> KernelFeatures:
        path = tmp_path / "image"
        path.write_bytes(b"before" + data + b"after, which is none of the kernel's")
        with path.open("rb") as file:
            return kernel_features(FileContent(file, 6, len(data), "image"))

    return learn


SOME = (Feature.NSM, Feature.MP_TABLE, Feature.XZ)


@pytest.mark.parametrize(
    "pack",
    [gzip.compress, bz2.compress, lzma.compress, lambda data: lzma.compress(data, lzma.FORMAT_ALONE), bytes],
    ids=["gzip", "bzip2", "xz", "lzma", "none"],
)
@pytest.mark.parametrize("wrap", [bzimage, zboot, bytes], ids=["bzimage", "zboot", "alone"])
def test_strings_are_found(learn: Learn, pack: Callable[[bytes], bytes], wrap: Callable[[bytes], bytes]) -> None:
    # Four bytes follow a compressed kernel: its size.
    features = learn(wrap(pack(kernel_proper(SOME)) + b"size"))
    assert features.trouble is None
    assert features.learned_from is LearnedFrom.STRINGS
    assert features.release == RELEASE
    assert {feature for feature in Feature if features.has(feature) is Answer.NO} == set(SOME)
    assert features.has(Feature.VSOCK) is Answer.YES
    assert features.configuration == {}


def test_zstd(learn: Learn) -> None:
    zstd = pytest.importorskip("backports.zstd")
    assert learn(bzimage(zstd.compress(kernel_proper()))).has(Feature.NSM) is Answer.YES


def test_an_image_of_aarch64(learn: Learn) -> None:
    features = learn(arm64_image(kernel_proper(SOME)))
    assert (features.release, features.has(Feature.NSM)) == (RELEASE, Answer.NO)


@pytest.mark.parametrize("before", [0, (1 << 18) - 9, (1 << 18) - 300, 3 << 18])
def test_strings_across_chunks(learn: Learn, before: int) -> None:
    features = learn(bzimage(bytes(before) + kernel_proper(SOME, configuration=None)))
    assert set(Feature) - features.found == set(SOME)
    assert features.release == RELEASE


CONFIGURATION = """\
#
# Automatically generated file; DO NOT EDIT.
CONFIG_VIRTIO_MMIO=y
CONFIG_VSOCKETS=y
CONFIG_VIRTIO_VSOCKETS=m
# CONFIG_NSM is not set
CONFIG_RD_GZIP=y
CONFIG_LOCALVERSION="-a=b"
CONFIG_PANIC_TIMEOUT=0
"""


@pytest.mark.parametrize("before", [0, (1 << 18) - 400])
def test_a_configuration_is_believed_before_strings(learn: Learn, before: int) -> None:
    features = learn(bzimage(bytes(before) + kernel_proper(configuration=CONFIGURATION)))
    assert features.learned_from is LearnedFrom.CONFIGURATION
    assert features.found == {Feature.VIRTIO_MMIO, Feature.GZIP}
    assert features.has(Feature.VSOCK) is Answer.NO  # a module is not in the kernel
    assert features.configuration["CONFIG_LOCALVERSION"] == '"-a=b"'
    assert "CONFIG_NSM" not in features.configuration


def test_a_configuration_over_several_chunks(learn: Learn) -> None:
    noise = "".join(sha256(b"%d" % number).hexdigest() for number in range(9400))
    lines = "".join(f"CONFIG_X{at}={noise[at : at + 900]}\n" for at in range(0, 600_000, 900))
    features = learn(bzimage(kernel_proper(configuration=lines + "CONFIG_NSM=y\n")))
    assert features.found == {Feature.NSM}
    assert len(features.configuration) == 668


@pytest.mark.parametrize("broken", [b"IKCFG_ST\x1f\x8b\x08", b"IKCFG_ST" + gzip.compress(b"x" * 100, mtime=0)[:-12]])
def test_a_broken_configuration_is_none(learn: Learn, broken: bytes) -> None:
    features = learn(bzimage(broken + bytes(100) + kernel_proper(SOME)))
    assert features.learned_from is LearnedFrom.STRINGS
    assert set(Feature) - features.found == set(SOME)


def test_a_configuration_that_does_not_end(learn: Learn) -> None:
    bomb = b"IKCFG_ST" + gzip.compress(bytes(50 << 20))
    features = learn(bzimage(bomb + kernel_proper()))
    assert features.learned_from is LearnedFrom.STRINGS


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (bzimage(gzip.compress(b"no kernel", mtime=0)), FormatError, "kernel: unpacked, and no Linux version in it"),
        (
            bzimage(gzip.compress(kernel_proper(), mtime=0)[:-9]),
            TruncatedError,
            "kernel: gzip ends before its stream does",
        ),
        (
            bzimage(gzip.compress(kernel_proper(), mtime=0)[:-8] + bytes(8)),
            FormatError,
            "kernel: damaged gzip: error -3 while decompressing data: incorrect data check",
        ),
        (bzimage(b"\x02\x21\x4c\x18\x09\0\0\0rest"), TruncatedError, "kernel: lz4 ends before its stream does"),
        (bzimage(b"\x89LZOrest"), MissingError, "kernel: compressed with lzo, which cannot be read here"),
        (bzimage(b""), FormatError, "kernel: compressed part of 0x0 bytes at 0x600 of 0x610 bytes"),
        (
            zboot(b"x")[:8] + b"\xff" * 8,
            FormatError,
            "kernel: compressed part of 0xffffffff bytes at 0xffffffff of 0x10 bytes",
        ),
        (b"", FormatError, "kernel: unpacked, and no Linux version in it"),
    ],
)
def test_trouble(learn: Learn, data: bytes, error: type[Exception], message: str) -> None:
    features = learn(data)
    assert type(features.trouble) is error
    assert features.trouble is not None
    assert features.trouble.message == message
    assert {features.has(feature) for feature in Feature} == {Answer.UNKNOWN}
    assert features.learned_from is LearnedFrom.NOTHING


def test_a_kernel_that_becomes_too_large(learn: Learn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_UNPACKED_SIZE", 1 << 20)
    monkeypatch.setattr(module, "MAX_RATIO", 2)
    features = learn(bzimage(gzip.compress(kernel_proper() + bytes(2 << 20))))
    assert features.trouble is not None
    assert features.trouble.message == "kernel: gzip becomes more than 1048576 bytes"


@given(
    data=st.binary(max_size=200),
    wrap=st.sampled_from([bzimage, zboot, arm64_image, bytes]),
    head=st.sampled_from(
        [b"", b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0", b"\x5d\0\0", b"\x7fELF", b"IKCFG_ST\x1f\x8b\x08"]
    ),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_trouble(learn: Learn, data: bytes, wrap: Callable[[bytes], bytes], head: bytes) -> None:
    assert learn(wrap(head + data)).trouble is not None
