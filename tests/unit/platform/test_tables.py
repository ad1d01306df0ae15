# SPDX-License-Identifier: Apache-2.0
"""MP and ACPI tables: checksums, cross references, and ACPI's own decoder where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from struct import unpack_from

import pytest

from enclavekit.platform import acpi, mptable, smbios
from enclavekit.platform.machine import Ioapic, microvm_windows

BASE = 0xF3000


def read_tables(data: bytes) -> dict[bytes, bytes]:
    """Follow RSDP → XSDT → tables, as a kernel does."""
    xsdt_address = unpack_from("<Q", data, 24)[0]

    def at(address: int) -> bytes:
        offset = address - BASE
        return data[offset : offset + unpack_from("<I", data, offset + 4)[0]]

    xsdt = at(xsdt_address)
    found = {b"XSDT": xsdt}
    for (address,) in (unpack_from("<Q", xsdt, offset) for offset in range(36, len(xsdt), 8)):
        table = at(address)
        found[table[:4]] = table
    found[b"DSDT"] = at(unpack_from("<Q", found[b"FACP"], acpi.FADT_X_DSDT)[0])
    return found


@pytest.fixture
def tables() -> dict[bytes, bytes]:
    return read_tables(acpi.tables(BASE, 2, Ioapic(0), microvm_windows(2)))


def test_rsdp_checksums() -> None:
    raw = acpi.rsdp(0x1234)
    assert len(raw) == 36
    assert raw.startswith(b"RSD PTR ")
    assert sum(raw[:20]) & 0xFF == 0
    assert sum(raw) & 0xFF == 0


def test_every_table_adds_up_to_zero(tables: dict[bytes, bytes]) -> None:
    assert set(tables) == {b"XSDT", b"FACP", b"APIC", b"DSDT"}
    assert all(sum(table) & 0xFF == 0 for table in tables.values())


def test_fadt_is_hardware_reduced_and_276_bytes(tables: dict[bytes, bytes]) -> None:
    fadt = tables[b"FACP"]
    assert len(fadt) == 276
    assert unpack_from("<I", fadt, 112)[0] & 1 << 20


def test_dsdt_names_com1_and_each_window(tables: dict[bytes, bytes]) -> None:
    dsdt = tables[b"DSDT"]
    assert dsdt.count(b"LNRO0005") == 2
    assert bytes.fromhex("0c41d00501") in dsdt  # EISA id PNP0501
    for window in microvm_windows(2):
        assert window.address.to_bytes(4, "little") + window.size.to_bytes(4, "little") in dsdt


def test_more_devices_take_a_longer_package_length() -> None:
    one, eight = (acpi.dsdt(microvm_windows(count)) for count in (1, 8))
    assert len(eight) - len(one) == 7 * 68


def test_madt_lists_each_cpu() -> None:
    madt = acpi.madt(4, Ioapic(0))
    assert [unpack_from("<BBBB", madt, 44 + 8 * cpu) for cpu in range(4)] == [(0, 8, cpu, cpu) for cpu in range(4)]


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is not installed")
def test_iasl_understands_the_dsdt(tables: dict[bytes, bytes], tmp_path: Path) -> None:
    (tmp_path / "dsdt.aml").write_bytes(tables[b"DSDT"])
    subprocess.run(["iasl", "-d", "dsdt.aml"], cwd=tmp_path, check=True, capture_output=True)
    source = (tmp_path / "dsdt.dsl").read_text()
    assert 'Name (_HID, "LNRO0005")' in source
    assert "0xFEB00E00,         // Address Base" in source


def test_mp_floating_pointer() -> None:
    raw = mptable.floating_pointer(0xF2010)
    assert len(raw) == 16
    assert sum(raw) & 0xFF == 0
    assert unpack_from("<4sIBB", raw) == (b"_MP_", 0xF2010, 1, 4)


def test_mp_table_counts_its_entries_and_bytes() -> None:
    table = mptable.configuration_table(3, Ioapic(0))
    assert sum(table) & 0xFF == 0
    assert unpack_from("<H", table, 4)[0] == len(table)
    count, offset = unpack_from("<H", table, 0x22)[0], 44
    kinds = []
    while offset < len(table):
        kinds.append(table[offset])
        offset += 20 if table[offset] == 0 else 8
    assert len(kinds) == count
    assert kinds.count(0) == 3
    assert kinds.count(3) == 23


def test_only_the_first_cpu_boots() -> None:
    table = mptable.configuration_table(2, Ioapic(0))
    assert [table[44 + 20 * cpu + 3] for cpu in range(2)] == [3, 1]


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is not installed")
def test_iasl_understands_power_off_and_reset(tables: dict[bytes, bytes], tmp_path: Path) -> None:
    for name, signature in (("dsdt", b"DSDT"), ("facp", b"FACP")):
        (tmp_path / f"{name}.aml").write_bytes(tables[signature])
        subprocess.run(["iasl", "-d", f"{name}.aml"], cwd=tmp_path, check=True, capture_output=True)
    dsdt, facp = ((tmp_path / f"{name}.dsl").read_text() for name in ("dsdt", "facp"))
    assert "Name (_S5, Package (0x01)" in dsdt
    assert "Method (_PTS, 1, NotSerialized)" in dsdt
    assert "CMD = 0xFE" in dsdt
    assert "Reset Register Supported (V2) : 1" in facp
    assert "Value to cause reset : FE" in facp


def test_smbios_entry_point() -> None:
    raw = smbios.entry_point(0xF7020, 300)
    assert len(raw) == 24
    assert sum(raw) & 0xFF == 0
    assert unpack_from("<IQ", raw, 12) == (300, 0xF7020)


@pytest.mark.skipif(shutil.which("dmidecode") is None, reason="dmidecode is not installed")
def test_dmidecode_reads_the_enclaves_id(tmp_path: Path) -> None:
    made = smbios.structures("0123abcd")
    # As dmidecode --dump-bin writes it: the structures at 32.
    (tmp_path / "dump").write_bytes(smbios.entry_point(32, len(made)).ljust(32, b"\0") + made)

    def said(*words: str) -> str:
        command = ["dmidecode", "--from-dump", str(tmp_path / "dump"), *words]
        done = subprocess.run(command, check=True, capture_output=True)
        assert done.stderr == b""
        return done.stdout.decode().strip()

    assert said("-s", "baseboard-asset-tag") == "enclave-0123abcd"
    assert said("-s", "system-serial-number") == "enclave-0123abcd"
    assert said("-s", "system-product-name") == "Enclave"
    whole = said()
    assert "System is a virtual machine" in whole
    assert not any(word in whole for word in ("OUT OF SPEC", "TRUNCATED", "BAD INDEX", "Invalid"))
