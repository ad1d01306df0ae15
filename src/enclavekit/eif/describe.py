# SPDX-License-Identifier: Apache-2.0
"""What an EIF is, as an object for JSON: the keys of ``nitro-cli describe-eif``, in its order, and then our own.

Source: aws-nitro-enclaves-cli src/enclave_proc_comm, aws-nitro-enclaves-image-format src/utils/eif_reader.rs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from enclavekit.eif.layout import FLAG_AARCH64
from enclavekit.eif.measure import Measured, Measurements, measure
from enclavekit.eif.metadata import Metadata
from enclavekit.eif.reader import Image, read, read_section
from enclavekit.errors import EifError, FileError

HASH_ALGORITHM = "Sha512_48 { .. }"
"""How nitro-cli since 1.5.0 names SHA-384."""


def describe(path: Path, *, section_digests: bool = False) -> dict[str, Any]:
    """Read and measure the whole file. Sections have the key SHA384 when ``section_digests`` is set."""
    try:
        with path.open("rb") as file:
            return _describe(file, str(path), section_digests)
    except OSError as error:
        raise FileError.of(error, path, "read") from error


def measurements_object(measurements: Measurements) -> dict[str, str]:
    """The object that stands under ``Measurements`` in nitro-cli's output."""
    return {
        "HashAlgorithm": HASH_ALGORITHM,
        "PCR0": measurements.pcr0.hex(),
        "PCR1": measurements.pcr1.hex(),
        "PCR2": measurements.pcr2.hex(),
    }


def _describe(file: BinaryIO, name: str, section_digests: bool) -> dict[str, Any]:
    image = read(file)
    measured = measure(file, image, name=name, section_digests=section_digests)
    warnings = _warnings(image, measured)
    made: dict[str, Any] = {
        "EifVersion": image.header.version,
        "Measurements": measurements_object(measured.measurements),
        "IsSigned": image.signature is not None,
        "CheckCRC": measured.crc == image.header.crc,
    }
    if image.metadata:
        try:
            made |= _metadata(Metadata.parse(read_section(file, image.metadata)))
        except EifError as error:
            warnings.append(error.message)
    made["Architecture"] = str(image.arch)
    made["Sections"] = [
        {"Type": str(section.type), "Offset": section.offset, "Size": section.size} for section in image.sections
    ]
    for section, digest in zip(made["Sections"], measured.section_digests or (), strict=section_digests):
        section["SHA384"] = digest.hex()
    made["Warnings"] = warnings
    return made


def _metadata(metadata: Metadata) -> dict[str, Any]:
    build = metadata.build
    made: dict[str, Any] = {
        "BuildTime": build.time,
        "BuildTool": build.tool,
        "BuildToolVersion": build.tool_version,
        "OperatingSystem": build.operating_system,
        "KernelVersion": build.kernel_version,
        "DockerInfo": metadata.docker_info,
    }
    # nitro-cli flattens custom metadata into the rest, and fails when they are no object.
    if isinstance(metadata.custom, dict):
        made |= {key: value for key, value in metadata.custom.items() if key not in made}
    if metadata.kernel:
        kernel = metadata.kernel
        made["Kernel"] = {"Name": kernel.name, "SHA384": kernel.sha384, "Discovery": kernel.discovery.value}
    return {"ImageName": metadata.image_name, "ImageVersion": metadata.image_version, "Metadata": made}


def _warnings(image: Image, measured: Measured) -> list[str]:
    warnings = []
    if measured.crc != image.header.crc:
        warnings.append(f"the CRC is 0x{measured.crc:08x}, the header says 0x{image.header.crc:08x}: it will not boot")
    if image.signature:
        warnings.append("the signature was not checked")
    unknown = image.header.flags & ~FLAG_AARCH64
    if unknown:
        warnings.append(f"unknown header flags 0x{unknown:04x}")
    ends = [548, *(section.end for section in image.sections)]
    gaps = [end for end, section in zip(ends, image.sections, strict=False) if section.header_offset != end]
    if gaps:
        warnings.append(f"a gap between sections at offset 0x{gaps[0]:x}: some tools cannot read this image")
    if image.size > ends[-1]:
        warnings.append(f"{image.size - ends[-1]} bytes behind the last section")
    return warnings
