# SPDX-License-Identifier: Apache-2.0
"""How a vCPU is set up before it runs: what CPUID says of it, a few registers that firmware would set.

Sources: Intel SDM vol. 2 (CPUID), AMD APM vol. 3 appendix E; linux: Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from enclavekit.linux import kvm_abi as abi
from enclavekit.linux.kvm import Vcpu

TSS_ADDRESS = 0xFFFB_D000
"""Three pages below the ROM, and one below them, that Intel processors need."""

MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK = 0x2FF, 0x806
MISC_ENABLE, FAST_STRINGS = 0x1A0, 1
LINT0, LINT1 = 0x350, 0x360
"""Offsets of the local APIC's pins."""
DELIVER_NMI, DELIVER_EXTINT = 0x400, 0x700
DELIVERY_MODE = 0x700

AMD_TOPOLOGY = 0x8000_001E
HYPERVISOR, TSC_DEADLINE = 1 << 31, 1 << 24
HYPER_THREADING = 1 << 28


def set_up(vcpu: Vcpu, number: int, count: int, supported: abi.kvm_cpuid2, *, tsc_deadline: bool) -> None:
    """CPU ``number`` of ``count``; registers stay as after a reset. Raises ``OSError``."""
    vcpu.set_cpuid(cpuid(number, count, supported, tsc_deadline=tsc_deadline))
    # Without a firmware that turns the range registers on, kernels take all memory to be uncached.
    vcpu.set_msr(MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)
    vcpu.set_msr(MISC_ENABLE, FAST_STRINGS)
    lapic = vcpu.lapic()
    for offset, mode in ((LINT0, DELIVER_EXTINT), (LINT1, DELIVER_NMI)):
        value = int.from_bytes(bytes(lapic.regs[offset : offset + 4]), "little") & ~DELIVERY_MODE | mode
        lapic.regs[offset : offset + 4] = list(value.to_bytes(4, "little"))
    vcpu.set_lapic(lapic)


def cpuid(number: int, count: int, supported: abi.kvm_cpuid2, *, tsc_deadline: bool) -> abi.kvm_cpuid2:
    """What KVM supports, as of the CPU with APIC id ``number``: ``count`` cores of one package, a thread each."""
    table = _with_levels(supported)
    bits = (count - 1).bit_length()
    is_amd = any(entry.function == AMD_TOPOLOGY for entry in table.entries[: table.nent])
    for entry in table.entries[: table.nent]:
        match entry.function:
            case 1:
                entry.ebx = entry.ebx & 0xFFFF | count << 16 | number << 24
                entry.ecx |= HYPERVISOR | (TSC_DEADLINE if tsc_deadline else 0)
                entry.edx = entry.edx & ~HYPER_THREADING | (HYPER_THREADING if count > 1 else 0)
            case 4:
                entry.eax = entry.eax & 0x03FF_FFFF & ~(0xFFF << 14) | (count - 1) << 26
            case 0xB | 0x1F:
                # Level 0: one thread a core; level 1: all cores; then the end.
                shift, processors, kind = {0: (0, 1, 1), 1: (bits, count, 2)}.get(entry.index, (0, 0, 0))
                entry.eax, entry.ebx = shift, processors
                entry.ecx, entry.edx = kind << 8 | entry.index, number
            case 0x8000_0008 if is_amd:
                entry.ecx = entry.ecx & ~0xF0FF | (count - 1) | bits << 12
            case 0x8000_001E:  # AMD_TOPOLOGY
                entry.eax, entry.ebx, entry.ecx = number, number, 0
    return table


def _with_levels(supported: abi.kvm_cpuid2) -> abi.kvm_cpuid2:
    """A copy in which leaf 0xb, if it is there, has its second level too: hosts of one CPU leave it out."""
    table = abi.kvm_cpuid2.from_buffer_copy(supported)
    levels = {entry.index for entry in table.entries[: table.nent] if entry.function == 0xB}
    if 0 in levels and 1 not in levels and table.nent < abi.MAX_CPUID_ENTRIES:
        table.entries[table.nent] = abi.kvm_cpuid_entry2(0xB, 1, abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
        table.nent += 1
    return table
