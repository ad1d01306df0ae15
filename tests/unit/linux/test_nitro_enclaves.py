# SPDX-License-Identifier: Apache-2.0
"""The driver's ABI: numbers computed from structures, and an exception for each of its errors."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path

import pytest

from enclavekit.errors import DriverError, FullCoresNotUsedError, MissingError
from enclavekit.linux import nitro_enclaves as ne


def test_numbers_are_those_of_the_header() -> None:
    assert ne.NE_CREATE_VM == 0x8008AE20
    assert ne.NE_ADD_VCPU == 0xC004AE21
    assert ne.NE_GET_IMAGE_LOAD_INFO == 0xC010AE22
    assert ne.NE_SET_USER_MEMORY_REGION == 0x4018AE23
    assert ne.NE_START_ENCLAVE == 0xC010AE24


@pytest.mark.parametrize(
    ("structure", "size"),
    [(ne.ne_image_load_info, 16), (ne.ne_user_memory_region, 24), (ne.ne_enclave_start_info, 16)],
)
def test_structures_have_no_padding(structure: type[ctypes.Structure], size: int) -> None:
    assert ctypes.sizeof(structure) == size


def test_every_number_has_its_exception() -> None:
    assert sorted(ne.NE_ERRORS) == list(range(256, 276))
    assert len({kind.name for kind in ne.NE_ERRORS.values()}) == 20
    assert all(kind.name.startswith("NE_ERR_") for kind in ne.NE_ERRORS.values())


def test_an_error_of_the_drivers_own() -> None:
    error = ne.driver_error(OSError(269, "Unknown error 269"), "NE_START_ENCLAVE")
    assert isinstance(error, FullCoresNotUsedError)
    assert str(error) == (
        "NE_START_ENCLAVE: NE_ERR_FULL_CORES_NOT_USED (269): the enclave has only some of the threads of a core"
    )
    assert error.hint == "give it whole cores: an even number of CPUs where cores have two threads"
    assert (error.code, error.number) == ("ne-full-cores-not-used", 269)


def test_an_errno() -> None:
    error = ne.driver_error(OSError(errno.ETIMEDOUT, "Connection timed out"), "NE_CREATE_VM")
    assert type(error) is DriverError
    assert str(error) == "NE_CREATE_VM: connection timed out (errno 110)"
    assert error.number == errno.ETIMEDOUT


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        ne.create_vm(ne.KernelDevice(tmp_path / "nitro_enclaves"))
    assert str(caught.value) == "cannot open /dev/nitro_enclaves: no such file or directory"


def test_a_device_that_is_none(tmp_path: Path) -> None:
    """Any file can be opened; only the driver knows the ioctl."""
    path = tmp_path / "nitro_enclaves"
    path.touch()
    with pytest.raises(DriverError) as caught:
        ne.create_vm(ne.KernelDevice(path))
    assert caught.value.number == errno.ENOTTY
