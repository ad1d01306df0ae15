# SPDX-License-Identifier: Apache-2.0
"""/dev/nitro_enclaves: its five ioctls, one function each, and what its errors mean.

Source: linux: include/uapi/linux/nitro_enclaves.h, drivers/virt/nitro_enclaves/ne_misc_dev.c. All integers are of the
machine's byte order, structures have no padding. An answer from 256 on is the driver's own (NE_ERR_*); each has an
exception, and so has any errno: ``DriverError``.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from ctypes import c_uint32, c_uint64
from pathlib import Path
from typing import ClassVar, Protocol

from enclavekit.errors import DriverError, MissingError
from enclavekit.linux.ioctl import Argument, ior, iow, iowr

DEVICE = Path("/dev/nitro_enclaves")

NE_MAGIC = 0xAE
NE_EIF_IMAGE = 0x01
NE_DEFAULT_MEMORY_REGION = 0x00
NE_ENCLAVE_PRODUCTION_MODE = 0x00
NE_ENCLAVE_DEBUG_MODE = 0x01
NE_MIN_MEM_REGION_SIZE = 2 << 20
NE_MIN_ENCLAVE_MEM_SIZE = 64 << 20


class ne_image_load_info(ctypes.Structure):  # noqa: N801 - the kernel's name
    """16 bytes: what kind of image, and where it goes."""

    _fields_: ClassVar = [
        ("flags", c_uint64),  # 0x0 in, NE_EIF_IMAGE
        ("memory_offset", c_uint64),  # 0x8 out, bytes
    ]


class ne_user_memory_region(ctypes.Structure):  # noqa: N801
    """24 bytes: memory to be donated."""

    _fields_: ClassVar = [
        ("flags", c_uint64),  # 0x00 in
        ("memory_size", c_uint64),  # 0x08 in, bytes
        ("userspace_addr", c_uint64),  # 0x10 in
    ]


class ne_enclave_start_info(ctypes.Structure):  # noqa: N801
    """16 bytes: how to start."""

    _fields_: ClassVar = [
        ("flags", c_uint64),  # 0x0 in, NE_ENCLAVE_DEBUG_MODE
        ("enclave_cid", c_uint64),  # 0x8 in and out, 0 for any
    ]


NE_CREATE_VM = ior(NE_MAGIC, 0x20, c_uint64)
NE_ADD_VCPU = iowr(NE_MAGIC, 0x21, c_uint32)
NE_GET_IMAGE_LOAD_INFO = iowr(NE_MAGIC, 0x22, ne_image_load_info)
NE_SET_USER_MEMORY_REGION = iow(NE_MAGIC, 0x23, ne_user_memory_region)
NE_START_ENCLAVE = iowr(NE_MAGIC, 0x24, ne_enclave_start_info)

NE_ERRORS: dict[int, type[DriverError]] = {kind.number: kind for kind in DriverError.__subclasses__()}
"""By number, 256 to 275."""


class Device(Protocol):
    """How the driver is reached: the kernel's, or a simulator's. Both methods raise ``OSError``."""

    def open(self) -> int:
        """A descriptor of the device node."""

    def ioctl(self, fd: int, request: int, argument: Argument) -> int:
        """The ioctl's return value; the argument is written to."""


class KernelDevice:
    """The driver of the kernel below us."""

    def __init__(self, path: Path = DEVICE) -> None:
        self._path = path

    def open(self) -> int:
        """Reading is enough for its ioctl."""
        return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, argument: Argument) -> int:
        """Arguments are changed in place, so that the return value, the enclave's descriptor, is not lost."""
        return int(fcntl.ioctl(fd, request, argument, True))


def driver_error(error: OSError, what: str) -> DriverError:
    """The exception for what the driver answered to ``what``, as in ``NE_START_ENCLAVE``."""
    number = error.errno or 0
    kind = NE_ERRORS.get(number, DriverError)
    if kind is DriverError:
        made = DriverError(f"{what}: {os.strerror(number).lower()} (errno {number})")
        made.number = number
        return made
    meaning = (kind.__doc__ or "").rstrip(".")
    return kind(f"{what}: {kind.name} ({number}): {meaning[:1].lower()}{meaning[1:]}", hint=kind.remedy)


def create_vm(device: Device) -> tuple[int, int]:
    """A new enclave: its descriptor, which is closed on exec, and its slot's id.

    Errors: ``MissingError`` where the device cannot be opened; ``DriverError``.
    """
    try:
        fd = device.open()
    except OSError as error:
        raise MissingError(
            f"cannot open {DEVICE}: {(error.strerror or str(error)).lower()}",
            hint="an EC2 instance launched with enclave support has it; its users are in the group ne",
        ) from error
    try:
        slot_uid = c_uint64()
        enclave_fd = _ioctl(device, fd, NE_CREATE_VM, slot_uid, "NE_CREATE_VM")
    finally:
        os.close(fd)
    return enclave_fd, slot_uid.value


def add_vcpu(device: Device, fd: int, cpu: int = 0) -> int:
    """Give it a CPU, or any of the pool (0); its number."""
    vcpu_id = c_uint32(cpu)
    _ioctl(device, fd, NE_ADD_VCPU, vcpu_id, "NE_ADD_VCPU")
    return vcpu_id.value


def image_load_offset(device: Device, fd: int, flags: int = NE_EIF_IMAGE) -> int:
    """Where in enclave memory the image must begin, in bytes."""
    info = ne_image_load_info(flags=flags)
    _ioctl(device, fd, NE_GET_IMAGE_LOAD_INFO, info, "NE_GET_IMAGE_LOAD_INFO")
    return int(info.memory_offset)


def set_user_memory_region(
    device: Device, fd: int, address: int, size: int, flags: int = NE_DEFAULT_MEMORY_REGION
) -> None:
    """Give it memory of ours, which is not to be touched any more until the enclave is closed."""
    region = ne_user_memory_region(flags=flags, memory_size=size, userspace_addr=address)
    _ioctl(device, fd, NE_SET_USER_MEMORY_REGION, region, "NE_SET_USER_MEMORY_REGION")


def start_enclave(device: Device, fd: int, cid: int = 0, flags: int = NE_ENCLAVE_PRODUCTION_MODE) -> int:
    """Boot it; its CID."""
    info = ne_enclave_start_info(flags=flags, enclave_cid=cid)
    _ioctl(device, fd, NE_START_ENCLAVE, info, "NE_START_ENCLAVE")
    return int(info.enclave_cid)


def _ioctl(device: Device, fd: int, request: int, argument: Argument, name: str) -> int:
    try:
        return device.ioctl(fd, request, argument)
    except OSError as error:
        raise driver_error(error, name) from error
