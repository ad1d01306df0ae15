# SPDX-License-Identifier: Apache-2.0
"""Written images, byte for byte."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

import pytest
from eif_images import APPLICATION, BOOT, KERNEL, METADATA, PARTS, PCR0, PCR1, PCR2, PCR2_OF_NOTHING, image

from enclavekit.eif import Arch, BytesContent, Section, SectionType, write
from enclavekit.eif.measure import Measurer
from enclavekit.errors import EifError


def test_inputs_are_the_known_ones() -> None:
    assert len(KERNEL) == 32
    assert len(METADATA) == 243
    digest = hashlib.sha256(BOOT).hexdigest()
    assert digest == "e48bc38a47458e241879a6f6b8d0fa00c6c8afd417b48a3f4f623fbdfdc2ebc5"
    digest = hashlib.sha256(APPLICATION).hexdigest()
    assert digest == "b68f62ac8e5a47d7b80bc6de059f74057cf21724c256ead416fc55ab16ca54ef"


@pytest.mark.parametrize(
    ("parts", "arch", "version", "digest"),
    [
        ("kcm01", Arch.X86_64, 4, "1d30ea6c5ebab7975a875bffe506473d3f40d97e2b06a95385f8491653b7e743"),
        ("kcm01", Arch.AARCH64, 4, "0dc29d964e71dad14a48da2931463a1f172d78caa0da268045cd917b9aa6c8d5"),
        ("kcm0", Arch.X86_64, 4, "d2de40f7a5b1117b5f87fe9f38fed45aeea9b14e56d4bc9ba199de7c4dc3bed3"),
        ("kc01", Arch.X86_64, 3, "82da1853b28fb8b358062d0ffb1b8b24b2dac4179da170696fff8014bde9fbd6"),
    ],
)
def test_known_images(parts: str, arch: Arch, version: int, digest: str) -> None:
    assert hashlib.sha256(image(parts, arch=arch, version=version)).hexdigest() == digest


@pytest.mark.parametrize(
    ("parts", "pcrs"), [("kcm01", [PCR0, PCR1, PCR2]), ("kcm0", [PCR1, PCR1, PCR2_OF_NOTHING]), ("ck01ms", None)]
)
def test_result(parts: str, pcrs: list[str] | None) -> None:
    out = io.BytesIO()
    written = write(out, [PARTS[part] for part in parts], arch=Arch.X86_64)
    data = out.getvalue()
    assert written.size == len(data)
    assert written.crc.to_bytes(4, "big") == data[544:548]
    made = written.measurements
    if pcrs:
        assert [made.pcr0.hex(), made.pcr1.hex(), made.pcr2.hex()] == pcrs
    else:  # the command line before the kernel is another measurement
        assert made.pcr0.hex() != PCR0
        assert made.pcr2.hex() == PCR2


class Short:
    """Says 5, gives 4."""

    size = 5

    def chunks(self) -> Iterator[bytes]:
        yield b"four"


def test_content_of_another_size_is_the_callers_mistake() -> None:
    sections = [PARTS["k"], PARTS["c"], PARTS["m"], Section(SectionType.RAMDISK, Short())]
    with pytest.raises(ValueError, match="ramdisk gave 4 bytes, said 5"):
        write(io.BytesIO(), sections, arch=Arch.X86_64)


def test_measurer_needs_the_platform_first() -> None:
    with pytest.raises(ValueError, match="the kernel and the command line must stand before the ramdisks"):
        Measurer([SectionType.KERNEL, SectionType.RAMDISK, SectionType.CMDLINE])


@pytest.mark.parametrize(
    ("parts", "version", "message"),
    [
        ("cm0", 4, "EIF sections: 0 of type kernel, expected exactly 1"),
        ("kkcm0", 4, "EIF sections: 2 of type kernel, expected exactly 1"),
        ("km0", 4, "EIF sections: 0 of type cmdline, expected exactly 1"),
        ("kcm", 4, "EIF sections: 0 of type ramdisk, expected at least 1"),
        ("0kcm", 4, "EIF sections: a ramdisk before the kernel, expected all of them after it"),
        ("kc0", 4, "EIF sections: no metadata, which version 4 must have"),
        ("kcmm0", 4, "EIF sections: 2 of type metadata, expected at most 1"),
        ("kcm0ss", 4, "EIF sections: 2 of type signature, expected at most 1"),
        ("kcm0", 3, "EIF sections: metadata in version 3, expected version 4 or later"),
        ("kc0s", 2, "EIF sections: signature in version 2, expected version 3 or later"),
        ("kcm" + "0" * 30, 4, "EIF sections: 33, expected at most 32"),
    ],
)
def test_what_is_no_image(parts: str, version: int, message: str) -> None:
    with pytest.raises(EifError) as caught:
        image(parts, version=version)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("kind", "limit"),
    [(SectionType.CMDLINE, 1 << 16), (SectionType.METADATA, 1 << 20), (SectionType.SIGNATURE, 1 << 15)],
)
def test_small_sections_are_small(kind: SectionType, limit: int) -> None:
    sections = [PARTS[part] for part in "kcm0s" if PARTS[part].type is not kind]
    sections.insert(1, Section(kind, BytesContent(bytes(limit + 1))))
    with pytest.raises(EifError) as caught:
        write(io.BytesIO(), sections, arch=Arch.X86_64)
    assert caught.value.message == f"EIF sections: {kind} of {limit + 1} bytes, expected at most {limit}"
