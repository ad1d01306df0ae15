# SPDX-License-Identifier: Apache-2.0
"""Rules about the file: its structure, CRC and metadata, and the memory that it needs."""

from __future__ import annotations

from collections.abc import Iterator

from enclavekit.eif.signature import SOON
from enclavekit.errors import CertificateError, ImageTooLargeError
from enclavekit.inspection.findings import Finding, Level, found
from enclavekit.inspection.subject import NITRO, Subject
from enclavekit.linux.nitro_enclaves import NE_MIN_ENCLAVE_MEM_SIZE
from enclavekit.platform.machine import MIB
from enclavekit.platform.placement import NITRO_CLI_FACTOR, needed_memory

CURRENT_VERSION = 4


def image_rules(subject: Subject) -> Iterator[Finding]:
    """All of them."""
    yield from structure(subject)
    yield from _crc(subject)
    yield from _metadata(subject)
    yield from signature(subject)
    if len(subject.image.ramdisks) == 1:
        yield found(
            "one-ramdisk",
            "ramdisk 0",
            "one ramdisk: PCR0 and PCR1 are the same, and PCR2 is that of nothing",
            hint="with a second ramdisk for the application, PCR1 stays the same from one application to the next",
        )
    yield from _memory(subject)


def structure(subject: Subject) -> Iterator[Finding]:
    """What a tolerant reader remarked on."""
    for remark in subject.image.remarks:
        yield found("structure" if remark.refused else "structure-odd", "file", remark.message)
    version = subject.image.header.version
    if version < CURRENT_VERSION and subject.locally:
        yield found("format-version", "header", f"format version {version}, QEMU's nitro-enclave machine expects 4")


def signature(subject: Subject) -> Iterator[Finding]:
    """Whether the signature is of this image, and its certificate valid at ``subject.now``."""
    error, made = subject.examined.signature_error, subject.examined.signature
    if error:
        yield found("signature", "signature", error.message, hint=error.hint)
    if made is None:
        return
    if not made.canonical:
        yield found("signature-odd", "signature", "the section is not encoded as AWS's tools do")
    try:
        first, last = made.certificate.validity
    except CertificateError as broken:
        if not error:
            yield found("signature", "signature", broken.message)
        return
    if not first <= subject.now <= last:
        yield found(
            "certificate",
            "signature",
            f"certificate: valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}",
            hint="sign anew with a certificate that is valid",
        )
    elif last - subject.now < SOON:
        yield found("certificate-soon", "signature", f"certificate: expires on {last:%Y-%m-%d}")


def _crc(subject: Subject) -> Iterator[Finding]:
    wanted, made = subject.image.header.crc, subject.examined.measured.crc
    if wanted != made:
        yield found(
            "crc",
            "header",
            f"CRC 0x{wanted:08x}, expected 0x{made:08x}",
            hint="the file was damaged or changed: build or fetch it again",
        )


def _metadata(subject: Subject) -> Iterator[Finding]:
    error, metadata = subject.examined.metadata_error, subject.examined.metadata
    if error:
        yield found("metadata", "metadata", f"{error.message}: nitro-cli describe-eif fails (E35)")
    elif metadata and not isinstance(metadata.custom, dict | None):
        yield found("metadata", "metadata", "CustomMetadata is no object: nitro-cli describe-eif fails (E17)")


def _memory(subject: Subject) -> Iterator[Finding]:
    size = subject.image.size
    if subject.on_ec2:
        needed = max(-(-NITRO_CLI_FACTOR * size // MIB) * MIB, NE_MIN_ENCLAVE_MEM_SIZE)
        yield from _against(subject, needed, f"nitro-cli run-enclave ({NITRO_CLI_FACTOR} times the file)")
    if subject.locally and subject.bzimage:
        unpacked = sum(ramdisk.unpacked_size for ramdisk in subject.ramdisks)
        packed = sum(section.size for section in subject.image.ramdisks)
        try:
            needed = needed_memory(subject.bzimage, size, max(packed, unpacked))
        except ImageTooLargeError as error:
            level = None if subject.carrier is None else Level.ERROR
            yield found("image-too-large", "file", error.message, hint=error.hint, level=level)
        else:
            yield from _against(subject, needed, "a local machine")


def _against(subject: Subject, needed: int, whom: str) -> Iterator[Finding]:
    text = f"{whom} needs {needed // MIB} MiB"
    if subject.memory is None:
        hint = f"nitro-cli run-enclave --memory {needed // MIB}" if subject.carrier == NITRO else None
        yield found("memory-needed", "file", text, hint=hint)
    elif subject.memory < needed:
        yield found("memory", "file", f"memory: got {subject.memory / MIB:g} MiB, {text}")
