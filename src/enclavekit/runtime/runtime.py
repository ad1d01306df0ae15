# SPDX-License-Identifier: Apache-2.0
"""The runtime: a QEMU that is new enough and the default guest kernel, in a directory of the user's own.

<root>/manifest.json    what is installed; replaced last, so a half-made installation is none
<root>/qemu-<id>/       QEMU and the libraries it needs
<root>/kernel-<id>/     kernel and modules
<root>/lock             held while installing
<root>/apt/             apt's own state while installing; downloads that were cut off
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enclavekit.errors import FileError, MissingError, NoKernelError, NoQemuError, RuntimeInstallError
from enclavekit.linux.locks import locked
from enclavekit.runtime.apt import Apt, Package, Progress
from enclavekit.runtime.debian import BY_HAND, Mirror, system_mirror

MANIFEST = "manifest.json"
SCHEMA = 1
OLDEST_QEMU = (10, 2, 0)
"""Older ones have no device for the security module, and some corrupt the guest under TCG."""

QEMU_PACKAGE = "qemu-system-x86"
KERNEL_PACKAGES = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
SUITES = {
    # distribution: (suites to have QEMU from, the preferred one, suites to have the kernel from)
    "debian": (("trixie", "trixie-backports"), "trixie-backports", ("trixie",)),
    "ubuntu": (("resolute", "resolute-updates"), None, ("resolute", "resolute-updates")),
}
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
LOADERS = ("usr/lib64/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2")
FIRMWARE = ("usr/share/qemu", "usr/share/seabios")
VERSION = re.compile(r"QEMU emulator version (\d+)\.(\d+)\.(\d+)")
INSTALL = "enclave runtime install brings QEMU and a kernel, without root; or name your own with --qemu and --kernel"


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU that can be run: ``command`` is what stands before its options."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    version: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A guest kernel; ``modules`` is its lib/modules/VERSION, or None when it needs none."""

    path: Path
    modules: Path | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Runtime:
    """What is installed under ``root``."""

    root: Path

    def manifest(self) -> dict[str, Any] | None:
        """What ``install`` wrote; None where nothing (usable) is installed."""
        try:
            manifest = json.loads((self.root / MANIFEST).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            return None
        parts = [self.root / manifest[part]["directory"] for part in ("qemu", "kernel")]
        return manifest if all(part.is_dir() for part in parts) else None

    def qemu(self) -> Qemu | None:
        """The installed QEMU."""
        manifest = self.manifest()
        if manifest is None:
            return None
        version = tuple(manifest["qemu"]["version"])
        return _unpacked_qemu(self.root / manifest["qemu"]["directory"], (version[0], version[1], version[2]))

    def kernel(self) -> Kernel | None:
        """The installed kernel."""
        manifest = self.manifest()
        if manifest is None:
            return None
        return _unpacked_kernel(self.root / manifest["kernel"]["directory"])

    def install(self, environment: Mapping[str, str], progress: Callable[[Progress], None]) -> dict[str, Any]:
        """Download, check, unpack, try; nothing if it is there already. Returns the manifest.

        Errors: ``RuntimeInstallError``, ``MissingError``, ``FileError``. A second one at the same time waits.
        """
        mirror = system_mirror()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            progress(Progress("waiting for another installation"))
            with locked(self.root / "lock"):
                return self.manifest() or self._install(environment, mirror, progress)
        except OSError as error:
            raise FileError.of(error, error.filename or self.root, "install the runtime in") from error

    def _install(
        self, environment: Mapping[str, str], mirror: Mirror, progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
        self._sweep()
        apt = Apt(self.root / "apt", mirror, environment)
        staging = self.root / "staging"
        try:
            suites, preferred, kernel_suites = SUITES[mirror.distribution]
            qemu = staging / "qemu"
            qemu_packages = apt.unpack([QEMU_PACKAGE], suites, qemu, progress, release=preferred)
            version = qemu_version(_unpacked_qemu(qemu, OLDEST_QEMU))
            if version < OLDEST_QEMU:
                raise RuntimeInstallError(
                    f"QEMU {'.'.join(map(str, version))} is the newest of {mirror.distribution}'s archive, "
                    f"expected {'.'.join(map(str, OLDEST_QEMU))} or newer",
                    hint=BY_HAND,
                )
            kernel = staging / "kernel"
            kernel_packages = apt.unpack([KERNEL_PACKAGES[mirror.distribution]], kernel_suites, kernel, progress)
            name = _unpacked_kernel(kernel).name
            manifest = {
                "schema": SCHEMA,
                "qemu": {"version": version, **self._place(qemu, "qemu", qemu_packages)},
                "kernel": {"name": name, **self._place(kernel, "kernel", kernel_packages)},
            }
            beside = self.root / f".{MANIFEST}"
            beside.write_text(json.dumps(manifest, indent=1))
            beside.replace(self.root / MANIFEST)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(self.root / "apt", ignore_errors=True)
        return manifest

    def _place(self, made: Path, kind: str, packages: list[Package]) -> dict[str, Any]:
        """Move an unpacked tree to a place named by its content."""
        listed = [package.as_dict() for package in packages]
        name = f"{kind}-{hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]}"
        shutil.rmtree(self.root / name, ignore_errors=True)
        made.rename(self.root / name)
        return {"directory": name, "packages": listed}

    def _sweep(self) -> None:
        """Remove what an installation that was cut off left, but for its downloads."""
        shutil.rmtree(self.root / "staging", ignore_errors=True)
        for left in [*self.root.glob("qemu-*"), *self.root.glob("kernel-*")]:
            shutil.rmtree(left, ignore_errors=True)

    def packages(self, names: list[str], environment: Mapping[str, str], progress: Callable[[Progress], None]) -> Path:
        """Other packages of the same suite, unpacked under ``root`` once and kept: for examples and tests."""
        target = self.root / f"packages-{'-'.join(names)}"
        if target.is_dir():
            return target
        mirror = system_mirror()
        with locked(self.root / "lock"):
            if not target.is_dir():
                staging = self.root / "staging"
                shutil.rmtree(staging, ignore_errors=True)
                apt = Apt(self.root / "apt", mirror, environment)
                apt.unpack(names, SUITES[mirror.distribution][2], staging, progress)
                staging.rename(target)
                shutil.rmtree(self.root / "apt", ignore_errors=True)
        return target

    def remove(self) -> None:
        """Take everything away again."""
        try:
            if self.root.is_dir():
                with locked(self.root / "lock"):
                    shutil.rmtree(self.root)
        except OSError as error:
            raise FileError.of(error, error.filename or self.root, "remove") from error


def find_qemu(runtime: Runtime, override: str | None, path: str) -> Qemu:
    """``override`` as it is; else the runtime's; else one on ``path`` that is new enough. Errors: ``NoQemuError``."""
    if override is not None:
        found = shutil.which(override, path=path)
        if found is None:
            raise NoQemuError(f"{override}: no such program", hint="--qemu names a qemu-system-x86_64")
        qemu = Qemu((found,), {"PATH": path}, (0, 0, 0))
        return Qemu(qemu.command, qemu.environment, qemu_version(qemu))
    installed = runtime.qemu()
    if installed is not None:
        return installed
    found = shutil.which("qemu-system-x86_64", path=path)
    if found is not None:
        qemu = Qemu((found,), {"PATH": path}, (0, 0, 0))
        version = qemu_version(qemu)
        if version >= OLDEST_QEMU:
            return Qemu(qemu.command, qemu.environment, version)
        raise NoQemuError(
            f"{found} is version {'.'.join(map(str, version))}, expected {'.'.join(map(str, OLDEST_QEMU))} or newer",
            hint=INSTALL,
        )
    raise NoQemuError("no QEMU: none is installed by enclavekit, and none is on PATH", hint=INSTALL)


def find_kernel(runtime: Runtime, override: str | None, modules: str | None) -> Kernel:
    """``override`` with ``modules``, else the runtime's. Errors: ``NoKernelError``."""
    if override is not None:
        return Kernel(Path(override), Path(modules) if modules else None)
    if modules is not None:
        raise NoKernelError("--modules without --kernel: they belong together", hint="name both, or neither")
    installed = runtime.kernel()
    if installed is None:
        raise NoKernelError("no guest kernel: none is installed, and none was named", hint=INSTALL)
    return installed


def qemu_version(qemu: Qemu) -> tuple[int, int, int]:
    """Ask it. Errors: ``NoQemuError``."""
    try:
        done = subprocess.run(
            [*qemu.command, "--version"],
            env=dict(qemu.environment), capture_output=True, text=True, errors="replace", timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoQemuError(f"{qemu.command[0]}: cannot be run: {error}") from error
    match = VERSION.search(done.stdout)
    if done.returncode or match is None:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise NoQemuError(
            f"{qemu.command[0]}: --version does not say that it is QEMU: {said[0] if said else 'nothing'}"
        )
    return int(match[1]), int(match[2]), int(match[3])


def _unpacked_qemu(root: Path, version: tuple[int, int, int]) -> Qemu:
    """Through its own dynamic loader, with its own libraries: the system's may be older."""
    program = root / "usr/bin/qemu-system-x86_64"
    loader = next((root / name for name in LOADERS if (root / name).exists()), None)
    if loader is None or not program.exists():
        raise MissingError(
            f"{root}: QEMU or its dynamic loader is not there", hint="enclave runtime remove, then install"
        )
    libraries = ":".join(str(root / name) for name in LIBRARIES)
    data = [option for name in FIRMWARE for option in ("-L", str(root / name))]
    modules = str(root / LIBRARIES[0] / "qemu")
    command = (str(loader), "--library-path", libraries, str(program), *data)
    return Qemu(command, {"QEMU_MODULE_DIR": modules}, version)


def _unpacked_kernel(root: Path) -> Kernel:
    found = sorted((root / "boot").glob("vmlinuz-*"))
    if not found:
        raise NoKernelError(f"{root}: no kernel in it", hint="enclave runtime remove, then install")
    name = found[-1].name.removeprefix("vmlinuz-")
    modules = next(
        (root / base / name for base in ("usr/lib/modules", "lib/modules") if (root / base / name).is_dir()), None
    )
    return Kernel(found[-1], modules, name)
