# SPDX-License-Identifier: Apache-2.0
"""The enclave image format: read, write, measure, describe."""

from enclavekit.eif.describe import describe
from enclavekit.eif.layout import Header, HeaderFlag, SectionHeader, SectionType
from enclavekit.eif.measure import Measurements, extend, measure, pcr_of
from enclavekit.eif.metadata import Discovery, KernelInfo, Metadata
from enclavekit.eif.reader import Image, Section, read, read_kernel, read_section
from enclavekit.eif.writer import BytesContent, Content, FileContent, NewSection, write

__all__ = [
    "BytesContent",
    "Content",
    "Discovery",
    "FileContent",
    "Header",
    "HeaderFlag",
    "Image",
    "KernelInfo",
    "Measurements",
    "Metadata",
    "NewSection",
    "Section",
    "SectionHeader",
    "SectionType",
    "describe",
    "extend",
    "measure",
    "pcr_of",
    "read",
    "read_kernel",
    "read_section",
    "write",
]
