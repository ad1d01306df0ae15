# SPDX-License-Identifier: Apache-2.0
"""The simulated driver behind file descriptors: what ``open`` and ``ioctl`` of /dev/nitro_enclaves do.

An enclave's descriptor is the read end of a pipe, which polls POLLHUP, and nothing else, once its write end is closed.
Who holds it, and how often it was duplicated, does not matter: the write end tells when the last of them is closed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
from dataclasses import dataclass

from enclavekit.linux.ioctl import Argument
from enclavekit.linux.nitro_enclaves import (
    NE_ADD_VCPU,
    NE_CREATE_VM,
    NE_GET_IMAGE_LOAD_INFO,
    NE_SET_USER_MEMORY_REGION,
    NE_START_ENCLAVE,
    ne_enclave_start_info,
    ne_image_load_info,
    ne_user_memory_region,
)
from enclavekit.testing.nitro_driver import SimulatedDriver, Slot
from enclavekit.testing.user_memory import ProcessMemory, UserMemory

FileId = tuple[int, int]
"""Device and inode: the same for every duplicate of a descriptor."""

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def file_id(fd: int) -> FileId:
    """Of an open file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


@dataclass(slots=True)
class _Handle:
    """``write_end`` until the enclave ends; ``path`` is an O_PATH descriptor of the pipe."""

    slot: Slot
    write_end: int | None
    path: int


class SimulatedDevice:
    """A ``linux.nitro_enclaves.Device``: for programs of this process, and by ``ioctl_of`` for any other's.

    ``memory`` is this process's, as the driver is to see it.
    """

    def __init__(self, driver: SimulatedDriver, memory: UserMemory | None = None) -> None:
        self.driver = driver
        self._memory = memory
        self._handles: dict[FileId, _Handle] = {}
        self._node = os.memfd_create("nitro_enclaves", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(self._node, fcntl.F_ADD_SEALS, _SEALS)
        self._node_id = file_id(self._node)

    def open(self) -> int:
        """A descriptor of the node."""
        return fcntl.fcntl(self._node, fcntl.F_DUPFD_CLOEXEC, 0)

    def ioctl(self, fd: int, request: int, argument: Argument) -> int:
        """Of this process."""
        memory = self._memory or ProcessMemory(os.getpid(), ordinary=True, node=self.driver.limits.node)
        return self.ioctl_of(file_id(fd), request, ctypes.addressof(argument), memory)

    def knows(self, file: FileId) -> bool:
        """Whether it is the node, or an enclave's."""
        return file == self._node_id or file in self._handles

    def ioctl_of(self, file: FileId, request: int, address: int, memory: UserMemory) -> int:
        """What the ioctl returns. Of NE_CREATE_VM that is a descriptor of this process. Raises ``OSError``."""
        self.reap()
        if file == self._node_id:
            if request != NE_CREATE_VM:
                raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
            return self._create_vm(address, memory)
        slot = self._handles[file].slot
        match request:
            case _ if request == NE_ADD_VCPU:
                cpu = int.from_bytes(memory.read(address, 4), "little")
                memory.write(address, slot.add_vcpu(memory, cpu).to_bytes(4, "little"))
            case _ if request == NE_GET_IMAGE_LOAD_INFO:
                load = ne_image_load_info.from_buffer_copy(memory.read(address, 16))
                load.memory_offset = slot.image_load_offset(load.flags)
                memory.write(address, bytes(load))
            case _ if request == NE_SET_USER_MEMORY_REGION:
                region = ne_user_memory_region.from_buffer_copy(memory.read(address, 24))
                slot.set_user_memory_region(memory, region.flags, region.memory_size, region.userspace_addr)
            case _ if request == NE_START_ENCLAVE:
                start = ne_enclave_start_info.from_buffer_copy(memory.read(address, 16))
                start.enclave_cid = slot.start(start.flags, start.enclave_cid)
                memory.write(address, bytes(start))
            case _:
                raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return 0

    def _create_vm(self, address: int, memory: UserMemory) -> int:
        slot = self.driver.create_vm(memory.mm)
        try:
            memory.write(address, slot.uid.to_bytes(8, "little"))
        except OSError:
            slot.close()
            raise
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        path = os.open(f"/proc/self/fd/{read_end}", os.O_PATH | os.O_CLOEXEC)
        handle = _Handle(slot, write_end, path)
        self._handles[file_id(read_end)] = handle
        slot.on_end = lambda: self._hang_up(handle)
        return read_end

    @staticmethod
    def _hang_up(handle: _Handle) -> None:
        if handle.write_end is not None:
            os.close(handle.write_end)
            handle.write_end = None

    def write_ends(self) -> list[int]:
        """Each polls POLLERR once nobody has that enclave's descriptor any more."""
        return [handle.write_end for handle in self._handles.values() if handle.write_end is not None]

    def reap(self) -> None:
        """Release the enclaves whose descriptors are all closed."""
        for file, handle in list(self._handles.items()):
            if self._is_released(handle):
                del self._handles[file]
                self._hang_up(handle)
                os.close(handle.path)
                try:
                    handle.slot.close()
                except OSError:  # the driver, too, can only write this into its log
                    continue

    @staticmethod
    def _is_released(handle: _Handle) -> bool:
        if handle.write_end is not None:
            return _has_no_reader(handle.write_end)
        # It has ended, and the write end is closed: open it for a moment to ask whether somebody still reads.
        again = os.open(f"/proc/self/fd/{handle.path}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _has_no_reader(again)
        finally:
            os.close(again)

    def close(self) -> None:
        """Forget everything: what is still open polls POLLHUP."""
        self.reap()
        for handle in self._handles.values():
            self._hang_up(handle)
            os.close(handle.path)
        self._handles.clear()
        if self._node >= 0:
            os.close(self._node)
            self._node = -1


def _has_no_reader(write_end: int) -> bool:
    poller = select.poll()
    poller.register(write_end, 0)
    return bool(poller.poll(0))
