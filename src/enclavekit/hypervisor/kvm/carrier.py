# SPDX-License-Identifier: Apache-2.0
"""Carrier ``kvm``: an enclave in threads of this process, on bare /dev/kvm.

The same memfd, ROM and devices as under QEMU, at the addresses that real enclaves have: virtio-mmio windows of 4 KiB
from 0xd0000000 on, IRQs from 5. Interrupt controllers and timer are KVM's; serial port, keyboard controller and clock
are ours. Queue kicks and interrupts are eventfds and do not pass through the vCPUs' threads.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from enclavekit.errors import CarrierError, LaunchError
from enclavekit.hypervisor.contract import ImageKind, LaunchSpec, MemoryRegion, Mode, Statistics
from enclavekit.hypervisor.kvm.console import Console
from enclavekit.hypervisor.kvm.exits import End
from enclavekit.hypervisor.kvm.machine import DeviceBus, Machine, PortRange, Window
from enclavekit.hypervisor.kvm.ports import CMOS, I8042, I8042_COMMAND, I8042_DATA, Cmos
from enclavekit.hypervisor.kvm.serial import COM1, COM1_IRQ, PORTS, Serial
from enclavekit.hypervisor.memory import enclave_memory
from enclavekit.linux.kvm import DEVICE, Vm
from enclavekit.platform import rom
from enclavekit.platform.acpi import SLEEP_CONTROL
from enclavekit.platform.machine import (
    HIGH_MEMORY_START,
    IMAGE_LOAD_OFFSET,
    LOW_MEMORY_LIMIT,
    MAX_CPUS,
    VirtioWindow,
    enclave_windows,
    low_memory_end,
)
from enclavekit.virtio.backend import VsockBackend
from enclavekit.virtio.loop import Loop
from enclavekit.virtio.memory import GuestMemory
from enclavekit.virtio.memory import MemoryRegion as DeviceRegion
from enclavekit.virtio.mmio import MmioTransport, Register
from enclavekit.virtio.nsm import VIRTIO_ID_NSM, NsmDevice
from enclavekit.virtio.nsm_backend import NsmBackend
from enclavekit.virtio.vhost_user import Device
from enclavekit.virtio.vsock_packet import VIRTIO_ID_VSOCK

FIRST_CID = 16
"""An enclave's own CID starts here, as on EC2."""

VSOCK_QUEUES = ("rx", "tx", "event")
"""The last one is for migrations and stays idle."""

SLEEP_ENABLE = 0x20
"""SLP_EN of the sleep control register (ACPI 6.5 §4.8.3.7)."""

BLOCK_SIZE = 512
"""Unit of st_blocks (stat(2))."""

ROM_TOP = 1 << 32
"""The ROM ends here, the reset vector 16 bytes below."""


@dataclass(frozen=True, slots=True)
class KvmCarrier:
    """Makes enclaves on ``device``."""

    device: Path = DEVICE

    def create(self, spec: LaunchSpec) -> KvmEnclave:
        """A new enclave without memory or CPUs. ``LaunchError`` where it is to have a control group."""
        if spec.cgroup is not None:
            raise LaunchError(
                "control group: carrier kvm runs an enclave in threads of its process, which cannot have one",
                hint="--carrier qemu",
            )
        return KvmEnclave(self, spec)


class KvmEnclave:
    """One enclave in one machine of KVM's (see ``contract.Enclave``)."""

    def __init__(self, carrier: KvmCarrier, spec: LaunchSpec) -> None:
        self._carrier = carrier
        self._spec = spec
        self._cleanup = ExitStack()
        self._memory_fd: int | None = None
        self._memory: memoryview | None = None
        self._donated = 0
        self._cpus = 0
        self.cid = 0
        self._machine: Machine | None = None
        self._backend: VsockBackend | None = None
        self._nsm: NsmBackend | None = None
        self._boot: rom.Boot | None = None

    def allocate(self, size: int) -> Sequence[MemoryRegion]:
        """One region: all of the enclave's memory. Pages are given by the kernel as they are touched."""
        self._memory_fd = enclave_memory(self._spec, size)
        self._cleanup.callback(os.close, self._memory_fd)
        self._memory = memoryview(mmap.mmap(self._memory_fd, size))
        return [MemoryRegion(0, self._memory[:])]

    def image_load_offset(self, kind: ImageKind) -> int:
        """8 MiB, as the driver answers for an EIF."""
        del kind  # there is one
        return IMAGE_LOAD_OFFSET

    def set_user_memory_region(self, region: MemoryRegion) -> None:
        """It is the guest's from now on."""
        self._donated += region.size
        region.buffer.release()

    def add_vcpu(self, cpu: int | None = None) -> int:
        """CPUs are threads of ours; they have no number on the host."""
        if self._cpus >= MAX_CPUS:
            raise LaunchError(f"vCPUs: a local enclave can have {MAX_CPUS}")
        self._cpus += 1
        return self._cpus - 1 if cpu is None else cpu

    def boot(self) -> rom.Boot:
        """This machine, or what the host has laid down."""
        return self._boot or rom.Boot(
            memory=self._spec.memory,
            cpus=self._spec.cpus,
            image_base=IMAGE_LOAD_OFFSET,
            image_size=self._spec.image_size,
            windows=enclave_windows(1 if self._spec.nsm is None else 2),
            discovery=self._spec.discovery,
            enclave_id=self._spec.enclave_id,
        )

    def enter(self, boot: rom.Boot) -> None:
        """What the host has laid down."""
        self._boot = boot

    def start(self, *, mode: Mode, cid: int | None = None) -> int:
        """Make the machine, start the devices, then its CPUs."""
        del mode  # the serial line is read in either; who may see it is the supervisor's business
        if self._memory is None or not self._donated or not self._cpus:
            raise LaunchError("start: the enclave has no memory or no CPU")
        self.cid = cid = FIRST_CID if cid is None else cid
        try:
            self._start(cid)
        except OSError as error:
            raise CarrierError(
                f"{self._carrier.device}: {(error.strerror or str(error)).lower()}", hint="--carrier qemu needs no KVM"
            ) from error
        return cid

    def _start(self, cid: int) -> None:
        boot = replace(self.boot(), memory=self._donated, cpus=self._cpus)
        machine = self._machine = Machine(Vm(self._carrier.device))
        self._cleanup.callback(machine.close)
        memory = self._map(machine, boot)
        self._heartbeat = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._cleanup.callback(os.close, self._heartbeat)
        transports: list[MmioTransport] = []

        def registers(
            kind: int, names: Sequence[str], device: Device, loop: Loop, on_end: Callable[[], None]
        ) -> MmioTransport:
            transport = MmioTransport(kind, names, memory, device, loop)
            transports.append(transport)
            self._cleanup.callback(transport.close_fds)
            loop.watch(machine.ended_fd, lambda _: on_end())
            return transport

        backend = self._backend = VsockBackend(
            transport=partial(registers, VIRTIO_ID_VSOCK, VSOCK_QUEUES),
            guest_cid=cid,
            enclave_id=self._spec.enclave_id,
            directory=self._spec.directory,
            parent_directory=self._spec.parent_directory,
            listen=self._spec.listen,
            publish=self._spec.publish,
            network=self._spec.network,
            on_heartbeat=lambda: os.eventfd_write(self._heartbeat, 1),
            on_failure=lambda: machine.stop(End("failure", f"vsock device: {backend.error}")),
        )
        self._cleanup.callback(backend.close)
        if self._spec.nsm is not None:
            nsm = self._nsm = NsmBackend(
                transport=partial(registers, VIRTIO_ID_NSM, NsmDevice.queue_names),
                nsm=self._spec.nsm,
                enclave_id=self._spec.enclave_id,
                on_failure=lambda: machine.stop(End("failure", f"NSM device: {nsm.error}")),
            )
            self._cleanup.callback(nsm.close)
            nsm.start()
        bus = self._bus(machine, boot.windows, transports)
        backend.start()
        self._cleanup.callback(machine.halt)  # CPUs end first, then what serves them
        machine.start(self._cpus, bus, host_cpus=self._spec.cpu_list)

    def _map(self, machine: Machine, boot: rom.Boot) -> GuestMemory:
        """Give the machine its memory and ROM; returns the memory as devices see it."""
        assert self._memory is not None  # noqa: S101 - start has looked
        low_end = low_memory_end(self._donated)
        parts = [
            (0, self._memory[: rom.ROM_ALIAS]),
            (rom.ROM_ALIAS + rom.ROM_SIZE, self._memory[rom.ROM_ALIAS + rom.ROM_SIZE : low_end]),
        ]
        if self._donated > LOW_MEMORY_LIMIT:
            parts.append((HIGH_MEMORY_START, self._memory[low_end : self._donated]))
        for gpa, part in parts:
            machine.add_memory(gpa, part)
        firmware = mmap.mmap(-1, rom.ROM_SIZE)
        firmware.write(rom.compose(boot, rom.loader()))
        machine.add_memory(rom.ROM_ALIAS, firmware, readonly=True)
        machine.add_memory(ROM_TOP - rom.ROM_SIZE, firmware, readonly=True)
        return GuestMemory(DeviceRegion(gpa, part) for gpa, part in parts)

    def _bus(self, machine: Machine, windows: Sequence[VirtioWindow], transports: Sequence[MmioTransport]) -> DeviceBus:
        """Devices where the guest looks for them, eventfds where KVM takes and gives them."""
        console = self._console = Console(machine.stop_fd)
        self._cleanup.callback(console.close)
        serial = Serial(console.send, lambda level: machine.vm.set_irq(COM1_IRQ, level), console.room)
        keyboard = I8042(lambda: machine.stop(End("reset")))
        clock = Cmos()
        registers = []
        for window, transport in zip(windows, transports, strict=True):
            for number, kick in enumerate(transport.kick_fds):
                machine.vm.ioeventfd(kick, window.address + Register.QUEUE_NOTIFY, 4, number)
            machine.vm.irqfd(transport.interrupt_fd, window.irq)
            registers.append(Window(window.address, window.size, transport.read, transport.write))
        ports = [
            PortRange(COM1, PORTS, serial.read, serial.write),
            PortRange(CMOS, 2, clock.read, clock.write),
            PortRange(SLEEP_CONTROL, 1, lambda _: 0, lambda _, value: self._sleep(machine, value)),
            PortRange(I8042_DATA, 1, lambda _: keyboard.read_data(), lambda _, value: keyboard.write_data(value)),
            PortRange(I8042_COMMAND, 1, lambda _: keyboard.status, lambda _, value: keyboard.command(value)),
        ]
        bus = DeviceBus(ports, registers)
        console.start(serial, bus.locked)
        return bus

    @staticmethod
    def _sleep(machine: Machine, value: int) -> None:
        if value & SLEEP_ENABLE:  # the only sleep that the tables offer is power-off
            machine.stop(End("power-off"))

    def fileno(self) -> int:
        """The read end of a pipe that the last vCPU's thread closes."""
        assert self._machine is not None  # noqa: S101 - it was started
        return self._machine.ended_fd

    def heartbeat_fd(self) -> int:
        """An eventfd."""
        return self._heartbeat

    def console(self) -> int | None:
        """Our end of the serial line."""
        return self._console.outside.fileno()

    def connect(self, port: int, timeout_s: float = 2.0) -> socket.socket:
        """Through our own vsock device."""
        assert self._backend is not None  # noqa: S101 - it was started
        return self._backend.connect(port, timeout_s)

    def statistics(self) -> Statistics:
        """Time of the vCPUs' threads, pages of the enclave's memory, and our device's counts."""
        if self._machine is None or self._backend is None or self._memory_fd is None:
            return Statistics()
        resident = os.fstat(self._memory_fd).st_blocks * BLOCK_SIZE
        return Statistics(self._machine.cpu_s, resident, *self._backend.statistics())

    def failure(self) -> str | None:
        """KVM's reason and the registers, or our device's own words."""
        for name, device in (("vsock", self._backend), ("NSM", self._nsm)):
            if device is not None and device.error is not None:
                return f"{name} device: {device.error}"
        end = self._machine.end if self._machine is not None else None
        return end.failure if end is not None else None

    def close(self) -> None:
        """End the CPUs, then the devices."""
        self._cleanup.close()
        self._memory = None  # at once, not when the garbage is collected
