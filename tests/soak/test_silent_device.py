# SPDX-License-Identifier: Apache-2.0
"""The kernel's driver and a device that is silent: it waits 120 s, which nothing shortens."""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path

import pytest

VM = Path(__file__).parents[1] / "vm"
sys.path.insert(0, str(VM))

from ne_machine import NeMachine, compiled
from ne_rows import MIB

from enclavekit.lab.ne_device import Fault
from enclavekit.lab.ne_registers import Command

pytestmark = pytest.mark.soak
PATIENCE_S = 120
READY = (f"mem=0:{64 * MIB}", "cpu=2", "cpu=3")


def test_a_device_that_is_silent(tmp_path: Path) -> None:
    machine = NeMachine(tmp_path, compiled(VM / "host/ne_steps.c", tmp_path))
    try:
        # START is lost: nothing has started, and only the slot is given back.
        machine.device.faults.append((Command.ENCLAVE_START, Fault(lost=True)))
        began = time.monotonic()
        machine.ask(*READY, "start=0:0", "poll=0", "cpu=4")
        found = machine.answers(2 * PATIENCE_S)
        assert time.monotonic() - began >= PATIENCE_S
        assert found == [0, 0, 0, 0, errno.ETIMEDOUT, 0, 0]
        assert machine.hypervisor.said == ["free"]
        # Afterwards it is as before.
        machine.reset()
        assert machine.steps(*READY, "start=0:0") == [0] * 5
        # START comes late: for the driver the enclave never ran, so it is not stopped, only freed.
        machine.reset()
        machine.device.faults.append((Command.ENCLAVE_START, Fault(delay_s=PATIENCE_S + 10)))
        machine.ask(*READY, "start=0:0", "poll=15000")
        assert machine.answers(2 * PATIENCE_S) == [0, 0, 0, 0, errno.ETIMEDOUT, 0]
        assert machine.hypervisor.said == ["start", "free"]
        # The device is gone for good.
        machine.server.close()
        machine.ask()
        assert machine.answers(2 * PATIENCE_S) == [errno.ETIMEDOUT]
    finally:
        machine.close()
