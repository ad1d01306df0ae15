# SPDX-License-Identifier: Apache-2.0
"""Makes an image: source, tree, ramdisks, EIF. Same inputs, same bytes, for any user, in any directory, at any time.

A build that fails, also one that cannot be signed, leaves what was there before, and no more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from enclavekit import __version__
from enclavekit.codec.init_config import InitConfig
from enclavekit.eif import (
    Arch,
    BuildInfo,
    BytesContent,
    KernelInfo,
    Measurements,
    Metadata,
    Section,
    SectionType,
    Sign,
    write,
)
from enclavekit.eif.layout import HEADER_SIZE, SECTION_HEADER_SIZE
from enclavekit.errors import BuildError, FileError, FormatError, KernelError, UsageError
from enclavekit.image.boot import boot_ramdisk, init_program
from enclavekit.image.kernel import Kernel, open_kernel
from enclavekit.image.modules import resolve
from enclavekit.image.ramdisk import application_ramdisk
from enclavekit.image.sources import Source, open_directory, open_tar
from enclavekit.image.tree import MAX_TIME, shown
from enclavekit.image.users import User, find_user
from enclavekit.linux.atomic import replacing

_I8042 = " i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"
DEFAULT_CMDLINES = {
    Arch.X86_64: f"reboot=k panic=1 pci=off console=ttyS0 quiet{_I8042} random.trust_cpu=on",
    Arch.AARCH64: "reboot=k panic=1 pci=off console=ttyS0 quiet random.trust_cpu=on",
}
MAX_CMDLINE_SIZE = 1792
"""The kernel takes 2047 bytes; the others are for what describes the machine."""
DEFAULT_VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """A kernel's file and its ``lib/modules/<release>``, if it has one. ``name`` goes into the metadata."""

    path: Path
    modules: Path | None
    name: str


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """All that an image is made of.

    ``source`` is ``dir:DIRECTORY`` or ``tar:FILE``. ``epoch``, seconds since 1970, is the build time, and no file is
    newer; None is 0 for directories, and for tars their newest file. ``init`` replaces the package's own. ``sign``
    makes the image's signature.
    """

    source: str
    output: Path
    kernel: KernelChoice
    command: Sequence[str]
    environment: Sequence[str] = ()
    workdir: str = "/"
    user: str | None = None
    logs: bool = False
    keep_owners: bool = False
    cmdline: str | None = None
    arch: Arch | None = None
    epoch: int | None = None
    name: str | None = None
    version: str = DEFAULT_VERSION
    init: bytes | None = None
    sign: Sign | None = None


@dataclass(frozen=True, slots=True)
class BuildResult:
    """The image at ``path``; ``size`` in bytes. ``warnings`` are sentences for whoever built it."""

    path: Path
    arch: Arch
    size: int
    crc: int
    measurements: Measurements
    warnings: tuple[str, ...]


def build(options: BuildOptions) -> BuildResult:
    """Make the image. Whatever goes wrong is an Error, and nothing is left behind."""
    output = Path(os.path.realpath(options.output))
    if output.exists() and not output.is_file():
        raise BuildError(f"{options.output}: not a regular file, expected one or none")
    path = options.kernel.path
    try:
        kernel_file = path.open("rb")
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    with kernel_file, _open_source(options, output.parent) as source:
        kernel = open_kernel(kernel_file, path)
        sections, warnings = _sections(options, kernel, source)
        with replacing(output) as out:
            written = write(out, sections, arch=kernel.arch, sign=options.sign)
    return BuildResult(
        options.output, kernel.arch, written.size, written.crc, written.measurements, (*source.warnings, *warnings)
    )


def _open_source(options: BuildOptions, scratch: Path) -> Source:
    kind, colon, path = options.source.partition(":")
    if not path or not colon or kind not in ("dir", "tar"):
        raise UsageError(
            f"source {options.source!r}: expected dir:DIRECTORY or tar:FILE",
            hint="for example dir:./root, tar:root.tar",
        )
    if kind == "dir":
        return open_directory(Path(path), keep_owners=options.keep_owners)
    return open_tar(Path(path), scratch=scratch)


def _sections(options: BuildOptions, kernel: Kernel, source: Source) -> tuple[list[Section], list[str]]:
    if options.arch not in (None, kernel.arch):
        raise KernelError(f"{options.kernel.path}: a kernel for {kernel.arch}, expected one for {options.arch}")
    epoch = _clamp(options, source)
    config = _config(options, find_user(source.tree, options.user) if options.user else User())
    modules = resolve(options.kernel.modules, arch=kernel.arch, release=kernel.release)
    init = init_program(kernel.arch) if options.init is None else options.init
    cmdline = _cmdline(options.cmdline if options.cmdline is not None else DEFAULT_CMDLINES[kernel.arch])
    metadata_offset = HEADER_SIZE + 3 * SECTION_HEADER_SIZE + kernel.content.size + len(cmdline)
    try:
        metadata = _metadata(options, kernel, epoch).encode(metadata_offset)
    except UnicodeEncodeError as error:
        raise BuildError(f"metadata: {error.object[error.start : error.end]!r} is not text in UTF-8") from error
    sections = [
        Section(SectionType.KERNEL, kernel.content),
        Section(SectionType.CMDLINE, BytesContent(cmdline)),
        Section(SectionType.METADATA, BytesContent(metadata)),
        Section(SectionType.RAMDISK, boot_ramdisk(init, modules.modules)),
        Section(SectionType.RAMDISK, application_ramdisk(source.tree, config)),
    ]
    warnings = [f"the kernel has no module {name}: the enclave cannot attest itself" for name in modules.missing]
    return sections, warnings


def _clamp(options: BuildOptions, source: Source) -> int:
    """Bring the times into bounds; the build time."""
    epoch = options.epoch
    if epoch is None:
        epoch = source.tree.newest() if source.file else 0
    if not 0 <= epoch <= MAX_TIME:
        raise UsageError(f"epoch {epoch}: expected seconds since 1970, at most {MAX_TIME}")
    source.tree.clamp(epoch)
    return epoch


def _config(options: BuildOptions, user: User) -> bytes:
    if not options.command:
        raise UsageError(
            "no command: the image would have nothing to run", hint="put it last: ... -- /bin/app argument"
        )
    # The last one of a name counts, as in a shell.
    environment = {item.partition("=")[0]: item for item in options.environment}
    try:
        return InitConfig(
            arguments=tuple(_bytes(argument) for argument in options.command),
            environment=tuple(_bytes(item) for item in environment.values()),
            workdir=_bytes(options.workdir),
            uid=user.uid,
            gid=user.gid,
            groups=user.groups,
            logs=options.logs,
        ).encode()
    except FormatError as error:
        raise BuildError(error.message) from error


def _cmdline(text: str) -> bytes:
    data = _bytes(text)
    if not text.isprintable() or not text.isascii():
        raise BuildError(f"command line {text[:64]!r}: expected printable ASCII")
    if not 0 < len(data) <= MAX_CMDLINE_SIZE:
        raise BuildError(f"command line: {len(data)} bytes, expected 1 to {MAX_CMDLINE_SIZE}")
    return data


def _metadata(options: BuildOptions, kernel: Kernel, epoch: int) -> Metadata:
    return Metadata(
        # Not the file's name: the image must not depend on where it is made.
        image_name=options.name or shown(_bytes(options.command[0].rpartition("/")[2])),
        image_version=options.version,
        build=BuildInfo(
            time=datetime.fromtimestamp(epoch, UTC).isoformat(),
            tool="enclavekit",
            tool_version=__version__,
            operating_system="Linux",
            kernel_version=kernel.release or options.kernel.name,
        ),
        kernel=KernelInfo(options.kernel.name, kernel.sha384, kernel.discovery),
    )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
