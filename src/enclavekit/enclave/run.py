# SPDX-License-Identifier: Apache-2.0
"""The job of running an image: read it, see that it fits, claim a place, launch it, supervise it, clean up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from enclavekit import eif
from enclavekit.codec.bzimage import READ_SIZE, BzImage
from enclavekit.eif import Arch
from enclavekit.enclave.directory import claim
from enclavekit.enclave.launch_values import check_values
from enclavekit.enclave.supervisor import Outcome, Streams, Supervisor
from enclavekit.errors import LaunchError
from enclavekit.hypervisor.contract import LaunchSpec, Mode
from enclavekit.hypervisor.launch import launch
from enclavekit.hypervisor.qemu import QemuCarrier
from enclavekit.image.kernel import image_discovery
from enclavekit.platform.machine import MAX_CPUS
from enclavekit.platform.placement import choose_memory, needed_memory


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run an image; ``memory`` in bytes, None for a size that suits it. ``values`` are its launch values."""

    runtime_directory: Path
    memory: int | None = None
    cpus: int = 1
    cid: int | None = None
    mode: Mode = Mode.PRODUCTION
    timeout_s: float | None = None
    values: Mapping[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Running:
    """What is known once an enclave has been started."""

    enclave_id: str
    cid: int
    memory: int
    request_stop: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What an image says of how it must be run."""

    image: eif.Image
    memory: int
    discovery: eif.Discovery


def plan(file: BinaryIO, memory: int | None, at: datetime) -> Plan:
    """Read an image and choose its memory. Errors: ``EifError``, ``KernelError``, ``LaunchError``.

    A signature has to hold, and its certificate to be valid at that time, as for a real hypervisor: ``SignatureError``,
    ``CertificateError``.
    """
    image = eif.read(file)
    if image.signature:
        signature = eif.Signature.parse(eif.read_section(file, image.signature))
        signature.verify(eif.measure(file, image, name="image").measurements.pcr0, at)
    if image.arch is not Arch.X86_64:
        raise LaunchError(f"image for {image.arch}, expected {Arch.X86_64}, as this machine is")
    file.seek(image.kernel.offset)
    kernel = BzImage.parse(file.read(min(READ_SIZE, image.kernel.size)), image.kernel.size)
    needed = needed_memory(kernel, image.size, sum(section.size for section in image.ramdisks))
    return Plan(image, choose_memory(needed, memory), image_discovery(file, image))


def run(
    file: BinaryIO,
    carrier: QemuCarrier,
    options: RunOptions,
    streams: Streams,
    on_started: Callable[[Running], None],
) -> Outcome:
    """Run the image in ``file`` to its end. Errors: those of ``plan``, ``launch`` and ``Supervisor.wait``.

    Nothing is left behind, whatever happens: no process, no directory, no socket.
    """
    if not 1 <= options.cpus <= MAX_CPUS:
        raise LaunchError(f"CPUs: got {options.cpus}, expected 1 to {MAX_CPUS}")
    planned = plan(file, options.memory, datetime.now(UTC))
    check_values(file, planned.image, options.values)
    directory = claim(options.runtime_directory, options.cid)
    try:
        spec = LaunchSpec(
            enclave_id=directory.enclave_id,
            memory=planned.memory,
            cpus=options.cpus,
            image_size=planned.image.size,
            discovery=planned.discovery,
            directory=directory.path,
            parent_directory=options.runtime_directory / "parent",
        )
        file.seek(0)
        enclave = launch(carrier.create, spec, file, mode=options.mode, cid=directory.cid)
        try:
            directory.write_state(state="running", memory=planned.memory, cpus=options.cpus)
            supervisor = Supervisor(enclave, streams, timeout_s=options.timeout_s, values=options.values)
            on_started(Running(directory.enclave_id, directory.cid, planned.memory, supervisor.request_stop))
            return supervisor.wait()
        finally:
            enclave.close()
    finally:
        directory.remove()
