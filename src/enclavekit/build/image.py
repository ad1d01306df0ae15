# SPDX-License-Identifier: Apache-2.0
"""Makes an image: source, tree, ramdisks, EIF. Same inputs, same bytes, for any user, in any directory, at any time.

A build that fails, also one that cannot be signed, leaves what was there before, and no more.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from enclavekit import __version__
from enclavekit.build.application import Application, init_config, text_bytes
from enclavekit.build.inputs import SECTIONS, check_inputs, check_measurements, inputs_of, measured
from enclavekit.build.nitro_cli import Blobs, command_of, second_ramdisk
from enclavekit.build.source import Access, open_source
from enclavekit.eif import (
    Arch,
    BuildInfo,
    BytesContent,
    Content,
    Input,
    KernelInfo,
    Lock,
    Measurements,
    Metadata,
    Section,
    SectionType,
    Sign,
    write,
)
from enclavekit.eif.layout import HEADER_SIZE, SECTION_HEADER_SIZE
from enclavekit.eif.lock import KERNEL
from enclavekit.errors import BuildError, FileError, KernelError, UsageError
from enclavekit.image.boot import boot_ramdisk, init_program
from enclavekit.image.container import ContainerImage
from enclavekit.image.kernel import Kernel, open_kernel
from enclavekit.image.modules import resolve
from enclavekit.image.ramdisk import application_ramdisk
from enclavekit.image.sources import Source
from enclavekit.image.tree import MAX_TIME, shown
from enclavekit.linux.atomic import replacing

_I8042 = " i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"
DEFAULT_CMDLINES = {
    Arch.X86_64: f"reboot=k panic=1 pci=off console=ttyS0 quiet{_I8042} random.trust_cpu=on",
    Arch.AARCH64: "reboot=k panic=1 pci=off console=ttyS0 quiet random.trust_cpu=on",
}
MAX_CMDLINE_SIZE = 1792
"""The kernel takes 2047 bytes; the others are for what describes the machine."""
DEFAULT_VERSION = "1.0"
"""Of the image, where nobody gives it another."""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """A kernel's file and its ``lib/modules/<release>``, if it has one. ``name`` goes into the metadata.

    ``made_of`` are words for the lock: the source and the compiler of one that was built.
    """

    path: Path
    modules: Path | None
    name: str
    made_of: str = ""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """All that an image is made of.

    ``source`` is what ``open_source`` takes. ``epoch``, seconds since 1970, is the build time, and no file is newer;
    None is 0 for directories, the image's own time for container images, and for tars their newest file's. ``init``
    replaces the package's own. ``sign`` makes the image's signature, with which ``pcr8`` goes. With ``blobs``, all that
    is measured is as nitro-cli would make it of them: ``kernel`` and ``init`` do not count then, and files keep their
    times. ``custom`` is JSON for the metadata; with ``docker_info``, they describe the container image as nitro-cli's
    do, and its id is the version, unless one is given. ``locked`` is what the image has to be made of, and its PCRs;
    anything else is a LockedError.
    """

    source: str
    output: Path
    kernel: KernelChoice
    application: Application
    access: Access
    keep_owners: bool = False
    cmdline: str | None = None
    arch: Arch | None = None
    epoch: int | None = None
    name: str | None = None
    version: str | None = None
    custom: Any = None
    docker_info: bool = False
    init: bytes | None = None
    sign: Sign | None = None
    pcr8: bytes | None = None
    blobs: Blobs | None = None
    locked: Lock | None = None


@dataclass(frozen=True, slots=True)
class BuildResult:
    """The image at ``path``; ``size`` in bytes. ``warnings`` are sentences for whoever built it.

    ``lock`` is what it was made of, and ``sections`` names its sections with their sizes.
    """

    path: Path
    arch: Arch
    size: int
    crc: int
    measurements: Measurements
    warnings: tuple[str, ...]
    lock: Lock
    sections: tuple[tuple[str, int], ...]


def build(options: BuildOptions) -> BuildResult:
    """Make the image. Whatever goes wrong is an Error, and nothing is left behind."""
    if options.blobs:
        options = replace(options, kernel=KernelChoice(options.blobs.kernel, None, options.blobs.kernel.name))
    output = Path(os.path.realpath(options.output))
    if output.exists() and not output.is_file():
        raise BuildError(f"{options.output}: not a regular file, expected one or none")
    path = options.kernel.path
    try:
        kernel_file = path.open("rb")
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    with kernel_file, ExitStack() as files:
        kernel = open_kernel(kernel_file, path)
        source = files.enter_context(
            open_source(
                options.source,
                arch=kernel.arch,
                keep_owners=options.keep_owners,
                scratch=output.parent,
                access=options.access,
                locked=options.locked,
            )
        )
        epoch = _build_time(options, source)
        sections, inputs, warnings = _sections(options, kernel, source, epoch)
        lock = Lock(__version__, epoch, inputs, {})
        if options.locked:
            check_inputs(options.locked, lock)
        with replacing(output) as out:
            written = write(out, sections, arch=kernel.arch, sign=options.sign)
            lock = replace(lock, measurements=measured(written.measurements, options.pcr8))
            if options.locked:
                check_measurements(options.locked, lock)
    return BuildResult(
        path=options.output,
        arch=kernel.arch,
        size=written.size,
        crc=written.crc,
        measurements=written.measurements,
        warnings=(*source.warnings, *warnings),
        lock=lock,
        sections=tuple(zip(SECTIONS, (section.content.size for section in sections), strict=True)),
    )


def _sections(
    options: BuildOptions, kernel: Kernel, source: Source, epoch: int
) -> tuple[list[Section], tuple[Input, ...], list[str]]:
    if options.arch not in (None, kernel.arch):
        raise KernelError(f"{options.kernel.path}: a kernel for {kernel.arch}, expected one for {options.arch}")
    first: Content
    second: Content
    missing: tuple[str, ...] = ()
    if options.blobs:
        first, second = options.blobs.first_ramdisk(), second_ramdisk(source, options.application)
        program = command_of(options.application, source.container.config if source.container else None)[0]
        cmdline, configuration, programs = options.blobs.cmdline, b"", options.blobs.programs()
    else:
        source.tree.clamp(epoch)
        config = init_config(options.application, source.container.config if source.container else None, source.tree)
        program, cmdline, configuration = config.arguments[0], DEFAULT_CMDLINES[kernel.arch], config.encode()
        modules = resolve(options.kernel.modules, arch=kernel.arch, release=kernel.release)
        init = init_program(kernel.arch) if options.init is None else options.init
        first, second = boot_ramdisk(init, modules.modules), application_ramdisk(source.tree, configuration)
        programs = {"init": init, **{f"module {one.name}": one.data for one in modules.modules}}
        missing = modules.missing
    measured_cmdline = _cmdline(cmdline if options.cmdline is None else options.cmdline)
    metadata_offset = HEADER_SIZE + 3 * SECTION_HEADER_SIZE + kernel.content.size + len(measured_cmdline)
    try:
        metadata = _metadata(options, program, kernel, source, epoch).encode(metadata_offset)
    except UnicodeEncodeError as error:
        raise BuildError(f"metadata: {error.object[error.start : error.end]!r} is not text in UTF-8") from error
    sections = [
        Section(SectionType.KERNEL, kernel.content),
        Section(SectionType.CMDLINE, BytesContent(measured_cmdline)),
        Section(SectionType.METADATA, BytesContent(metadata)),
        Section(SectionType.RAMDISK, first),
        Section(SectionType.RAMDISK, second),
    ]
    inputs = inputs_of(
        options.source,
        source,
        kernel=Input(KERNEL, f"{options.kernel.name}{options.kernel.made_of}", f"sha384:{kernel.sha384}"),
        programs=programs,
        sections={
            "cmdline": measured_cmdline,
            **({} if options.blobs else {"configuration": configuration}),
            "metadata": metadata,
        },
    )
    return sections, inputs, [f"the kernel has no module {name}: the enclave cannot attest itself" for name in missing]


def _build_time(options: BuildOptions, source: Source) -> int:
    """In seconds since 1970."""
    epoch = options.locked.epoch if options.locked else options.epoch
    if epoch is None:
        epoch = source.default_epoch if source.default_epoch is not None else source.tree.newest()
    if not 0 <= epoch <= MAX_TIME:
        raise UsageError(f"epoch {epoch}: expected seconds since 1970, at most {MAX_TIME}")
    return epoch


def _cmdline(text: str) -> bytes:
    data = text_bytes(text)
    if not text.isprintable() or not text.isascii():
        raise BuildError(f"command line {text[:64]!r}: expected printable ASCII")
    if not 0 < len(data) <= MAX_CMDLINE_SIZE:
        raise BuildError(f"command line: {len(data)} bytes, expected 1 to {MAX_CMDLINE_SIZE}")
    return data


def _metadata(options: BuildOptions, program: bytes, kernel: Kernel, source: Source, epoch: int) -> Metadata:
    image_id = source.container.config_digest.hex if source.container else DEFAULT_VERSION
    return Metadata(
        # Not the file's name: the image must not depend on where it is made.
        image_name=options.name or shown(program.rpartition(b"/")[2]),
        image_version=options.version or (image_id if options.docker_info else DEFAULT_VERSION),
        build=BuildInfo(
            time=datetime.fromtimestamp(epoch, UTC).isoformat(),
            tool="enclavekit",
            tool_version=__version__,
            operating_system="Linux",
            kernel_version=kernel.release or options.kernel.name,
        ),
        kernel=KernelInfo(options.kernel.name, kernel.sha384, kernel.discovery),
        docker_info=_docker_info(source.container) if options.docker_info and source.container else None,
        custom=options.custom,
        container=str(source.container.config_digest) if source.container else None,
    )


def _docker_info(image: ContainerImage) -> dict[str, Any]:
    """As much of ``docker inspect`` as the image itself says; nothing in it depends on where it is."""
    config = image.config
    said = {
        "Cmd": list(config.command),
        "Entrypoint": list(config.entrypoint),
        "Env": list(config.environment),
        "User": config.user,
        "WorkingDir": config.workdir,
    }
    return {
        "Architecture": config.architecture,
        "Config": {name: value for name, value in said.items() if value},
        "Id": str(image.config_digest),
        "Os": config.os or "linux",
    }
