# SPDX-License-Identifier: Apache-2.0
"""The enclave image format: read, written, measured and described."""

from enclavekit.eif.content import CHUNK_SIZE, BytesContent, Content, FileContent
from enclavekit.eif.describe import describe, measurements_object
from enclavekit.eif.layout import Arch, Header, SectionHeader, SectionType
from enclavekit.eif.measure import Measured, Measurements, digest_file, extend, measure
from enclavekit.eif.metadata import BuildInfo, Discovery, KernelInfo, Metadata
from enclavekit.eif.reader import Image, ImageSection, read, read_section
from enclavekit.eif.writer import Section, Written, write

__all__ = [
    "CHUNK_SIZE",
    "Arch",
    "BuildInfo",
    "BytesContent",
    "Content",
    "Discovery",
    "FileContent",
    "Header",
    "Image",
    "ImageSection",
    "KernelInfo",
    "Measured",
    "Measurements",
    "Metadata",
    "Section",
    "SectionHeader",
    "SectionType",
    "Written",
    "describe",
    "digest_file",
    "extend",
    "measure",
    "measurements_object",
    "read",
    "read_section",
    "write",
]
