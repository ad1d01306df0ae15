# SPDX-License-Identifier: Apache-2.0
"""Enclave memory: sealed, new, or what the caller has filled already."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from enclavekit.eif import Discovery
from enclavekit.hypervisor.contract import LaunchSpec
from enclavekit.hypervisor.memory import enclave_memory, new_memory

SIZE = 2 << 20
SPEC = LaunchSpec("1", SIZE, 1, 0, Discovery.ACPI, Path())


def test_new_memory_is_empty_and_keeps_its_size() -> None:
    fd = enclave_memory(SPEC, SIZE)
    assert os.fstat(fd).st_size == SIZE
    assert os.fstat(fd).st_blocks == 0
    for size in (0, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_memory_that_is_there_already_stays_the_callers() -> None:
    ours = new_memory(SIZE)
    os.pwrite(ours, b"image", 100)
    theirs = enclave_memory(replace(SPEC, memory_fd=ours), SIZE)
    os.close(ours)
    assert os.pread(theirs, 5, 100) == b"image"
    os.close(theirs)


def test_memory_of_another_size_is_a_mistake() -> None:
    ours = new_memory(SIZE)
    with pytest.raises(ValueError, match=r"not of 4194304 bytes"):
        enclave_memory(replace(SPEC, memory_fd=ours), 2 * SIZE)
    os.close(ours)
