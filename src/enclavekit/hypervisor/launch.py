# SPDX-License-Identifier: Apache-2.0
"""The basic flow, once for every carrier: the thing that the driver's reviewers asked to see."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import BinaryIO

from enclavekit import eif
from enclavekit.codec.bzimage import READ_SIZE, BzImage
from enclavekit.errors import EifError, LaunchError
from enclavekit.hypervisor.contract import Enclave, ImageKind, LaunchSpec, MemoryRegion, Mode, RomEnclave
from enclavekit.hypervisor.host_laid import lay_image
from enclavekit.hypervisor.parts import Parts, assemble
from enclavekit.platform.guest_memory import GuestMemory
from enclavekit.platform.machine import BootProtocol, low_memory_end

EIF_CRC_OFFSET = 544
EIF_CRC_END = 548
COPY_SIZE = 1 << 20


def launch(
    create: Callable[[LaunchSpec], Enclave],
    spec: LaunchSpec,
    image: BinaryIO | Parts,
    *,
    mode: Mode,
    cid: int | None = None,
) -> Enclave:
    """Start ``image``, an EIF file at its beginning or parts to be assembled, on the carrier behind ``create``.

    Of parts, the size in ``spec`` does not count: they know it. The caller waits for the heartbeat and closes the
    enclave. Errors: ``LaunchError``, ``EifError`` for a wrong checksum or parts that make no image, ``FileError``,
    ``CarrierError``, ``MissingError``; nothing is left behind.
    """
    if isinstance(image, Parts):
        spec = replace(spec, image_size=image.size)
    enclave = create(spec)
    try:
        offset = enclave.image_load_offset(ImageKind.EIF)
        regions = enclave.allocate(spec.memory)
        if spec.boot is BootProtocol.EIF:
            _write(image, spec, regions, offset)
        else:
            _lay_by_host(enclave, spec, image, regions)
        for region in regions:
            enclave.set_user_memory_region(region)
        for _ in range(spec.cpus):
            enclave.add_vcpu()
        enclave.start(mode=mode, cid=cid)
    except BaseException:
        enclave.close()
        raise
    return enclave


def _write(image: BinaryIO | Parts, spec: LaunchSpec, regions: Sequence[MemoryRegion], offset: int) -> None:
    if isinstance(image, Parts):
        assemble(image, regions, offset)
    else:
        write_image(image, spec.image_size, regions, offset)


def _lay_by_host(enclave: Enclave, spec: LaunchSpec, image: BinaryIO | Parts, regions: Sequence[MemoryRegion]) -> None:
    if not isinstance(enclave, RomEnclave):
        raise LaunchError(f"boot protocol {spec.boot}: this carrier boots an EIF by itself", hint="--boot eif")
    if isinstance(image, Parts):
        setup, kernel_size = _head(image.kernel), image.kernel.size
    else:
        kernel = eif.read(image).kernel
        image.seek(kernel.offset)
        setup, kernel_size = image.read(min(READ_SIZE, kernel.size)), kernel.size
        image.seek(0)
    memory = GuestMemory(regions, low_memory_end(spec.memory))
    parsed = BzImage.parse(setup, kernel_size)
    enclave.enter(
        lay_image(enclave.boot(), spec.boot, memory, parsed, lambda address: _write(image, spec, regions, address))
    )


def _head(content: eif.Content) -> bytes:
    """As much of a kernel as its setup may take."""
    head = b""
    for chunk in content.chunks():
        head += chunk
        if len(head) >= READ_SIZE:
            break
    return head[:READ_SIZE]


def write_image(image: BinaryIO, size: int, regions: Sequence[MemoryRegion], offset: int) -> None:
    """Copy ``size`` bytes into the regions from ``offset`` on, across their borders, and check the EIF's CRC.

    A real hypervisor refuses a wrong CRC as well; here it is computed from what was written, so a file that changes
    after it was described cannot be booted.
    """
    crc, stored, position = 0, b"", 0
    for region in regions:
        start = max(offset + position - region.offset, 0)
        while position < size and start < region.size:
            part = region.buffer[start : start + min(COPY_SIZE, region.size - start, size - position)]
            count = image.readinto(part)  # type: ignore[attr-defined]  # every binary file that open() makes has it
            if not count:
                raise EifError(f"image ends at offset 0x{position:x}, expected {size} bytes")
            data = part[:count]
            if position < EIF_CRC_END:
                head = bytes(data[: EIF_CRC_END - position])
                crc = zlib.crc32(head[: max(EIF_CRC_OFFSET - position, 0)], crc)
                stored += head[max(EIF_CRC_OFFSET - position, 0) :]
                data = data[EIF_CRC_END - position :]
            crc = zlib.crc32(data, crc)
            position += count
            start += count
    if position < size:
        raise LaunchError(f"memory: need {offset + size} bytes for the image, have {offset + position}")
    if int.from_bytes(stored, "big") != crc:
        raise EifError(f"image checksum: got 0x{int.from_bytes(stored, 'big'):08x} in the header, expected 0x{crc:08x}")
