# SPDX-License-Identifier: Apache-2.0
"""Carrier ``qemu``: enclave memory is a memfd of ours that QEMU's microvm maps; the firmware is our ROM.

No root, no files, no ports: memory, ROM, serial line, vhost-user and QMP reach QEMU as inherited descriptors. QEMU is
sandboxed and dies with us. Sources: QEMU docs/system/i386/microvm.rst, qemu-options.hx.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from enclavekit.errors import CarrierError, LaunchError
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.contract import ImageKind, LaunchSpec, MemoryRegion, Mode, Statistics
from enclavekit.hypervisor.memory import enclave_memory
from enclavekit.hypervisor.qmp import Qmp
from enclavekit.linux.cgroup import Cgroup
from enclavekit.linux.process import dies_with_parent, usage_of
from enclavekit.linux.tsc import TscClock
from enclavekit.platform import rom
from enclavekit.platform.machine import IMAGE_LOAD_OFFSET, MAX_CPUS, MIB, microvm_windows
from enclavekit.virtio.backend import VsockBackend
from enclavekit.virtio.nsm import QUEUE_SIZE, VIRTIO_ID_NSM, Nsm
from enclavekit.virtio.nsm_backend import NsmBackend

FIRST_CID = 16
"""An enclave's own CID starts here, as on EC2."""

EXIT_WITH_PARENT = (10, 2, 0)
"""The QEMU that brought it; older ones are only used when named."""

NSM_DEVICE = (10, 2, 0)
"""The QEMU that brought vhost-user devices of any kind (docs/devel/vhost-user-test-device)."""

QUIT_TIMEOUT_S = 2.0
OWN_MEMORY = {Accel.KVM: 256 * MIB, Accel.TCG: 1536 * MIB}
"""What QEMU may use besides the enclave's memory, in a cgroup; TCG keeps up to 1 GiB of translated code."""
STDERR_LIMIT = 4096

MACHINE = "microvm,acpi=off,rtc=off,x-option-roms=off,auto-kernel-cmdline=off,isa-serial=on,memory-backend=mem"
NSM_OPTIONS = f"vhost-user-test-device,chardev=nsm,virtio-id={VIRTIO_ID_NSM},num_vqs=1,vq_size={QUEUE_SIZE}"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class QemuCarrier:
    """Makes enclaves: ``command`` runs QEMU, with whatever must stand before its options."""

    command: Sequence[str]
    environment: Mapping[str, str]
    version: tuple[int, int, int]
    accel: Accel

    @property
    def has_nsm(self) -> bool:
        """Whether enclaves get the NSM that they are to have."""
        return self.version >= NSM_DEVICE

    def create(self, spec: LaunchSpec) -> QemuEnclave:
        """A new enclave without memory or CPUs."""
        return QemuEnclave(self, spec)


class QemuEnclave:
    """One enclave in one QEMU process (see ``contract.Enclave``)."""

    def __init__(self, carrier: QemuCarrier, spec: LaunchSpec) -> None:
        self._carrier = carrier
        self._spec = spec
        self._tsc = TscClock() if carrier.accel is Accel.TCG else None
        self._cleanup = ExitStack()
        self._memory_fd: int | None = None
        self._donated = 0
        self._cpus = 0
        self.cid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False
        self._cgroup: Cgroup | None = None
        self._nsm: NsmBackend | None = None
        self._boot: rom.Boot | None = None

    def allocate(self, size: int) -> Sequence[MemoryRegion]:
        """One region: all of the enclave's memory. Pages are given by the kernel as they are touched."""
        self._memory_fd = self._own(enclave_memory(self._spec, size))
        mapped = mmap.mmap(self._memory_fd, size)
        return [MemoryRegion(0, memoryview(mapped))]

    def image_load_offset(self, kind: ImageKind) -> int:
        """8 MiB, as the driver answers for an EIF."""
        del kind  # there is one
        return IMAGE_LOAD_OFFSET

    def set_user_memory_region(self, region: MemoryRegion) -> None:
        """Give up our own mapping; from now on QEMU, and the devices, map the memfd."""
        self._donated += region.size
        mapped = region.buffer.obj
        region.buffer.release()
        if isinstance(mapped, mmap.mmap):
            mapped.close()

    def add_vcpu(self, cpu: int | None = None) -> int:
        """CPUs are threads of QEMU; they have no number on the host."""
        if self._cpus >= MAX_CPUS:
            raise LaunchError(f"vCPUs: a local enclave can have {MAX_CPUS}")
        self._cpus += 1
        return self._cpus - 1 if cpu is None else cpu

    def start(self, *, mode: Mode, cid: int | None = None) -> int:
        """Compose the ROM, start the devices, then QEMU."""
        del mode  # the serial line is read in either; who may see it is the supervisor's business
        if self._memory_fd is None or not self._donated or not self._cpus:
            raise LaunchError("start: the enclave has no memory or no CPU")
        self.cid = cid = FIRST_CID if cid is None else cid
        console, console_qemu = self._socketpair()
        control, control_qemu = self._socketpair()
        heartbeat = self._own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._stderr = self._own(os.memfd_create("qemu-stderr", os.MFD_CLOEXEC))
        transports = [self._start_device(cid, heartbeat)]
        if self._nsm_to_have is not None:
            transports.append(self._start_nsm(self._nsm_to_have))
        if self._spec.cgroup is not None:
            memory = self._donated + OWN_MEMORY[self._carrier.accel]
            self._cgroup = Cgroup(self._spec.cgroup, memory=memory, cpus=self._cpus)
            self._cleanup.callback(self._cgroup.remove)
        rom_fd = self._compose_rom()
        alive, alive_qemu = os.pipe2(os.O_CLOEXEC)
        self._own(alive)
        inherited = [self._memory_fd, rom_fd, console_qemu.fileno(), control_qemu.fileno()]
        inherited += [transport.fileno() for transport in transports]
        everywhere = os.sched_getaffinity(0)
        try:
            if self._spec.cpu_list is not None:  # which QEMU inherits, with all of its threads
                os.sched_setaffinity(0, self._spec.cpu_list)
            self._process = subprocess.Popen(
                [*self._carrier.command, *self._arguments(*inherited)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[*inherited, alive_qemu],
                env=dict(self._carrier.environment),
                start_new_session=True,  # Ctrl-C is for us
                preexec_fn=None if self._ends_with_us else dies_with_parent(),  # noqa: PLW1509 - old QEMUs only
            )
        except OSError as error:
            raise CarrierError(f"cannot run QEMU: {self._carrier.command[0]}: {error.strerror}") from error
        finally:
            os.sched_setaffinity(0, everywhere)
            os.close(alive_qemu)
            for end in (console_qemu, control_qemu, *transports):
                end.close()
        if self._cgroup is not None:
            self._cgroup.add(self._process.pid)
        console.setblocking(False)
        self._console, self._alive, self._heartbeat = console, alive, heartbeat
        self._qmp = Qmp(control)
        return cid

    def _start_device(self, cid: int, heartbeat: int) -> socket.socket:
        """Our vsock device; QEMU's end of its vhost-user connection."""
        transport, transport_qemu = self._socketpair()
        self._backend = VsockBackend(
            transport=transport,
            guest_cid=cid,
            enclave_id=self._spec.enclave_id,
            directory=self._spec.directory,
            parent_directory=self._spec.parent_directory,
            listen=self._spec.listen,
            publish=self._spec.publish,
            network=self._spec.network,
            on_heartbeat=lambda: os.eventfd_write(heartbeat, 1),
            on_failure=self._device_failed,
        )
        self._cleanup.callback(self._backend.close)
        self._backend.start()
        return transport_qemu

    @property
    def _nsm_to_have(self) -> Nsm | None:
        """The second device's, if there is one."""
        return self._spec.nsm if self._carrier.has_nsm else None

    @property
    def _ends_with_us(self) -> bool:
        """Whether this QEMU can see to it itself."""
        return self._carrier.version >= EXIT_WITH_PARENT

    def _start_nsm(self, nsm: Nsm) -> socket.socket:
        """Its device; QEMU's end of its vhost-user connection."""
        transport, transport_qemu = self._socketpair()
        self._nsm = NsmBackend(
            transport=transport, nsm=nsm, enclave_id=self._spec.enclave_id, on_failure=self._device_failed
        )
        self._cleanup.callback(self._nsm.close)
        self._nsm.start()
        return transport_qemu

    def boot(self) -> rom.Boot:
        """This machine; once, for the TSC's speed is measured up to here."""
        if self._boot is not None:
            return self._boot
        parameters = []
        # Hardware-reduced ACPI leaves nothing to calibrate the TSC by, and on a busy machine kernels then hang. Nor do
        # as many ticks come as a kernel counts on, which then takes the timer for broken.
        if self._tsc and (khz := self._tsc.khz()):
            parameters = [f"tsc_early_khz={khz}", "tsc=reliable", "no_timer_check"]
        return rom.Boot(
            memory=self._spec.memory,
            cpus=self._spec.cpus,
            image_base=IMAGE_LOAD_OFFSET,
            image_size=self._spec.image_size,
            windows=microvm_windows(1 if self._nsm_to_have is None else 2),
            discovery=self._spec.discovery,
            parameters=parameters,
            enclave_id=self._spec.enclave_id,
        )

    def enter(self, boot: rom.Boot) -> None:
        """What the host has laid down."""
        self._boot = boot

    def _compose_rom(self) -> int:
        # What was donated and added counts, should it be other than what was announced.
        boot = replace(self.boot(), memory=self._donated, cpus=self._cpus)
        fd = self._own(os.memfd_create("enclave-rom", os.MFD_CLOEXEC))
        os.write(fd, rom.compose(boot, rom.loader()))
        return fd

    def _arguments(self, memory: int, rom_fd: int, console: int, control: int, *transports: int) -> list[str]:
        """``transports`` are the devices', in the order of their windows: vsock, and the NSM."""
        size = self._donated
        vsock, nsm = transports[0], transports[1] if len(transports) > 1 else None
        return [
            *("-machine", MACHINE, "-accel", self._carrier.accel, "-smp", str(self._cpus), "-m", f"{size // MIB}M"),
            *("-cpu", self._carrier.accel.cpu_model),
            *("-object", f"memory-backend-file,id=mem,size={size},mem-path=/proc/self/fd/{memory},share=on"),
            *("-bios", f"/proc/self/fd/{rom_fd}"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=control,fd={control}", "-mon", "chardev=control,mode=control"),
            *("-global", "virtio-mmio.force-legacy=false"),
            *("-chardev", f"socket,id=vsock,fd={vsock}", "-device", "vhost-user-vsock-device,chardev=vsock"),
            *(("-chardev", f"socket,id=nsm,fd={nsm}", "-device", NSM_OPTIONS) if nsm is not None else ()),
            # The kernel's reboot=k writes to it, and that ends the machine.
            *("-device", "i8042"),
            *("-sandbox", SANDBOX),
            *(("-run-with", "exit-with-parent=on") if self._ends_with_us else ()),
        ]

    def fileno(self) -> int:
        """The read end of a pipe whose other end only QEMU holds."""
        return self._alive

    def heartbeat_fd(self) -> int:
        """An eventfd."""
        return self._heartbeat

    def console(self) -> int | None:
        """Our end of the serial line."""
        return self._console.fileno()

    def connect(self, port: int, timeout_s: float = 2.0) -> socket.socket:
        """Through our own vsock device."""
        return self._backend.connect(port, timeout_s)

    def statistics(self) -> Statistics:
        """Of QEMU's process and of our device."""
        connections, received, sent = self._backend.statistics()
        usage = usage_of(self._process.pid) if self._process is not None else None
        return Statistics(*(usage or (0.0, 0)), connections, received, sent)

    def failure(self) -> str | None:
        """QEMU's own words when it failed, or our device's."""
        for name, device in (("vsock", self._backend), ("NSM", self._nsm)):
            if device is not None and device.error is not None:
                return f"{name} device: {device.error}"
        if self._process is None:
            return None
        try:
            status = self._process.wait(QUIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None
        self._qmp.read()
        if self._closing:
            return None
        if status == 0:
            return "QEMU was ended by a signal from outside" if self._qmp.shutdown_reason == "host-signal" else None
        return self._how_it_failed(status)

    def _how_it_failed(self, status: int) -> str:
        if self._cgroup is not None and self._cgroup.out_of_memory:
            return "QEMU was killed: it reached the memory limit of its control group"
        lines = os.pread(self._stderr, STDERR_LIMIT, 0).decode(errors="replace").strip().splitlines()
        said = [line for line in lines if ": warning: " not in line]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return f"QEMU {how}" + (f": {said[-1]}" if said else "")

    def close(self) -> None:
        """End QEMU: by asking, then by force."""
        self._closing = True
        if self._process is not None and self._process.poll() is None:
            self._qmp.quit()
            try:
                self._process.wait(QUIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._cleanup.close()

    def _device_failed(self) -> None:
        """Comes in the device's thread: an enclave whose device is gone must not run on."""
        if self._process is not None:
            self._process.kill()

    def _own(self, fd: int) -> int:
        self._cleanup.callback(os.close, fd)
        return fd

    def _socketpair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self._cleanup.callback(ours.close)
        self._cleanup.callback(theirs.close)
        return ours, theirs
