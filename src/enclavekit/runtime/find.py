# SPDX-License-Identifier: Apache-2.0
"""Which QEMU and which guest kernel to use: what the caller names, else what is installed, else (QEMU) what PATH has.

QEMU before 10.2 has no NSM device, and 7.2 corrupts one boot in three under TCG. The installed QEMU runs through its
own dynamic loader with its own libraries only, so it needs nothing of the host's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from enclavekit.errors import NoKernelError, NoQemuError
from enclavekit.runtime.manifest import Component, read_manifest

PROGRAM = "qemu-system-x86_64"
OLDEST = (10, 2, 0)
VERSION_TIMEOUT_S = 20.0
LIBRARIES = Path("usr/lib/x86_64-linux-gnu")
HINT = "enclave runtime install"

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU that runs here."""

    command: tuple[str, ...]
    """What stands before QEMU's own options."""

    version: Version
    environment: Mapping[str, str] = field(default_factory=dict)
    """What it needs beside the caller's own environment."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A guest kernel."""

    name: str
    path: Path
    modules: Path | None
    """Its lib/modules/VERSION; None where all that it needs is built in."""


def find_qemu(root: Path, override: str | None = None, path: str = "") -> Qemu:
    """``override`` of any version, else the runtime's, else the first in ``path`` (a PATH) when it is new enough.

    Only an override or one in ``path`` is run to learn its version. Errors: ``NoQemuError``.
    """
    if override is not None:
        return _named(override, path)
    component = read_manifest(root).get("qemu")
    if component is not None and (qemu := installed_qemu(root / component.directory, component.version)):
        return qemu
    program = shutil.which(PROGRAM, path=path)
    if program is None:
        raise NoQemuError("no QEMU: none is installed by enclave, and PATH has none", hint=HINT)
    version = probe((program,))
    if version < OLDEST:
        raise NoQemuError(
            f"{program}: QEMU {dotted(version)}, expected {OLDEST[0]}.{OLDEST[1]} or newer, and none is installed by "
            "enclave",
            hint=HINT,
        )
    return Qemu((program,), version)


def _named(override: str, path: str) -> Qemu:
    program = shutil.which(override, path=path)
    if program is None:
        raise NoQemuError(f"{override}: no such program", hint="name a qemu-system-x86_64")
    return Qemu((program,), probe((program,)))


def installed_qemu(directory: Path, version: str) -> Qemu | None:
    """The QEMU unpacked in ``directory``, or None where its files are gone."""
    program, libraries = directory / "usr/bin" / PROGRAM, directory / LIBRARIES
    loader = libraries / "ld-linux-x86-64.so.2"
    if not (program.is_file() and loader.is_file()):
        return None
    command = [str(loader), "--inhibit-cache", "--library-path", str(libraries), str(program)]
    for firmware in ("qemu", "seabios"):
        command += ["-L", str(directory / "usr/share" / firmware)]
    parsed = parse_version(version)
    return Qemu(tuple(command), parsed, {"QEMU_MODULE_DIR": str(libraries / "qemu")}) if parsed else None


def probe(command: tuple[str, ...], environment: Mapping[str, str] | None = None) -> Version:
    """The version that ``command --version`` says. Errors: ``NoQemuError``."""
    try:
        done = subprocess.run(
            [*command, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=VERSION_TIMEOUT_S,
            env=None if environment is None else dict(environment),
            check=False,
        )
    except OSError as error:
        raise NoQemuError(f"{command[0]}: cannot be run: {(error.strerror or str(error)).lower()}") from error
    except subprocess.TimeoutExpired:
        raise NoQemuError(f"{command[0]}: no answer to --version within {VERSION_TIMEOUT_S:.0f} s") from None
    said = done.stdout[:4096].decode(errors="replace")
    version = parse_version(said, "QEMU emulator version ")
    if version is None:
        first = (said.strip().splitlines() or ["nothing"])[0]
        raise NoQemuError(f"{command[0]}: --version says {first[:120]!r}, expected QEMU emulator version")
    return version


def parse_version(text: str, before: str = "") -> Version | None:
    """The three numbers at the start of ``text``, after the words ``before``."""
    match = re.match(re.escape(before) + r"([0-9]{1,4})\.([0-9]{1,4})\.([0-9]{1,4})", text)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def dotted(version: Version) -> str:
    """``11.1.0``."""
    return ".".join(str(number) for number in version)


def find_kernel(root: Path, kernel: str | None = None, modules: str | None = None) -> Kernel:
    """The kernel named, with the modules named or none; else the runtime's, with its own unless others are named.

    Errors: ``NoKernelError``.
    """
    directory = None if modules is None else Path(modules)
    if directory is not None and not directory.is_dir():
        raise NoKernelError(f"{modules}: no such directory", hint="name the lib/modules/VERSION of the kernel")
    if kernel is not None:
        path = Path(kernel)
        if not path.is_file():
            raise NoKernelError(f"{kernel}: no such file", hint="name a bzImage")
        return Kernel(path.name, path, directory)
    component = read_manifest(root).get("kernel")
    found = None if component is None else installed_kernel(root, component)
    if found is None:
        raise NoKernelError("no guest kernel: none is installed by enclave, and none is named", hint=HINT)
    return found if directory is None else Kernel(found.name, found.path, directory)


def installed_kernel(root: Path, component: Component) -> Kernel | None:
    """The kernel unpacked below ``root``, or None where its files are gone."""
    directory = root / component.directory
    path = directory / "boot" / f"vmlinuz-{component.version}"
    modules = next((at for at in (directory / "usr/lib/modules", directory / "lib/modules") if at.is_dir()), None)
    if not path.is_file() or modules is None or not (modules / component.version).is_dir():
        return None
    return Kernel(component.version, path, modules / component.version)
