# SPDX-License-Identifier: Apache-2.0
"""The job of making an image: source → tree → ramdisks → EIF; the same bytes from the same inputs, anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from enclavekit import __version__, eif
from enclavekit.codec import bzimage
from enclavekit.codec.bzimage import Arch
from enclavekit.codec.init_config import InitConfig
from enclavekit.eif import metadata as eif_metadata
from enclavekit.eif.layout import SectionHeader, SectionType
from enclavekit.eif.writer import NewSection, data_offset
from enclavekit.errors import BuildError, FileError, KernelError
from enclavekit.image import modules, users
from enclavekit.image.init_program import init_program
from enclavekit.image.ramdisk import application_ramdisk, boot_ramdisk
from enclavekit.image.sources import Source

I8042 = "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"
CMDLINES = {
    Arch.X86_64: f"reboot=k panic=1 pci=off console=ttyS0 quiet {I8042} random.trust_cpu=on",
    Arch.AARCH64: "reboot=k panic=1 pci=off console=ttyS0 quiet random.trust_cpu=on",
}
MAX_KERNEL_SIZE = 512 << 20
MAX_CONFIG_TEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class KernelInput:
    """A kernel image, and its modules (None: it has what it needs built in)."""

    path: Path
    modules: Path | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What an image is made of; all of it but the names is measured."""

    source: Source
    kernel: KernelInput
    command: tuple[str, ...]
    environment: tuple[str, ...] = ()
    workdir: str = "/"
    user: str | None = None
    logs: bool = False
    cmdline: str | None = None
    keep_owners: bool = False
    epoch: int | None = None
    """SOURCE_DATE_EPOCH: no file is newer, and the image says that it was built then."""
    arch: Arch | None = None
    """What the image must be for; None: whatever the kernel is for."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What was made."""

    path: Path
    measurements: eif.Measurements
    size: int
    arch: Arch
    kernel: str
    warnings: tuple[str, ...] = field(default=())


def build(options: BuildOptions, output: Path) -> BuildResult:
    """Make the image at ``output``; until all of it is written nothing is there, or what was there before.

    Errors: ``SourceError``, ``KernelError``, ``BuildError``, ``FileError``, ``NoKernelError``.
    """
    with replacing(output) as file:
        return build_into(options, file, output)


def build_into(options: BuildOptions, file: BinaryIO, path: Path) -> BuildResult:
    """The same into a seekable file of the caller's; ``path`` is its name in messages."""
    kernel, info = _kernel(options)
    warnings: list[str] = []
    drivers = modules.load_order(options.kernel.modules, kernel.arch) if options.kernel.modules else []
    if options.kernel.modules and "nsm" not in [name for name, _ in drivers]:
        warnings.append("the kernel has no NSM driver module: attestation works only if it is built in")
    tree = options.source.load(keep_owners=options.keep_owners)
    epoch = options.epoch
    if epoch is None:
        epoch = 0 if options.source.kind == "dir" else tree.newest
    tree.clamp(epoch)
    user = users.look_up(tree, options.user) if options.user else users.User()
    config = InitConfig(
        arguments=_arguments(options.command),
        environment=_environment(options.environment),
        workdir=_workdir(options.workdir),
        uid=user.uid,
        gid=user.gid,
        groups=user.groups,
        logs=options.logs,
    )
    sections = [
        NewSection(SectionType.KERNEL, eif.FileContent.of(options.kernel.path)),
        NewSection(SectionType.CMDLINE, eif.BytesContent(_cmdline(options, kernel))),
    ]
    about = eif.Metadata(
        image_name=options.source.name,
        image_version="1.0",
        build_time=epoch,
        build_tool="enclavekit",
        build_tool_version=__version__,
        kernel_version=kernel.version or "Unknown",
        kernel=info,
    )
    padded = eif_metadata.pad(about.to_json(), data_offset(sections), SectionHeader.LAYOUT.size)
    sections += [
        NewSection(SectionType.METADATA, eif.BytesContent(padded)),
        NewSection(SectionType.RAMDISK, boot_ramdisk(init_program(kernel.arch), drivers)),
        NewSection(SectionType.RAMDISK, application_ramdisk(tree, config)),
    ]
    measurements = eif.write(file, sections, kernel.arch)
    return BuildResult(path, measurements, file.tell(), kernel.arch, info.name, tuple(warnings))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes ``path``'s place when all went well, and leaves nothing when not."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise FileError.of(error, path, "write") from error
    try:
        with os.fdopen(fd, "w+b") as file:
            try:
                yield file
                file.flush()
            except OSError as error:
                raise FileError.of(error, path, "write") from error
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise FileError.of(error, path, "write") from error
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def _kernel(options: BuildOptions) -> tuple[bzimage.Kernel, eif.KernelInfo]:
    path = options.kernel.path
    try:
        with path.open("rb") as file:
            kernel = bzimage.parse(file.read(bzimage.HEAD_SIZE))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha384").hexdigest()
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    except KernelError as error:
        raise KernelError(f"{path}: {error.message}", hint=error.hint) from error
    if options.arch is not None and kernel.arch is not options.arch:
        raise KernelError(f"{path}: a kernel for {kernel.arch.value}, expected {options.arch.value}")
    name = options.kernel.name or kernel.version or path.name
    return kernel, eif.KernelInfo(name, digest, _discovery(path, kernel))


def _discovery(path: Path, kernel: bzimage.Kernel) -> eif.Discovery:
    """By the kernel's configuration where it lies beside it, else by its banner."""
    beside = [path.with_name(f"{path.name}.config"), path.with_name(path.name.replace("vmlinuz", "config", 1))]
    for config in beside:
        if config != path and config.is_file():
            with config.open(errors="replace") as file:
                built_in = "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y" in file.read(MAX_CONFIG_TEXT).splitlines()
            return eif.Discovery.CMDLINE if built_in else eif.Discovery.ACPI
    return eif_metadata.guess_discovery(kernel)


def _cmdline(options: BuildOptions, kernel: bzimage.Kernel) -> bytes:
    text = CMDLINES[kernel.arch] if options.cmdline is None else options.cmdline
    data = text.encode()
    if len(data) > kernel.cmdline_size or b"\0" in data or b"\n" in data:
        raise BuildError(
            f"kernel command line: {len(data)} bytes, expected one line of at most {kernel.cmdline_size}, without NUL"
        )
    return data


def _arguments(command: tuple[str, ...]) -> tuple[bytes, ...]:
    if not command or not command[0]:
        raise BuildError("no command to run in the enclave", hint="give it after --, as in: -- /bin/app argument")
    return tuple(os.fsencode(argument) for argument in command)


def _environment(variables: tuple[str, ...]) -> tuple[bytes, ...]:
    values: dict[bytes, bytes] = {}
    for variable in variables:
        name, equals, _ = variable.partition("=")
        if not name or not equals:
            raise BuildError(f"environment: got {variable!r}, expected NAME=VALUE")
        values[os.fsencode(name)] = os.fsencode(variable)
    return tuple(values.values())


def _workdir(text: str) -> bytes:
    if not text.startswith("/"):
        raise BuildError(f"working directory: got {text!r}, expected an absolute path")
    return os.fsencode(text)
