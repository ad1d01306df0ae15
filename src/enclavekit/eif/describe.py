# SPDX-License-Identifier: Apache-2.0
"""A description of an image as nitro-cli's describe-eif prints it, and what it leaves out."""

from __future__ import annotations

from typing import Any, BinaryIO

from enclavekit.eif.layout import SectionType
from enclavekit.eif.measure import measure, section_digest
from enclavekit.eif.metadata import parse
from enclavekit.eif.reader import MAX_METADATA_SIZE, Image, read, read_section
from enclavekit.errors import EifError


def describe(file: BinaryIO, *, digests: bool = False) -> dict[str, Any]:
    """Read, check and measure an EIF in an ordinary file. ``digests`` adds each section's SHA-384: more hashing."""
    image = read(file)
    measurements, crc = measure(file, image)
    warnings: list[str] = []
    metadata = _metadata(file, image, warnings)
    if crc != image.header.crc:
        warnings.append(f"checksum: got 0x{image.header.crc:08x} in the header, expected 0x{crc:08x}: it will not boot")
    if image.is_signed:
        warnings.append("the signature was not checked")
    described: dict[str, Any] = {
        "EifVersion": image.header.version,
        "Measurements": measurements.as_dict(),
        "IsSigned": image.is_signed,
        "CheckCRC": crc == image.header.crc,
    }
    for key in ("ImageName", "ImageVersion"):
        if key in metadata:
            described[key] = metadata[key]
    build = metadata.get("BuildMetadata")
    if isinstance(build, dict):
        described["Metadata"] = {**build, "DockerInfo": metadata.get("DockerInfo")}
        custom = metadata.get("CustomMetadata")
        if isinstance(custom, dict):
            described["Metadata"] |= custom
    if isinstance(metadata.get("Kernel"), dict):
        described["Kernel"] = metadata["Kernel"]
    described["Architecture"] = image.arch.value
    described["Sections"] = [
        {"Type": section.type.label, "Offset": section.offset, "Size": section.size}
        | ({"SHA384": section_digest(file, section).hex()} if digests else {})
        for section in image.sections
    ]
    described["Warnings"] = warnings
    return described


def _metadata(file: BinaryIO, image: Image, warnings: list[str]) -> dict[str, Any]:
    for section in image.of_type(SectionType.METADATA):
        try:
            return parse(read_section(file, section, MAX_METADATA_SIZE))
        except EifError as error:
            warnings.append(error.message)
    return {}
