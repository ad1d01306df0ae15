# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, and why not: one finding a line, with what helps.

Whether a carrier works is what ``select_carrier`` says, as for a launch; the findings say why. All that is read
is below a root directory, and all that is run can be another's, so every machine can be laid out in a test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from enclavekit.enclave.directory import own_directory
from enclavekit.enclave.doctor_nitro import nitro_findings
from enclavekit.enclave.findings import Finding, State, missing, ok, warning
from enclavekit.errors import Error, MissingError
from enclavekit.hypervisor.accel import Accel, Choice
from enclavekit.hypervisor.carriers import CarrierName, CarrierOptions, Selected, select_carrier
from enclavekit.linux.memory import available_memory
from enclavekit.runtime import Kernel, Qemu, find_kernel, find_qemu
from enclavekit.runtime.find import PROGRAM

MIB = 1 << 20
LITTLE_MEMORY = 512 * MIB
LITTLE_DISK = 512 * MIB
FEW_FILES = 1024
PROBE_TIMEOUT_S = 20.0
QEMU_NEEDS = ("vhost-user-vsock-device", "i8042")
NSM_DEVICE = "vhost-user-test-device"
INSTALL = "enclave runtime install"
DEVICE_HELP = ("-machine", "microvm", "-device", "help")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where to look, and what to ask."""

    carriers: CarrierOptions
    runtime_directory: Path
    data_directory: Path
    cache_directory: Path
    root: Path = Path("/")
    select: Callable[[CarrierName, CarrierOptions], Selected] = select_carrier
    find_qemu: Callable[[Path, str | None, str], Qemu] = find_qemu
    find_kernel: Callable[[Path], Kernel] = find_kernel
    run: Callable[[Sequence[str], Mapping[str, str]], str] = field(default_factory=lambda: _run)
    free_disk: Callable[[Path], int] = field(default_factory=lambda: _free_disk)
    groups: frozenset[int] = field(default_factory=lambda: frozenset({os.getegid(), *os.getgroups()}))
    uid: int = field(default_factory=os.geteuid)


@dataclass(slots=True)
class Diagnosis:
    """``works`` by carrier; ``chosen`` is what ``--carrier auto`` takes, None where none works."""

    findings: list[Finding] = field(default_factory=list)
    works: dict[CarrierName, bool] = field(default_factory=dict)
    chosen: CarrierName | None = None


def diagnose(machine: Machine) -> Diagnosis:
    """Ask everything; nothing raises."""
    made = Diagnosis()
    areas: dict[CarrierName, Callable[[Machine], Iterator[Finding]]] = {
        CarrierName.NITRO: lambda machine: nitro_findings(machine.root, machine.uid, machine.groups),
        CarrierName.QEMU: _qemu,
        CarrierName.KVM: _kvm,
    }
    for name, look in areas.items():
        found = list(look(machine))
        lacks = any(finding.state is State.MISSING for finding in found)
        try:
            machine.select(name, machine.carriers)
        except Error as error:
            made.works[name] = False
            if not lacks:
                found.append(missing(name, "carrier", error.message, error.hint))
        else:
            made.works[name] = not lacks
        made.findings += found
    made.chosen = next((name for name in CarrierName if made.works[name]), None)
    made.findings += [*_kernel(machine), *_machine(machine)]
    return made


def _qemu(machine: Machine) -> Iterator[Finding]:
    area = CarrierName.QEMU
    options = machine.carriers
    try:
        found = machine.find_qemu(options.runtime_root, options.qemu, options.search_path)
    except MissingError as error:
        yield missing(area, "program", error.message, error.hint)
        return
    yield ok(area, "program", f"QEMU {'.'.join(map(str, found.version))}: {_program(found)}")
    try:
        devices = machine.run([*found.command, *DEVICE_HELP], {**options.environment, **found.environment})
    except MissingError as error:
        yield missing(area, "devices", error.message, INSTALL)
    else:
        lacking = [name for name in QEMU_NEEDS if f'"{name}"' not in devices]
        if lacking:
            yield missing(area, "devices", f"QEMU has no {', '.join(lacking)}", INSTALL)
        else:
            yield ok(area, "devices", ", ".join(QEMU_NEEDS))
        if f'"{NSM_DEVICE}"' in devices:
            yield ok(area, "attestation", NSM_DEVICE)
        else:
            yield warning(area, "attestation", f"QEMU has no {NSM_DEVICE}: enclaves cannot attest", INSTALL)
    yield _accelerator(area, options.choose_accel)


def _program(qemu: Qemu) -> str:
    """Without the loader that runs it."""
    return next((word for word in qemu.command if word.endswith(PROGRAM)), qemu.command[0])


def _accelerator(area: CarrierName, choose: Callable[[Accel | None], Choice]) -> Finding:
    chosen = choose(None)
    if chosen.accel is Accel.KVM:
        return ok(area, "accelerator", f"kvm: {chosen.reason}")
    return warning(
        area,
        "accelerator",
        f"tcg: {chosen.reason}; a boot takes some ten times as long",
        "enable virtualization in the firmware, or nested virtualization where this is a virtual machine",
    )


def _kvm(machine: Machine) -> Iterator[Finding]:
    area = CarrierName.KVM
    device = machine.root / "dev/kvm"
    if not device.exists():
        yield missing(area, "device", "no /dev/kvm", "modprobe kvm_intel or kvm_amd; it may be off in the firmware")
        return
    chosen = machine.carriers.choose_accel(None)
    if chosen.accel is Accel.KVM:
        yield ok(area, "speed", chosen.reason)
        return
    if not os.access(device, os.R_OK | os.W_OK):
        yield missing(area, "device", "/dev/kvm: permission denied", "add this user to its group, kvm on most systems")
        return
    yield missing(area, "speed", chosen.reason, "run where virtualization is not emulated")


def _kernel(machine: Machine) -> Iterator[Finding]:
    try:
        kernel = machine.find_kernel(machine.carriers.runtime_root)
    except MissingError as error:
        yield warning("runtime", "kernel", f"{error.message}: images with a kernel of their own can run", error.hint)
        return
    yield ok("runtime", "kernel", f"{kernel.name}: {kernel.path}")


def _machine(machine: Machine) -> Iterator[Finding]:
    yield from _memory(machine.root)
    for name, path in (
        ("running enclaves", machine.runtime_directory),
        ("runtime", machine.data_directory),
        ("cache", machine.cache_directory),
    ):
        free = machine.free_disk(path)
        where = f"{path}: {free // MIB} MiB free"
        if free < LITTLE_DISK:
            yield warning("machine", f"disk of {name}", where, "make room")
        else:
            yield ok("machine", f"disk of {name}", where)
    try:
        own_directory(machine.runtime_directory)
    except Error as error:
        yield missing("machine", "runtime directory", error.message, error.hint)
    yield _cgroups(machine.root)
    yield _files()


def _memory(root: Path) -> Iterator[Finding]:
    available = available_memory(root / "proc", root / "sys/fs/cgroup")
    if available is None:
        yield warning("machine", "memory", "the kernel does not say how much is available", "mount /proc")
    elif available < LITTLE_MEMORY:
        yield warning("machine", "memory", f"{available // MIB} MiB available", "stop something: enclave ps")
    else:
        yield ok("machine", "memory", f"{available // MIB} MiB available")


def _cgroups(root: Path) -> Finding:
    try:
        controllers = (root / "sys/fs/cgroup/cgroup.controllers").read_text().split()
    except OSError:
        return warning("machine", "cgroups", "no cgroup v2: run --cgroup does not work", "mount it on /sys/fs/cgroup")
    lacking = [name for name in ("cpu", "memory") if name not in controllers]
    if lacking:
        return warning("machine", "cgroups", f"no controller {', '.join(lacking)}", "delegate it to this user")
    return ok("machine", "cgroups", "v2, with cpu and memory")


def _files() -> Finding:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        return warning("machine", "open files", f"at most {hard}: each vsock connection is one", "ulimit -Hn 65536")
    return ok("machine", "open files", "unlimited" if hard == resource.RLIM_INFINITY else f"at most {hard}")


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Its stdout. MissingError where it cannot be run."""
    try:
        done = subprocess.run(
            list(command), env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True,
            timeout=PROBE_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingError(f"{command[0]}: cannot be run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise MissingError(f"{command[0]}: {said[-1] if said else f'ends with {done.returncode}'}")
    return done.stdout.decode(errors="replace")


def _free_disk(path: Path) -> int:
    """Of the file system that it is on, or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
