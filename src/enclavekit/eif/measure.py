# SPDX-License-Identifier: Apache-2.0
"""Measurement of an EIF: PCR0, PCR1, PCR2 and the CRC, in one streaming pass each, side by side.

PCRn = SHA-384(48 zero bytes ‖ SHA-384(content)): PCR0 of kernel, command line and all ramdisks; PCR1 of kernel, command
line and the first ramdisk, which is PCR0's prefix; PCR2 of the other ramdisks. Headers, metadata and signature are not
measured. hashlib and zlib release the GIL, so PCR0's chain has one core, PCR2 and the CRC the other.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from enclavekit.eif.layout import Header, SectionType
from enclavekit.eif.reader import Image, Section
from enclavekit.errors import FileError, TruncatedError

DIGEST_SIZE = 48
CHUNK = 1 << 18
"""Bytes read at a time: fits a core's cache, so that the hash does not wait for memory."""

HASH_ALGORITHM = "Sha512_48 { .. }"
"""As nitro-cli 1.5 prints SHA-384."""


class Hash(Protocol):
    """What hashlib gives."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in more."""

    def digest(self) -> bytes:
        """Of what has been taken in so far."""

    def copy(self) -> Hash:
        """An independent one that goes on from here."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """PCR values, 48 bytes each."""

    pcr0: bytes
    pcr1: bytes
    pcr2: bytes

    def as_dict(self) -> dict[str, str]:
        """nitro-cli's Measurements object."""
        return {
            "HashAlgorithm": HASH_ALGORITHM,
            "PCR0": self.pcr0.hex(),
            "PCR1": self.pcr1.hex(),
            "PCR2": self.pcr2.hex(),
        }


def extend(digest: bytes) -> bytes:
    """A PCR that was zero, extended once."""
    return hashlib.sha384(bytes(DIGEST_SIZE) + digest).digest()


def pcr_of(chunks: Iterable[bytes | memoryview]) -> bytes:
    """The PCR of one stream of bytes, as ``nitro-cli pcr --input`` has it."""
    digest = hashlib.sha384()
    for chunk in chunks:
        digest.update(chunk)
    return extend(digest.digest())


class Measuring:
    """Takes section data in file order, section by section; PCR1's hash is copied out of PCR0's on the way."""

    def __init__(self) -> None:
        self._all: Hash = hashlib.sha384()
        self._boot: Hash | None = None
        self._application: Hash = hashlib.sha384()
        self._ramdisks = 0

    def hashes(self, kind: SectionType) -> tuple[Hash, ...]:
        """The hashes that the next section's data must be given to, in any interleaving."""
        if kind in (SectionType.METADATA, SectionType.SIGNATURE):
            return ()
        if kind is SectionType.RAMDISK:
            self._ramdisks += 1
            if self._ramdisks == 2:
                self._boot = self._all.copy()
            if self._ramdisks > 1:
                return (self._all, self._application)
        return (self._all,)

    def result(self) -> Measurements:
        """The PCRs of what was taken in."""
        boot = self._boot if self._boot is not None else self._all
        return Measurements(*(extend(digest.digest()) for digest in (self._all, boot, self._application)))


def measure(file: BinaryIO, image: Image) -> tuple[Measurements, int]:
    """PCRs and CRC of an image in an ordinary file. Errors: ``FileError``, ``TruncatedError``."""
    measured = [s for s in image.sections if s.type not in (SectionType.METADATA, SectionType.SIGNATURE)]
    ramdisks = image.ramdisks

    def chain() -> tuple[bytes, bytes]:
        digest, boot = hashlib.sha384(), None
        for section in measured:
            if len(ramdisks) > 1 and section == ramdisks[1]:
                boot = digest.digest()
            for chunk in chunks(file, section.offset, section.size):
                digest.update(chunk)
        return digest.digest(), boot or digest.digest()

    def application() -> bytes:
        digest = hashlib.sha384()
        for section in ramdisks[1:]:
            for chunk in chunks(file, section.offset, section.size):
                digest.update(chunk)
        return digest.digest()

    with ThreadPoolExecutor(2) as pool:
        pcr0_and_1 = pool.submit(chain)
        pcr2 = pool.submit(application)
        crc = checksum(file, image)
        all_, boot = pcr0_and_1.result()
        return Measurements(extend(all_), extend(boot), extend(pcr2.result())), crc


def checksum(file: BinaryIO, image: Image) -> int:
    """CRC-32 of everything in the file but the CRC itself, which is left out."""
    crc = 0
    for chunk in chunks(file, 0, Header.CRC_OFFSET):
        crc = zlib.crc32(chunk, crc)
    for chunk in chunks(file, Header.LAYOUT.size, image.size - Header.LAYOUT.size):
        crc = zlib.crc32(chunk, crc)
    return crc


def section_digest(file: BinaryIO, section: Section) -> bytes:
    """SHA-384 of a section's data."""
    digest = hashlib.sha384()
    for chunk in chunks(file, section.offset, section.size):
        digest.update(chunk)
    return digest.digest()


def chunks(file: BinaryIO, offset: int, size: int) -> Iterator[memoryview]:
    """Bytes of a file, in one buffer that is used again for each chunk. Any number of threads may read one file."""
    buffer = memoryview(bytearray(min(CHUNK, size)))
    end = offset + size
    while offset < end:
        try:
            count = os.preadv(file.fileno(), [buffer[: min(CHUNK, end - offset)]], offset)
        except OSError as error:
            raise FileError.of(error, str(file.name), "read") from error
        if not count:
            raise TruncatedError(f"{file.name}: ends at offset 0x{offset:x}, expected 0x{end:x}")
        yield buffer[:count]
        offset += count
