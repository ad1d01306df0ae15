# SPDX-License-Identifier: Apache-2.0
"""The job of running an image: read it, see that it fits, claim a place, launch it, supervise it, clean up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from enclavekit import eif
from enclavekit.codec.bzimage import READ_SIZE, BzImage
from enclavekit.eif import Arch
from enclavekit.enclave.directory import CONSOLE, OUTPUT, EnclaveDirectory, claim
from enclavekit.enclave.launch_values import check_values
from enclavekit.enclave.log_file import LogFile
from enclavekit.enclave.nitro_platform import nitro_discovery
from enclavekit.enclave.security_module import security_module
from enclavekit.enclave.supervisor import Outcome, Streams, Supervisor
from enclavekit.errors import Error, LaunchError, NotEnoughMemoryError
from enclavekit.hypervisor.contract import Carrier, Enclave, LaunchSpec, Mode
from enclavekit.hypervisor.heartbeat import heartbeat_timeout_s
from enclavekit.hypervisor.launch import launch
from enclavekit.hypervisor.nitro import NitroCarrier
from enclavekit.image.kernel import image_discovery
from enclavekit.linux.memory import available_memory
from enclavekit.platform.machine import MAX_CPUS, BootProtocol, Platform
from enclavekit.platform.placement import choose_memory, choose_nitro_memory, needed_memory, needed_nitro_memory
from enclavekit.virtio.host_sockets import HostAddress


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run an image; ``memory`` in bytes, None for a size that suits it. ``values`` are its launch values.

    ``name`` is what it is called besides its id; with a number, ``name_numbered``, where that is taken. ``image`` is
    what its image is called; ``cpu_list`` are the host's CPUs
    that it may run on, None for all; ``cgroup`` is a directory of cgroup v2 where it gets a group with its limits.
    ``attestation_directory`` holds the authority that signs its documents; without one it has no NSM. ``role`` and
    ``instance_id`` are of the parent that its PCR3 and PCR4 tell of.
    """

    runtime_directory: Path
    memory: int | None = None
    cpus: int = 1
    cid: int | None = None
    mode: Mode = Mode.PRODUCTION
    timeout_s: float | None = None
    values: Mapping[bytes, bytes] = field(default_factory=dict)
    name: str | None = None
    name_numbered: bool = False
    image: str = ""
    listen: Mapping[int, HostAddress] = field(default_factory=dict)
    publish: Sequence[tuple[HostAddress, int]] = ()
    cpu_list: frozenset[int] | None = None
    cgroup: Path | None = None
    platform: Platform = Platform.DEFAULT
    attestation_directory: Path | None = None
    role: str | None = None
    instance_id: str | None = None
    boot: BootProtocol = BootProtocol.EIF


@dataclass(frozen=True, slots=True)
class Running:
    """What is known once an enclave has been started."""

    enclave_id: str
    cid: int
    memory: int
    needed: int
    """Bytes of memory without which the image does not boot."""
    request_stop: Callable[[], None]
    module_id: str | None = None
    """Of its NSM, if it has one."""
    name: str = ""
    enclave: Enclave | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What an image says of how it must be run."""

    image: eif.Image
    memory: int
    discovery: eif.Discovery
    pcrs: Mapping[int, bytes]
    """PCR0, 1 and 2 of the image, and 8 when it is signed."""
    needed: int
    """Bytes of memory without which it does not boot."""
    kernel: BzImage
    crc: int
    """What the header should say."""


def plan(
    file: BinaryIO,
    memory: int | None,
    at: datetime,
    platform: Platform = Platform.DEFAULT,
    boot: BootProtocol = BootProtocol.EIF,
    *,
    local: bool = True,
) -> Plan:
    """Read an image and choose its memory. Errors: ``EifError``, ``KernelError``, ``LaunchError``.

    A real hypervisor, not ``local``, has its own loader, and memory without a hole.

    A signature has to hold, and its certificate to be valid at that time, as for a real hypervisor: ``SignatureError``,
    ``CertificateError``.
    """
    image = eif.read(file)
    found = eif.measure(file, image, name="image")
    measured = found.measurements
    pcrs = {0: measured.pcr0, 1: measured.pcr1, 2: measured.pcr2}
    if image.signature:
        signature = eif.Signature.parse(eif.read_section(file, image.signature))
        signature.verify(measured.pcr0, at)
        pcrs[8] = signature.certificate.pcr8
    if image.arch is not Arch.X86_64:
        raise LaunchError(f"image for {image.arch}, expected {Arch.X86_64}, as this machine is")
    file.seek(image.kernel.offset)
    kernel = BzImage.parse(file.read(min(READ_SIZE, image.kernel.size)), image.kernel.size)
    ramdisks = sum(section.size for section in image.ramdisks)
    needed = needed_memory(kernel, image.size, ramdisks, boot) if local else needed_nitro_memory(image.size)
    chosen = choose_memory(needed, memory) if local else choose_nitro_memory(image.size, memory)
    discovery = nitro_discovery(file, image) if platform is Platform.NITRO else image_discovery(file, image)
    return Plan(image, chosen, discovery, pcrs, needed, kernel, found.crc)


def run(
    file: BinaryIO,
    carrier: Carrier,
    options: RunOptions,
    streams: Streams,
    on_started: Callable[[Running], None],
) -> Outcome:
    """Run the image in ``file`` to its end. Errors: those of ``plan``, ``launch`` and ``Supervisor.wait``.

    No process and no socket is left behind, whatever happens; how it ended is found by ``directory.ended``.
    """
    check_cpus(options.cpus)
    local = not isinstance(carrier, NitroCarrier)
    stamp = _stamp(file)
    planned = plan(file, options.memory, datetime.now(UTC), options.platform, options.boot, local=local)
    check_values(file, planned.image, options.values)
    check_host(carrier, planned.memory, options.cpu_list)
    directory = claim(options.runtime_directory, options.cid, options.name, numbered=options.name_numbered)
    with ExitStack() as stack:
        # Until it is started there is nothing to remember.
        unstarted = stack.enter_context(ExitStack())
        unstarted.callback(directory.remove)
        cgroup = None
        if options.cgroup is not None:
            cgroup = options.cgroup.resolve() / f"enclavekit-{directory.enclave_id}"
            directory.write_state(cgroup=str(cgroup))
        nsm = None
        if options.attestation_directory is not None:
            nsm = security_module(
                options.attestation_directory,
                planned.pcrs,
                enclave_id=directory.enclave_id,
                mode=options.mode,
                role=options.role,
                instance_id=options.instance_id,
            )
        spec = LaunchSpec(
            enclave_id=directory.enclave_id,
            memory=planned.memory,
            cpus=options.cpus,
            image_size=planned.image.size,
            discovery=planned.discovery,
            directory=directory.path,
            parent_directory=options.runtime_directory / "parent",
            listen=options.listen,
            publish=options.publish,
            cpu_list=options.cpu_list,
            cgroup=cgroup,
            nsm=nsm,
            boot=options.boot,
        )
        file.seek(0)
        # The driver knows which CIDs others have.
        enclave = launch(carrier.create, spec, file, mode=options.mode, cid=directory.cid if local else options.cid)
        stack.callback(enclave.close)
        if _stamp(file) != stamp:  # then its PCRs would be another image's
            raise LaunchError("image: it changed while it was being read")
        directory.write_state(
            state="running",
            cid=enclave.cid,
            image=options.image,
            memory=planned.memory,
            cpus=options.cpus,
            mode=options.mode.name.lower(),
        )
        logs = _Logs(directory.path, streams, options.mode)
        stack.callback(logs.close)
        supervisor = Supervisor(
            enclave,
            logs.streams,
            timeout_s=options.timeout_s,
            values=options.values,
            heartbeat_timeout_s=heartbeat_timeout_s(planned.image.size, planned.memory),
        )
        began = time.monotonic()
        supervisor.listen(directory.path, lambda: _status(directory, enclave, supervisor, began))
        unstarted.pop_all()
        ending: dict[str, object] = {"reason": "killed"}
        try:
            on_started(
                Running(
                    directory.enclave_id,
                    enclave.cid,
                    planned.memory,
                    planned.needed,
                    supervisor.request_stop,
                    nsm.module_id if nsm is not None else None,
                    str(directory.state["name"]),
                    enclave,
                )
            )
            outcome = supervisor.wait()
            ending = ending_of(outcome)
        except Error as error:
            ending = ending_of(error)
            raise
        finally:
            enclave.close()
            logs.close()
            directory.end(**ending, uptime_s=round(time.monotonic() - began, 1))
            supervisor.tell_end(ending)
    return outcome


def _stamp(file: BinaryIO) -> tuple[int, ...]:
    """What changes whenever the file's contents do."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_cpus(cpus: int) -> None:
    """LaunchError for a number of vCPUs that no local machine has."""
    if not 1 <= cpus <= MAX_CPUS:
        raise LaunchError(f"CPUs: got {cpus}, expected 1 to {MAX_CPUS}")


def check_host(carrier: Carrier, memory: int, cpu_list: frozenset[int] | None) -> None:
    """That this machine has what an enclave takes of it. What the driver gives away was set aside before: it knows."""
    if not isinstance(carrier, NitroCarrier):
        check_memory(memory)
        check_cpu_list(cpu_list)


def check_memory(memory: int) -> None:
    """NotEnoughMemoryError when this machine has less bytes than that now."""
    available = available_memory()
    if available is not None and memory > available:
        raise NotEnoughMemoryError(
            f"memory: the enclave is to have {memory >> 20} MiB, this machine has {available >> 20} MiB available",
            hint="a smaller --memory, or stop something: enclave ps",
        )


def check_cpu_list(cpu_list: frozenset[int] | None) -> None:
    """LaunchError when these are not CPUs that this process may run on."""
    there = os.sched_getaffinity(0)
    if cpu_list is not None and not cpu_list <= there:
        missing = ", ".join(str(cpu) for cpu in sorted(cpu_list - there)[:16])
        raise LaunchError(f"CPUs {missing}: not among those that this process may use")


def ending_of(end: Outcome | Error) -> dict[str, object]:
    """How an enclave ended, for its record: ``reason``, and the application's ``exit_code`` or ``signal`` if any.

    Reasons are those of ``Outcome``, and for failures the code of the error, whose ``message`` is there too.
    """
    if isinstance(end, Outcome):
        return {"reason": end.reason, "exit_code": end.exit_code, "signal": end.signal}
    return {"reason": end.code, "exit_code": None, "signal": None, "message": end.message}


def _status(directory: EnclaveDirectory, enclave: Enclave, supervisor: Supervisor, began: float) -> dict[str, object]:
    statistics = enclave.statistics()
    return {
        **directory.state,
        "state": "running" if supervisor.running else "booting",
        "uptime_s": round(time.monotonic() - began, 1),
        "cpu_s": statistics.cpu_s,
        "resident": statistics.resident,
        "connections": statistics.connections,
        "vsock_received": statistics.received,
        "vsock_sent": statistics.sent,
    }


class _Logs:
    """What the streams carry, kept in the enclave's directory too: the console in debug mode only."""

    def __init__(self, directory: Path, streams: Streams, mode: Mode) -> None:
        self._output = LogFile(directory / OUTPUT)
        self._console = LogFile(directory / CONSOLE) if mode is Mode.DEBUG else None
        self.streams = replace(
            streams,
            output=self._tee(streams.output, self._output),
            console=self._tee(streams.console, self._console),
        )

    @staticmethod
    def _tee(stream: Callable[[bytes], None] | None, log: LogFile | None) -> Callable[[bytes], None]:
        def write(data: bytes) -> None:
            if log is not None:
                log.write(data)
            if stream is not None:
                stream(data)

        return write

    def close(self) -> None:
        """Twice does no harm."""
        self._output.close()
        if self._console is not None:
            self._console.close()
