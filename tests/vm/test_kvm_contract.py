# SPDX-License-Identifier: Apache-2.0
"""The contract of all carriers (tests/unit/hypervisor/carrier_contract.py) over ``kvm``: guest/kvm.c is the kernel."""

from __future__ import annotations

import io
import os
from pathlib import Path
from struct import pack, pack_into

import pytest
from carrier_contract import CarrierContract, Subject
from test_kvm_machine import GUEST_ADDRESS, MIB, MODE_ADDRESS, TIMEOUT_S, guest
from test_loader import image as loader_image

from enclavekit.eif import BytesContent, Discovery
from enclavekit.hypervisor.contract import Enclave, LaunchSpec
from enclavekit.hypervisor.kvm import KvmCarrier
from enclavekit.hypervisor.parts import Parts

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm for this user")

__all__ = ["guest"]  # the fixture

KERNEL_START, SETUP_SIZE = 548 + 12, 0x400
ENTRY_32 = GUEST_ADDRESS + 0x40
ECHO_PORT = 9


def kernel(program: bytes) -> bytes:
    """A bzImage whose 32-bit entry moves ``program`` to its place."""
    setup = bytearray(loader_image()[KERNEL_START : KERNEL_START + SETUP_SIZE])
    pack_into("<I", setup, 0x260, 0x10000)
    # call 1f; 1: pop esi; add esi, 30; mov edi, …; mov ecx, …; rep movsb; mov byte [mode], 'h'; mov eax, entry; jmp eax
    code = b"\xe8" + bytes(4) + b"\x5e\x83\xc6\x1e\xbf" + pack("<I", GUEST_ADDRESS)
    code += b"\xb9" + pack("<I", len(program)) + b"\xf3\xa4\xc6\x05" + pack("<I", MODE_ADDRESS) + b"h"
    code += b"\xb8" + pack("<I", ENTRY_32) + b"\xff\xe0"
    assert len(code) == 5 + 0x1E
    return bytes(setup) + code + program


class Carrier:
    """``kvm``, and the last enclave that it made."""

    def __init__(self) -> None:
        self.last: Enclave | None = None

    def create(self, spec: LaunchSpec) -> Enclave:
        self.last = KvmCarrier().create(spec)
        return self.last

    def end(self) -> None:
        assert self.last is not None
        with self.last.connect(ECHO_PORT, TIMEOUT_S) as connection:
            connection.sendall(b"q")


class TestKvm(CarrierContract):
    @pytest.fixture
    def subject(self, guest: bytes, tmp_path: Path) -> Subject:
        parts = Parts(BytesContent(kernel(guest)), b"console=ttyS0", [BytesContent(b"r" * 100)])
        made = io.BytesIO()
        parts.write(made)
        spec = LaunchSpec("00000001", 64 * MIB, 2, parts.size, Discovery.CMDLINE, tmp_path)
        carrier = Carrier()
        return Subject(carrier, spec, made, parts, beat=lambda: None, end=carrier.end)
