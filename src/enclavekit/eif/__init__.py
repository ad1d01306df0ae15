# SPDX-License-Identifier: Apache-2.0
"""The enclave image format: read, written, measured, signed, verified and described.

    with open("app.eif", "rb") as file:
        image = eif.read(file)                                  # or inspect: reads on past what is wrong
        measured = eif.measure(file, image, name="app.eif")
    print(image.arch, [section.kind for section in image.sections], measured.measurements.pcr0.hex())

``docs/python.md`` has more of these.
"""

from enclavekit.eif.certificate_object import certificate_object
from enclavekit.eif.content import CHUNK_SIZE, BytesContent, Content, FileContent
from enclavekit.eif.describe import (
    Examined,
    describe,
    describe_eif_object,
    examine,
    measurements_object,
    size_text,
    warnings,
)
from enclavekit.eif.layout import Arch, Header, SectionHeader, SectionType
from enclavekit.eif.lock import Input, Lock
from enclavekit.eif.measure import Measured, Measurements, digest, digest_file, extend, measure
from enclavekit.eif.metadata import BuildInfo, Discovery, KernelInfo, Metadata
from enclavekit.eif.reader import Image, ImageSection, Remark, inspect, read, read_section
from enclavekit.eif.rewrite import measure_to_sign, write_signed
from enclavekit.eif.signature import Signature, Signer, SigningCertificate, sign, signed, unsigned
from enclavekit.eif.writer import Output, Section, Sign, Written, write

__all__ = [
    "CHUNK_SIZE",
    "Arch",
    "BuildInfo",
    "BytesContent",
    "Content",
    "Discovery",
    "Examined",
    "FileContent",
    "Header",
    "Image",
    "ImageSection",
    "Input",
    "KernelInfo",
    "Lock",
    "Measured",
    "Measurements",
    "Metadata",
    "Output",
    "Remark",
    "Section",
    "SectionHeader",
    "SectionType",
    "Sign",
    "Signature",
    "Signer",
    "SigningCertificate",
    "Written",
    "certificate_object",
    "describe",
    "describe_eif_object",
    "digest",
    "digest_file",
    "examine",
    "extend",
    "inspect",
    "measure",
    "measure_to_sign",
    "measurements_object",
    "read",
    "read_section",
    "sign",
    "signed",
    "size_text",
    "unsigned",
    "warnings",
    "write",
    "write_signed",
]
