# SPDX-License-Identifier: Apache-2.0
"""The parent machine of a lab: QEMU with Debian's kernel, the NE device, vsock as CID 3, and an instance's identity.

Its RAM is a memfd of ours, so that the device can give away what the driver donates. QEMU is sandboxed and dies with
us. Sources: QEMU qemu-options.hx, docs/system/devices/vfio-user.rst.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from enclavekit.eif import Arch
from enclavekit.enclave.security_module import check_instance_id
from enclavekit.errors import CarrierError, LaunchError, NoQemuError
from enclavekit.hypervisor.accel import Accel
from enclavekit.hypervisor.qemu import EXIT_WITH_PARENT, SANDBOX
from enclavekit.image.boot import boot_ramdisk
from enclavekit.image.modules import resolve
from enclavekit.image.ramdisk import Ramdisk
from enclavekit.lab.root import LIBRARY, join
from enclavekit.linux.process import dies_with_parent
from enclavekit.linux.tsc import TscClock
from enclavekit.runtime.find import Kernel, Qemu, dotted

VFIO_USER = (10, 1, 0)
"""The QEMU that brought devices in other processes over vfio-user."""

MIB = 1 << 20
HUGE_PAGE = 2 * MIB
MIN_MEMORY = 384 * MIB
"""The ramdisk is there twice while it is unpacked."""
THREADS_PER_CORE = 2
MAX_CPUS = 64
FIRST_CORE_CPUS = 2
"""The parent keeps its first core, both threads of it, as the driver demands."""
MODULES = ("vmw_vsock_virtio_transport", "nitro_enclaves")
AGENT_PORT = 1023
"""vsock, in the parent: a port that only root can take."""

STDERR_LIMIT = 4096
QUIT_TIMEOUT_S = 2.0

INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /run /tmp; $b chmod 755 /
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
$b mkdir /dev/pts /dev/shm; $b mount -t devpts -o gid=5,mode=620 pts /dev/pts; $b mount -t tmpfs shm /dev/shm
for module in /modules/*.ko; do $b insmod $module; done
echo {pool} > /sys/module/nitro_enclaves/parameters/ne_cpus
for path in /dev/nitro_enclaves /run/nitro_enclaves /var/log/nitro_enclaves; do
  $b chgrp ne $path; $b chmod g+rw $path
done
$b chown user:user /home/user; $b hostname parent; $b ip link set lo up
export PATH=/usr/local/bin:/usr/bin:/usr/sbin HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
cd /root
/usr/bin/python3 -I -S -c '{agent}'
$b poweroff -f
"""
AGENT = 'import sys; sys.path.append("/{library}"); from enclavekit.lab.agent import serve; serve({port})'


@dataclass(frozen=True, slots=True)
class ParentOptions:
    """What kind of instance it is."""

    instance_id: str
    cpus: int = 4
    """Threads; two are a core. All but the first core's are for enclaves."""
    memory: int = 768 * MIB
    """Bytes, beside the huge pages."""
    enclave_memory: int = 512 * MIB
    """Bytes of huge pages."""
    command_line: str = ""
    """More of the kernel's."""

    def check(self) -> None:
        """Errors: LaunchError, UsageError."""
        check_instance_id(self.instance_id)
        if self.cpus % THREADS_PER_CORE or not FIRST_CORE_CPUS < self.cpus <= MAX_CPUS:
            raise LaunchError(
                f"CPUs: {self.cpus}, expected an even number from 4 to {MAX_CPUS}: two for each core, one core kept"
            )
        if self.memory % MIB or self.memory < MIN_MEMORY:
            raise LaunchError(f"memory: {self.memory // MIB} MiB, expected whole MiB, {MIN_MEMORY // MIB} or more")
        if self.enclave_memory % HUGE_PAGE or self.enclave_memory <= 0:
            raise LaunchError(f"enclave memory: {self.enclave_memory // MIB} MiB, expected whole huge pages of 2 MiB")

    @property
    def pool(self) -> str:
        """The enclaves' CPUs, as the driver's parameter has them."""
        return ",".join(map(str, range(FIRST_CORE_CPUS, self.cpus)))


class Parent:
    """One parent machine, from ``start`` to ``close``."""

    def __init__(self, qemu: Qemu, kernel: Kernel, accel: Accel, options: ParentOptions) -> None:
        options.check()
        if qemu.version < VFIO_USER:
            raise NoQemuError(
                f"QEMU {dotted(qemu.version)}: expected 10.1 or newer, which has vfio-user",
                hint="enclave runtime install",
            )
        self._qemu, self._kernel, self._accel, self._options = qemu, kernel, accel, options
        self._tsc = TscClock() if accel is Accel.TCG else None
        self._cleanup = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, ramdisks: Sequence[Path], *, device: Path, vsock: socket.socket, console: socket.socket) -> None:
        """``ramdisks`` are the root file system; ``device`` is where the NE device's server listens. The sockets lead
        to the vsock device and to whoever reads what the kernel says; both are the caller's to close.

        Errors: CarrierError, NoKernelError, FileError.
        """
        memory = self._own(os.memfd_create("parent-memory", os.MFD_CLOEXEC))
        os.ftruncate(memory, self._options.memory + self._options.enclave_memory)
        self._stderr = self._own(os.memfd_create("qemu-stderr", os.MFD_CLOEXEC))
        alive, alive_qemu = os.pipe2(os.O_CLOEXEC)
        self._own(alive)
        self._alive = alive
        ends_with_us = self._qemu.version >= EXIT_WITH_PARENT
        with tempfile.TemporaryFile(dir=ramdisks[0].parent.parent) as ramdisk:
            try:
                join([*ramdisks, self._boot_ramdisk()], ramdisk.fileno())
                inherited = [memory, vsock.fileno(), console.fileno(), ramdisk.fileno()]
                self._process = subprocess.Popen(
                    [*self._qemu.command, *self._arguments(device.name, *inherited)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    pass_fds=[*inherited, alive_qemu],
                    env=dict(self._qemu.environment),
                    cwd=device.parent,  # a path relative to it is always short enough for a socket
                    start_new_session=True,
                    preexec_fn=None if ends_with_us else dies_with_parent(),  # noqa: PLW1509 - old QEMUs only
                )
            except OSError as error:
                raise CarrierError(f"cannot run QEMU: {self._qemu.command[0]}: {error.strerror}") from error
            finally:
                os.close(alive_qemu)

    def _boot_ramdisk(self) -> Ramdisk:
        modules = resolve(self._kernel.modules, arch=Arch.X86_64, release="", required=MODULES, optional=())
        agent = AGENT.format(library=LIBRARY, port=AGENT_PORT)
        return boot_ramdisk(INIT.format(pool=self._options.pool, agent=agent).encode(), modules.modules)

    def _arguments(self, device: str, memory: int, vsock: int, console: int, ramdisk: int) -> list[str]:
        options = self._options
        size = options.memory + options.enclave_memory
        vfio = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": device}, "addr": "02.0"}
        cores = options.cpus // THREADS_PER_CORE
        return [
            *("-machine", "q35,memory-backend=mem", "-m", f"{size // MIB}M"),
            *("-accel", "kvm" if self._accel is Accel.KVM else "tcg,thread=multi"),
            *("-cpu", self._accel.cpu_model),
            *("-smp", f"{options.cpus},sockets=1,cores={cores},threads={THREADS_PER_CORE}"),
            *("-object", f"memory-backend-file,id=mem,size={size},mem-path=/proc/self/fd/{memory},share=on"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=vsock,fd={vsock}", "-device", "vhost-user-vsock-pci,chardev=vsock"),
            *("-device", json.dumps(vfio)),
            *("-smbios", f"type=2,asset={options.instance_id}"),
            *("-kernel", str(self._kernel.path.absolute()), "-initrd", f"/proc/self/fd/{ramdisk}"),
            *("-append", self._command_line()),
            *("-sandbox", SANDBOX),
            *(("-run-with", "exit-with-parent=on") if self._qemu.version >= EXIT_WITH_PARENT else ()),
        ]

    def _command_line(self) -> str:
        pages = self._options.enclave_memory // HUGE_PAGE
        # Zeroing all huge pages once more takes seconds under TCG: the memory is new.
        words = [
            "console=ttyS0",
            "quiet",
            "panic=-1",
            "init_on_alloc=0",
            "reboot=t",
            "hugepagesz=2M",
            f"hugepages={pages}",
        ]
        if self._tsc is not None:
            words += ["tsc=reliable", "no_timer_check"]
            khz = self._tsc.khz()
            words += [f"tsc_early_khz={khz}"] if khz else []
        return " ".join([*words, *self._options.command_line.split()])

    def fileno(self) -> int:
        """Polls readable when QEMU has ended."""
        return self._alive

    @property
    def pid(self) -> int:
        """QEMU's."""
        return self._process.pid if self._process is not None else 0

    def failure(self) -> str | None:
        """What QEMU said when it failed; None while it runs, or when the machine was powered off."""
        if self._process is None or not select.select([self._alive], [], [], 0)[0]:
            return None
        try:
            status = self._process.wait(QUIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None
        if status == 0:
            return None
        said = os.pread(self._stderr, STDERR_LIMIT, 0).decode(errors="replace").strip().splitlines()
        said = [line for line in said if "warning: " not in line]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return f"QEMU {how}" + (f": {said[-1]}" if said else "")

    def close(self) -> None:
        """End QEMU. Twice does no harm."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._cleanup.close()

    def _own(self, fd: int) -> int:
        self._cleanup.callback(os.close, fd)
        return fd
