# SPDX-License-Identifier: Apache-2.0
"""What ``describe`` says of an image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eif_images import METADATA, PARTS, PCR0, PCR1, PCR2, image, patched, saved

from enclavekit.eif import Arch, BytesContent, Discovery, KernelInfo, Metadata, Section, SectionType, describe, write
from enclavekit.errors import FileError, TruncatedError


def test_keys_values_and_order(tmp_path: Path) -> None:
    made = describe(saved(tmp_path, image("kcm01s")))
    expected = {
        "EifVersion": 4,
        "Measurements": {"HashAlgorithm": "Sha512_48 { .. }", "PCR0": PCR0, "PCR1": PCR1, "PCR2": PCR2},
        "IsSigned": True,
        "CheckCRC": True,
        "ImageName": "hello",
        "ImageVersion": "v1",
        "Metadata": {
            "BuildTime": "1970-01-01T00:00:00+00:00",
            "BuildTool": "nitro-cli",
            "BuildToolVersion": "1.5.0",
            "OperatingSystem": "Linux",
            "KernelVersion": "4.14.256",
            "DockerInfo": None,
        },
        "Architecture": "x86_64",
        "Sections": [
            {"Type": "kernel", "Offset": 560, "Size": 32},
            {"Type": "cmdline", "Offset": 604, "Size": 84},
            {"Type": "metadata", "Offset": 700, "Size": 243},
            {"Type": "ramdisk", "Offset": 955, "Size": 512},
            {"Type": "ramdisk", "Offset": 1479, "Size": 2048},
            {"Type": "signature", "Offset": 3539, "Size": 9},
        ],
        "Warnings": ["the signature was not checked"],
    }
    assert json.dumps(made) == json.dumps(expected)


def test_section_digests(tmp_path: Path) -> None:
    made = describe(saved(tmp_path, image()), section_digests=True)
    assert list(made["Sections"][0]) == ["Type", "Offset", "Size", "SHA384"]
    assert made["Sections"][0]["SHA384"].startswith("c40b9798ae3491456339b567f57677f0")
    assert made["Warnings"] == []


def test_without_metadata(tmp_path: Path) -> None:
    made = describe(saved(tmp_path, image("kc0", version=2, arch=Arch.AARCH64)))
    assert list(made) == [
        *("EifVersion", "Measurements", "IsSigned", "CheckCRC", "Architecture", "Sections", "Warnings"),
    ]
    assert made["Architecture"] == "aarch64"
    assert made["IsSigned"] is False


def test_custom_metadata_and_kernel(tmp_path: Path) -> None:
    plain = Metadata.parse(METADATA)
    kernel = KernelInfo("k", "00", Discovery.CMDLINE)
    metadata = Metadata("n", "v", plain.build, {"Id": "x"}, {"team": "a", "DockerInfo": "hidden"}, kernel)
    path = tmp_path / "image.eif"
    sections = [PARTS["k"], PARTS["c"], Section(SectionType.METADATA, BytesContent(metadata.encode())), PARTS["0"]]
    with path.open("wb") as out:
        write(out, sections, arch=Arch.X86_64)
    made = describe(path)["Metadata"]
    assert made["team"] == "a"
    assert made["DockerInfo"] == {"Id": "x"}
    assert made["Kernel"] == {"Name": "k", "SHA384": "00", "Discovery": "cmdline"}


def test_warnings(tmp_path: Path) -> None:
    data = image("kcm0")
    odd = data[:943] + b"gap" + data[943:] + b"tail"
    odd = patched(odd, (0x1C + 24, (946).to_bytes(8, "big")), (6, b"\2\0"), (700, b"!"))
    made = describe(saved(tmp_path, odd))
    crc, *warnings = made["Warnings"]
    assert made["CheckCRC"] is False
    assert crc.startswith("the CRC is 0x")
    assert crc.endswith(f", the header says 0x{int.from_bytes(odd[544:548], 'big'):08x}: it will not boot")
    assert warnings == [
        "unknown header flags 0x0200",
        "a gap between sections at offset 0x3af: some tools cannot read this image",
        "4 bytes behind the last section",
        "metadata: not JSON in UTF-8: expecting value",
    ]


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        describe(tmp_path / "none.eif")
    assert caught.value.message == f"cannot read {tmp_path}/none.eif: no such file or directory"
    with pytest.raises(FileError) as caught:
        describe(tmp_path)
    assert caught.value.message == f"cannot read {tmp_path}: is a directory"
    with pytest.raises(TruncatedError):
        describe(saved(tmp_path, image()[:-1]))
