# SPDX-License-Identifier: Apache-2.0
"""Measurements: PCR0, PCR1 and PCR2 as the hypervisor computes them, and the file's CRC.

Source: aws-nitro-enclaves-image-format README, AWS Nitro Enclaves user guide "Where to get an enclave's measurements".

    PCR0 = extend(kernel ‖ cmdline ‖ every ramdisk)         extend(data) = SHA-384(48 zero bytes ‖ SHA-384(data))
    PCR1 = extend(kernel ‖ cmdline ‖ first ramdisk)
    PCR2 = extend(every other ramdisk)

Only the sections' data count, in file order. PCR1's hash is where PCR0's stands after the first ramdisk, so one hash,
the *chain*, makes both; nothing can make it faster, for SHA-384 is serial. PCR2 and the CRC run beside it in threads
(hashlib and zlib let go of the interpreter's lock).
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from enclavekit.eif.content import CHUNK_SIZE
from enclavekit.eif.crc import combine
from enclavekit.eif.layout import CRC_OFFSET, HEADER_SIZE, SectionType
from enclavekit.eif.reader import Image
from enclavekit.errors import FileError, TruncatedError

if TYPE_CHECKING:
    from hashlib import _Hash

DIGEST_SIZE = 48
PLATFORM = (SectionType.KERNEL, SectionType.CMDLINE)
"""Measured in PCR0 and PCR1, with the first ramdisk."""

_QUEUED_CHUNKS = 16


@dataclass(frozen=True, slots=True)
class Measurements:
    """The values that an attestation document of an enclave in production mode will have, 48 bytes each."""

    pcr0: bytes
    pcr1: bytes
    pcr2: bytes


@dataclass(frozen=True, slots=True)
class Measured:
    """All that reading the whole file tells.

    ``crc`` covers all of the file but the header's last four bytes, as the hypervisor's does; ``sections_crc`` leaves
    out gaps and what is behind the last section, as QEMU's does. ``crcs`` are those of each section's data alone, and
    ``section_digests`` their SHA-384, when asked for.
    """

    measurements: Measurements
    crc: int
    sections_crc: int
    crcs: tuple[int, ...]
    section_digests: tuple[bytes, ...] | None = None


def extend(digest: bytes) -> bytes:
    """A PCR that was all zeros and is extended once, by the SHA-384 digest of some content."""
    return hashlib.sha384(bytes(DIGEST_SIZE) + digest).digest()


def measure(file: BinaryIO, image: Image, *, name: str, section_digests: bool = False) -> Measured:
    """Read the whole file (twice, side by side) in buffers of 256 KiB. ``name`` is the file's, for messages.

    The digests of all sections cost nothing but time on the second CPU; it is noticeable with a large first ramdisk.
    """
    stop = Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        beside = pool.submit(_measure_beside, file.fileno(), image, name, section_digests, stop)
        try:
            pcr0, pcr1 = _measure_chain(file.fileno(), image, name)
        except BaseException:
            stop.set()
            raise
        made = beside.result()
    return Measured(
        Measurements(pcr0, pcr1, extend(made.application)),
        combine(made.parts),
        combine(made.section_parts),
        tuple(made.crcs),
        tuple(made.digests) if section_digests else None,
    )


def digest(data: bytes) -> bytes:
    """SHA-384."""
    return hashlib.sha384(data).digest()


def digest_file(file: BinaryIO, name: str) -> bytes:
    """SHA-384 of a whole file."""
    hasher = hashlib.sha384()
    for chunk in _chunks(file.fileno(), 0, os.fstat(file.fileno()).st_size, name):
        hasher.update(chunk)
    return hasher.digest()


def _measure_chain(descriptor: int, image: Image, name: str) -> tuple[bytes, bytes]:
    measured = [one for one in image.sections if one.type in (*PLATFORM, SectionType.RAMDISK)]
    first = [one for one in measured if one.type in PLATFORM or one is image.ramdisks[0]]
    chain = hashlib.sha384()
    pcr1 = b"" if first else chain.digest()
    for index, section in enumerate(measured, 1):
        for chunk in _chunks(descriptor, section.offset, section.size, name):
            chain.update(chunk)
        if measured[:index] == first:
            pcr1 = chain.digest()
    if not pcr1:  # a command line that stands behind the second ramdisk: legal, and never seen
        prefix = hashlib.sha384()
        for section in first:
            for chunk in _chunks(descriptor, section.offset, section.size, name):
                prefix.update(chunk)
        pcr1 = prefix.digest()
    return extend(chain.digest()), extend(pcr1)


@dataclass(slots=True)
class _Beside:
    """What is found beside the chain. Parts of the file, in order, are CRC and size."""

    application: bytes = b""
    parts: list[tuple[int, int]] = field(default_factory=list)
    section_parts: list[tuple[int, int]] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


def _measure_beside(descriptor: int, image: Image, name: str, section_digests: bool, stop: Event) -> _Beside:
    application = hashlib.sha384()
    made = _Beside()

    def part(offset: int, end: int, hashers: Sequence[_Hash] = (), *, between: bool = False) -> int:
        crc = 0
        for chunk in _chunks(descriptor, offset, end - offset, name):
            if stop.is_set():
                break
            crc = zlib.crc32(chunk, crc)
            for hasher in hashers:
                hasher.update(chunk)
        made.parts.append((crc, end - offset))
        if not between:
            made.section_parts.append((crc, end - offset))
        return crc

    part(0, CRC_OFFSET)
    end = HEADER_SIZE
    for section in image.sections:
        part(end, section.header_offset, between=True)
        part(section.header_offset, section.offset)
        # The digest of the second ramdisk is what PCR2 is made of, so it is not computed twice.
        hashers = [application] if section in image.ramdisks[1:] else []
        own = hashlib.sha384() if section_digests and section not in image.ramdisks[1:2] else None
        made.crcs.append(part(section.offset, section.end, [*hashers, own] if own else hashers))
        if section_digests:
            made.digests.append((own or application).digest())
        end = section.end
    part(end, image.size, between=True)
    made.application = application.digest()
    return made


def _chunks(descriptor: int, offset: int, size: int, name: str) -> Iterator[memoryview]:
    """A range of the file in pieces, each valid until the next one.

    Read, not mapped: a mapped file that someone shortens kills its reader.
    """
    buffer = memoryview(bytearray(min(CHUNK_SIZE, size)))
    end = offset + size
    while offset < end:
        try:
            have = os.preadv(descriptor, [buffer[: end - offset]], offset)
        except OSError as error:
            raise FileError.of(error, name, "read") from error
        if not have:
            raise TruncatedError(f"{name}: ends at offset 0x{offset:x}, expected 0x{end:x}")
        yield buffer[:have]
        offset += have


class Measurer:
    """Measures sections as they are written, once: the chain and PCR2 in threads of their own, the CRC in the caller's.

    A context manager. At most 4 MiB of data wait for a thread. ``crc`` is that of all that was given so far.
    """

    def __init__(self, sections: Sequence[SectionType]) -> None:
        platform = [index for index, kind in enumerate(sections) if kind in PLATFORM]
        ramdisks = [index for index, kind in enumerate(sections) if kind is SectionType.RAMDISK]
        if max(platform) > ramdisks[0]:
            raise ValueError("the kernel and the command line must stand before the ramdisks")
        self._chained = {*platform, *ramdisks}
        self._application = set(ramdisks[1:])
        self._first_ramdisk = ramdisks[0]
        self._pcr1 = b""
        self._chain = _HashThread()
        self._pcr2 = _HashThread()
        self.crc = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._chain.finish()
        self._pcr2.finish()

    def header(self, data: bytes) -> None:
        """A section header: only the CRC covers it."""
        self.crc = zlib.crc32(data, self.crc)

    def data(self, index: int, chunk: bytes) -> None:
        """Some data of the section of that index."""
        if index in self._chained:
            self._chain.update(chunk)
        if index in self._application:
            self._pcr2.update(chunk)
        self.crc = zlib.crc32(chunk, self.crc)

    def end(self, index: int) -> None:
        """The section of that index is complete."""
        if index == self._first_ramdisk:
            self._pcr1 = self._chain.digest()

    def measurements(self) -> Measurements:
        """Once all sections are complete."""
        return Measurements(extend(self._chain.digest()), extend(self._pcr1), extend(self._pcr2.digest()))


class _HashThread:
    """A SHA-384 that runs behind its caller, by no more than a few chunks."""

    def __init__(self) -> None:
        self._hasher: _Hash = hashlib.sha384()
        self._queue: SimpleQueue[bytes | Event | None] = SimpleQueue()
        self._room = Semaphore(_QUEUED_CHUNKS)
        self._thread = Thread(target=self._run, name="sha384", daemon=True)
        self._thread.start()

    def update(self, chunk: bytes) -> None:
        self._room.acquire()
        self._queue.put(chunk)

    def digest(self) -> bytes:
        """Of all that was given so far."""
        reached = Event()
        self._queue.put(reached)
        reached.wait()
        return self._hasher.digest()

    def finish(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Event):
                item.set()
            else:
                self._hasher.update(item)
                self._room.release()
