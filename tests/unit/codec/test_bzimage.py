# SPDX-License-Identifier: Apache-2.0
"""The setup header of an x86 kernel."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.codec.bzimage import BzImage
from enclavekit.errors import FormatError, KernelError, TruncatedError

SIZE = 0x1400
BANNER = b"6.12.0-test (a@b) #1 SMP"


def kernel(**changed: int) -> bytes:
    """A kernel with nothing in it. Fields by name; their offsets and widths as in the boot protocol's document."""
    fields = {
        "setup_sects": (0x1F1, 1, 2),
        "boot_flag": (0x1FE, 2, 0xAA55),
        "header": (0x202, 4, int.from_bytes(b"HdrS", "little")),
        "version": (0x206, 2, 0x020F),
        "kernel_version": (0x20E, 2, 0x100),
        "loadflags": (0x211, 1, 1),
        "code32_start": (0x214, 4, 0x100000),
        "initrd_addr_max": (0x22C, 4, 0x7FFFFFFF),
        "kernel_alignment": (0x230, 4, 0x200000),
        "relocatable": (0x234, 1, 1),
        "xloadflags": (0x236, 2, 0x7F),
        "cmdline_size": (0x238, 4, 2047),
        "payload_offset": (0x248, 4, 0x200),
        "payload_length": (0x24C, 4, 0x300),
        "pref_address": (0x258, 8, 0x1000000),
        "init_size": (0x260, 4, 0x2000000),
    }
    made = bytearray(SIZE)
    for name, (offset, width, value) in fields.items():
        made[offset : offset + width] = changed.get(name, value).to_bytes(width, "little")
    made[0x300 : 0x300 + len(BANNER)] = BANNER
    return bytes(made)


def test_fields() -> None:
    assert BzImage.parse(kernel(), SIZE) == BzImage(
        setup_sects=2,
        version=0x020F,
        loadflags=1,
        code32_start=0x100000,
        initrd_addr_max=0x7FFFFFFF,
        kernel_alignment=0x200000,
        relocatable=True,
        xloadflags=0x7F,
        cmdline_size=2047,
        payload_offset=0x200,
        payload_length=0x300,
        pref_address=0x1000000,
        init_size=0x2000000,
        banner=BANNER.decode(),
    )


def test_derived() -> None:
    image = BzImage.parse(kernel(setup_sects=0), SIZE)
    assert image.protected_mode_offset == 0xA00
    assert image.is_64_bit
    assert not BzImage.parse(kernel(xloadflags=0), SIZE).is_64_bit
    assert BzImage.parse(kernel(kernel_version=0), SIZE).banner == ""


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"header": 0}, KernelError, r"bzImage header: magic b'\x00\x00\x00\x00' at 0x202, expected b'HdrS'"),
        ({"boot_flag": 0}, KernelError, "bzImage header: boot flag 0x0000, expected 0xaa55"),
        ({"version": 0x20B}, KernelError, "bzImage header: boot protocol 0x020b, expected 0x020c or later"),
        ({"loadflags": 0}, KernelError, "bzImage header: a kernel to be loaded low (zImage), expected a bzImage"),
        ({"kernel_alignment": 3}, KernelError, "bzImage header: kernel_alignment 0x3, expected a power of two"),
        ({"setup_sects": 9}, TruncatedError, "bzImage: protected-mode kernel at 0x1400 of a file of 0x1400 bytes"),
        (
            {"payload_length": 0xF00},
            TruncatedError,
            "bzImage: compressed kernel ends at 0x1700 of a file of 0x1400 bytes",
        ),
    ],
)
def test_refused(changed: dict[str, int], error: type[FormatError], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        BzImage.parse(kernel(**changed), SIZE)
    assert type(caught.value) is error
    assert caught.value.message == message


def test_short() -> None:
    with pytest.raises(TruncatedError) as caught:
        BzImage.parse(kernel()[:0x200], 0x200)
    assert caught.value.message == "bzImage header: need 624 bytes, have 512"


@given(st.binary(min_size=0x80, max_size=0x80), st.integers(0, 1 << 40))
def test_any_header_is_parsed_or_refused(fields: bytes, size: int) -> None:
    data = kernel()
    for head in (data[:0x1F1] + fields + data[0x271:], data[:0x206] + fields + data[0x286:]):
        try:
            parsed: Any = BzImage.parse(head, size)
        except FormatError as error:
            assert error.message.startswith("bzImage")  # noqa: PT017  # either outcome is right
        else:
            assert parsed.protected_mode_offset < size
