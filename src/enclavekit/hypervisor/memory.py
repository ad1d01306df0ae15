# SPDX-License-Identifier: Apache-2.0
"""Memory of a local enclave: a memfd, sealed, so that whoever maps it too cannot pull it away under our devices."""

from __future__ import annotations

import fcntl
import os

from enclavekit.hypervisor.contract import LaunchSpec

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def new_memory(size: int) -> int:
    """``size`` bytes of zeroes, as a file descriptor of the caller's; pages come as they are touched."""
    fd = os.memfd_create("enclave-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def enclave_memory(spec: LaunchSpec, size: int) -> int:
    """What ``spec`` brings, or new memory, as a descriptor of the caller's."""
    if spec.memory_fd is None:
        return new_memory(size)
    if os.fstat(spec.memory_fd).st_size != size:
        raise ValueError(f"memory that is there already: not of {size} bytes")
    return os.dup(spec.memory_fd)
