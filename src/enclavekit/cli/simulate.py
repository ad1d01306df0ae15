# SPDX-License-Identifier: Apache-2.0
"""``enclave simulate``: any program against a simulated /dev/nitro_enclaves."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from pathlib import Path

import click

from enclavekit.cli.options import output_options
from enclavekit.cli.output import Output
from enclavekit.cli.runtime import runtime_root
from enclavekit.environment import qemu_environment, search_path
from enclavekit.errors import UsageError
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions, select_carrier
from enclavekit.testing.nitro_driver import Command, Limits, SimulatedDriver
from enclavekit.testing.simulate import Machines, NoMachines, Simulation
from enclavekit.testing.simulate_qemu import QemuMachines

STDERR = 2
SIMULATED, QEMU = "simulated", "qemu"


@click.command
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- PROGRAM...")
@click.option("--strict", is_flag=True, help="Refuse memory without huge pages, as the driver does.")
@click.option(
    "--carrier",
    type=click.Choice([SIMULATED, QEMU]),
    default=SIMULATED,
    show_default=True,
    help="What runs the enclaves: nothing, or QEMU.",
)
@click.option("--end-after", type=click.FloatRange(0), metavar="S", help="With nothing: how long an enclave lasts.")
@click.option("--regions", type=click.IntRange(1), default=1024, show_default=True, help="The device's memory regions.")
@click.option("--slots", type=click.IntRange(1), default=4, show_default=True, help="The device's enclaves.")
@click.option("--cores", type=click.IntRange(0, 512), default=3, show_default=True, help="Of two CPUs, for enclaves.")
@click.option("--fail", "faults", multiple=True, metavar="COMMAND=ERRNO", help="SLOT_ADD_MEM=ENOMEM, for instance.")
@click.option("--silent", is_flag=True, help="The device never answers.")
@click.option("--accel", type=click.Choice(["auto", *(accel.value for accel in Accel)]), default="auto", help="QEMU's.")
@click.option("--qemu", envvar="ENCLAVEKIT_QEMU", metavar="PROGRAM", help="Instead of the runtime's.")
@output_options
def simulate(
    program: tuple[str, ...],
    strict: bool,
    carrier: str,
    end_after: float | None,
    regions: int,
    slots: int,
    cores: int,
    faults: tuple[str, ...],
    silent: bool,
    accel: str,
    qemu: str | None,
    output: Output,
) -> int:
    """Run a PROGRAM that uses /dev/nitro_enclaves, here, unmodified; exit with its status.

    128+n when signal n ended it, 125 for every failure of ours. Its sockets of AF_VSOCK are refused; heartbeats are
    answered by the machine. In debug mode, the enclave's console goes to stderr.
    """
    if carrier == QEMU and end_after is not None:
        raise UsageError("--end-after: with --carrier qemu, enclaves end by themselves")
    with tempfile.TemporaryDirectory(prefix="enclavekit-") as directory:
        machines: Machines = NoMachines(time.monotonic, end_after)
        if carrier == QEMU:
            options = CarrierOptions(
                runtime_root=runtime_root(),
                search_path=search_path(),
                environment=qemu_environment(),
                qemu=qemu,
                accel=None if accel == "auto" else Accel(accel),
            )
            selected = select_carrier(CarrierName.QEMU, options)
            output.detail(selected.reason)
            machines = QemuMachines(selected.carrier, Path(directory), console=_write, warn=output.say)
        threads = {core: (core, core + cores + 1) for core in range(1, cores + 1)}
        limits = Limits(pool=threads, cores=cores + 1, regions=regions, slots=slots)
        driver = SimulatedDriver(limits, boot=machines.boot, halt=machines.halt)
        for fault in faults:
            driver.fail(*parse_fault(fault))
        driver.silent = silent
        return Simulation(driver, machines, strict=strict, warn=output.say).run(program)


def parse_fault(text: str) -> tuple[Command, int]:
    """``COMMAND=ERRNO``, the errno a name or a number."""
    name, _, number = text.partition("=")
    value = getattr(errno, number, None) if number.startswith("E") else int(number) if number.isdecimal() else None
    if name not in Command.__members__ or not value or not 0 < value < 4096:
        commands = ", ".join(Command.__members__)
        raise UsageError(f"--fail {text[:64]!r}: expected COMMAND=ERRNO, as in SLOT_ADD_MEM=ENOMEM", hint=commands)
    return Command[name], value


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(STDERR, view) :]
