# SPDX-License-Identifier: Apache-2.0
"""The ROM's composition: everything where the loader and the kernel look for it."""

from __future__ import annotations

from dataclasses import replace
from struct import unpack_from

import pytest

from enclavekit.eif import Discovery
from enclavekit.errors import LaunchError
from enclavekit.platform.machine import GIB, MAX_CPUS, MIB, BootProtocol, microvm_windows
from enclavekit.platform.rom import BOOT_DESCRIPTION, E820, ROM_SIZE, Boot, compose, loader

CODE = b"\xfa" * 100


def boot(discovery: Discovery = Discovery.CMDLINE, *, memory: int = 256 * MIB, cpus: int = 1) -> Boot:
    return Boot(memory, cpus, 8 * MIB, 0x1234, microvm_windows(2), discovery, ("tsc=reliable",))


def test_boot_description() -> None:
    rom = compose(boot(memory=5 * GIB), CODE)
    magic, version, protocol, base, size, low_end, rsdp, offset, length, *entered, count = BOOT_DESCRIPTION.unpack_from(
        rom
    )
    assert (magic, version, protocol, entered) == (b"EKBD", 2, 0, [0, 0])
    assert (base, size, low_end, rsdp) == (0x800000, 0x1234, 3 * GIB, 0)
    assert rom[offset : offset + length] == (
        b" virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=512@0xfeb00c00:11 tsc=reliable"
    )
    assert [E820.unpack_from(rom, BOOT_DESCRIPTION.size + 20 * i)[2] for i in range(count)] == [1, 2, 1, 1]


def test_reset_vector_jumps_to_the_loader() -> None:
    rom = compose(boot(), CODE)
    assert len(rom) == ROM_SIZE
    opcode, displacement = unpack_from("<Bh", rom, 0xFFF0)
    assert opcode == 0xE9
    assert (0xFFF3 + displacement) & 0xFFFF == 0x8000
    assert rom[0x8000:].startswith(CODE)


def test_a_kernel_with_command_line_devices_gets_an_mp_table_and_no_acpi() -> None:
    rom = compose(boot(Discovery.CMDLINE), CODE)
    assert b"_MP_" in rom
    assert b"RSD PTR " not in rom


def test_a_kernel_with_acpi_gets_acpi_and_no_mp_table() -> None:
    rom = compose(boot(Discovery.ACPI), CODE)
    rsdp = BOOT_DESCRIPTION.unpack_from(rom)[6]
    assert rom[rsdp - 0xF0000 :].startswith(b"RSD PTR ")
    assert b"_MP_" not in rom
    assert boot(Discovery.ACPI).suffix() == b" tsc=reliable"


@pytest.mark.parametrize(
    ("protocol", "number"), [(BootProtocol.LINUX, 1), (BootProtocol.PVH, 2), (BootProtocol.REALMODE, 3)]
)
def test_what_the_host_laid_down_is_in_the_description(protocol: BootProtocol, number: int) -> None:
    rom = compose(replace(boot(), protocol=protocol, entry=0x1000000, argument=0x10000), CODE)
    description = BOOT_DESCRIPTION.unpack_from(rom)
    assert (description[2], description[9:11]) == (number, (0x1000000, 0x10000))


@pytest.mark.parametrize("discovery", list(Discovery))
def test_the_largest_machine_fits(discovery: Discovery) -> None:
    assert len(compose(boot(discovery, cpus=MAX_CPUS), CODE)) == ROM_SIZE


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LaunchError) as caught:
        compose(boot(), bytes(0x2001))
    assert str(caught.value) == "ROM: loader takes 8193 bytes, have room for 8192"


def test_the_built_loader_starts_in_real_mode_and_is_small() -> None:
    code = loader()
    assert code.startswith(b"\xfa\xfc")  # cli, cld
    assert 0 < len(code) <= 0x2000
