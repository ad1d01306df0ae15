# SPDX-License-Identifier: Apache-2.0
"""The runtime's directory: QEMU, a guest kernel and other packages, unpacked from the distribution's own mirror.

    ROOT/manifest.json             what is installed (manifest.py)
    ROOT/qemu-VERSION/             trees, each moved here whole
    ROOT/kernel-VERSION/
    ROOT/lock                      held while anything here changes
    ROOT/apt/ ROOT/staging/        while installing; what was downloaded stays in apt/ until it is unpacked

What is already there is not fetched again: with everything installed no network is touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from enclavekit.errors import FileError, NoQemuError, RuntimeInstallError, UnsupportedHostError
from enclavekit.linux.locks import locked, try_lock
from enclavekit.runtime.apt import MIB, Apt, Download, Host, sha256_of
from enclavekit.runtime.distribution import BY_HAND, SETS, Distribution, OsRelease, distribution_of
from enclavekit.runtime.find import OLDEST, dotted, installed_kernel, installed_qemu, probe
from enclavekit.runtime.manifest import FILE, Component, read_manifest, write_manifest
from enclavekit.runtime.sources import choose_source, read_sources

LISTS_SPACE = 150 * MIB
UNPACKED_RATIO = 8
"""Space for a package and all that is in it, for each byte of it; compressed seven to one at most so far."""

UNFIT = re.compile(r'["\n:;]')
"""apt.conf knows no escape for quotation marks; the others separate the directories of a library path."""

KERNEL_PARTS = re.compile(r"linux-(?:image|modules)-[0-9].*")
QEMU_FILES = (
    "usr/bin/qemu-system-x86_64",
    "usr/lib/x86_64-linux-gnu/*.so*",
    "usr/lib/x86_64-linux-gnu/qemu",
    "usr/share/qemu",
    "usr/share/seabios",
)
KERNEL_FILES = ("boot/vmlinuz-*", "boot/config-*", "usr/lib/modules", "lib/modules")
PACKAGE_FILES = ("*",)
SET_PACKAGE = re.compile(r"gcc-[0-9]{1,3}|python3-minimal")
"""Whose version a set has."""


class Stage(StrEnum):
    """What an installation is doing."""

    WAITING = "waiting"
    LISTS = "package lists"
    DOWNLOAD = "download"
    UNPACK = "unpack"
    COMPILE = "compile"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an installation is."""

    stage: Stage
    text: str
    """For people: what it is about, how much it is."""

    fraction: float | None = None
    """Of this stage, 0 to 1; None where it cannot be known."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A component that is there, or was."""

    component: Component
    path: Path
    usable: bool
    """False where files of it have gone: the next installation brings it again."""


ReportProgress = Callable[[Progress], None]


class Runtime:
    """The runtime in ``root``. Errors of all methods: ``RuntimeInstallError``, ``UnsupportedHostError``, ``FileError``,
    ``FormatError`` for a damaged manifest."""

    def __init__(self, root: Path, host: Host | None = None) -> None:
        self._root = root.absolute()
        self._host = host or Host()

    def show(self) -> list[Installed]:
        """Everything that is installed, by name."""
        components = read_manifest(self._root).values()
        return [Installed(item, self._root / item.directory, self._usable(item)) for item in components]

    def install(
        self,
        report: ReportProgress | None = None,
        want: Sequence[str] = ("qemu", "kernel"),
        *,
        newest: bool = False,
    ) -> list[Installed]:
        """Bring what is wanted and not there: ``qemu``, ``kernel``, one of ``SETS``, or a package, all of it.

        With ``newest``, also what is there in another version than the mirror has now.
        """
        try:
            with self._exclusive(report or (lambda _: None)) as tell:
                shutil.rmtree(self._staging, ignore_errors=True)
                components = read_manifest(self._root)
                lacking = [
                    name for name in want if newest or name not in components or not self._usable(components[name])
                ]
                if lacking:
                    self._install(lacking, components, tell)
        except OSError as error:
            raise FileError.of(error, error.filename or self._root, "write") from error
        return [item for item in self.show() if item.component.name in want]

    def install_package(self, name: str, report: ReportProgress | None = None) -> Path:
        """The directory in which the distribution's package ``name`` lies unpacked, without what it depends on."""
        return self.install(report, [name])[0].path

    def remove(self) -> None:
        """Take everything away, whatever state it is in; enclaves that run are not disturbed."""
        if not self._root.is_dir():
            return
        try:
            with self._exclusive(lambda _: None):
                (self._root / FILE).unlink(missing_ok=True)
                for path in self._root.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
        except OSError as error:
            raise FileError.of(error, error.filename or self._root, "remove") from error

    @property
    def _staging(self) -> Path:
        return self._root / "staging"

    @contextlib.contextmanager
    def _exclusive(self, report: ReportProgress) -> Iterator[ReportProgress]:
        self._root.mkdir(parents=True, exist_ok=True)
        lock = self._root / "lock"
        fd = try_lock(lock)
        if fd is None:
            report(Progress(Stage.WAITING, "another enclave command is changing the runtime"))
            with locked(lock):
                yield report
            return
        try:
            yield report
        finally:
            os.close(fd)

    def _usable(self, component: Component) -> bool:
        path = self._root / component.directory
        if component.name == "qemu":
            return installed_qemu(path, component.version) is not None
        if component.name == "kernel":
            return installed_kernel(self._root, component) is not None
        return path.is_dir()

    def _install(self, names: Sequence[str], components: dict[str, Component], report: ReportProgress) -> None:
        self._host.check()
        if match := UNFIT.search(str(self._root)):
            raise RuntimeInstallError(
                f"{self._root}: holds {match[0]!r}, which apt or the dynamic loader cannot take in a path",
                hint="set XDG_DATA_HOME to another directory",
            )
        release = OsRelease.read(self._host.os_release)
        distribution = distribution_of(release)
        suites = {*release.suites, *distribution.suites}
        source = choose_source(read_sources(self._host.etc), suites, distribution.keyring)
        if source is None:
            raise UnsupportedHostError(
                f"{self._host.etc}: apt has no source with the component main of a suite of {release.name}",
                hint=f"add one (sources.list(5)), or {BY_HAND}",
            )
        self._need(LISTS_SPACE)
        apt = Apt(self._root / "apt", self._host)
        try:
            apt.prepare(source, distribution.suites, distribution.keyring)
            report(Progress(Stage.LISTS, source.uri, 0.0))
            apt.update(lambda fraction: report(Progress(Stage.LISTS, source.uri, fraction)))
            for name in names:
                before = components.get(name)
                components[name] = self._bring(name, before, distribution, apt, report)
                write_manifest(self._root, components)
                if before is not None and before.directory != components[name].directory:
                    shutil.rmtree(self._root / before.directory, ignore_errors=True)
            shutil.rmtree(apt.archives)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            apt.clean()

    def _bring(
        self, name: str, there: Component | None, distribution: Distribution, apt: Apt, report: ReportProgress
    ) -> Component:
        suite = distribution.suites[0]
        files: Sequence[str] = PACKAGE_FILES
        if name == "qemu":
            suite, files = distribution.qemu_suite, QEMU_FILES
            downloads = apt.plan([distribution.qemu], suite)
        elif name == "kernel":
            files = KERNEL_FILES
            downloads = apt.plan(_kernel_packages(distribution.kernel, apt))
        elif name in SETS:
            downloads = apt.plan(SETS[name], suite)
        else:
            downloads = apt.plan([name])
        packages = tuple(sorted((item.package for item in downloads), key=lambda package: package.name))
        if there is not None and there.packages == packages and self._usable(there):
            return there
        size = sum(download.package.size for download in downloads)
        self._need(size * UNPACKED_RATIO)
        text = f"{name}: {_count(len(downloads), 'package')}, {size / 1e6:.1f} MB"
        apt.fetch(downloads, lambda fraction: report(Progress(Stage.DOWNLOAD, text, fraction)))
        tree = self._unpack(downloads, apt, files, lambda fraction: report(Progress(Stage.UNPACK, text, fraction)))
        if name == "qemu":
            version = _qemu_version(tree)
        elif name == "kernel":
            version = _kernel_name(tree)
        else:
            main = SET_PACKAGE if name in SETS else re.compile(re.escape(name))
            version = next(item.package.version for item in downloads if main.fullmatch(item.package.name))
        directory = f"{name}-{version.replace(':', '.')}"
        target = self._root / directory
        if target.exists():
            shutil.rmtree(target)  # not in the manifest, or damaged
        tree.rename(target)
        return Component(
            name=name,
            version=version,
            directory=directory,
            suite=suite,
            installed=datetime.now(UTC).isoformat(timespec="seconds"),
            packages=packages,
        )

    def _unpack(
        self, downloads: Sequence[Download], apt: Apt, patterns: Sequence[str], report: Callable[[float], None]
    ) -> Path:
        """A tree of what ``patterns`` choose of all files of all packages."""
        shutil.rmtree(self._staging, ignore_errors=True)
        whole, chosen = self._staging / "whole", self._staging / "chosen"
        whole.mkdir(parents=True)
        chosen.mkdir()
        for index, download in enumerate(downloads):
            report(index / len(downloads))
            self._unpack_one(apt.archives / download.file, download, whole)
        report(1.0)
        for pattern in patterns:
            for path in whole.glob(pattern):
                target = chosen / path.relative_to(whole)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        return chosen

    def _unpack_one(self, file: Path, download: Download, target: Path) -> None:
        digest = sha256_of(file)
        if digest != download.package.sha256:
            raise RuntimeInstallError(
                f"{download.package.name}: SHA-256 {digest}, expected {download.package.sha256}", hint="try again"
            )
        done = subprocess.run(
            [self._host.dpkg_deb, "-x", file, target], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        if done.returncode != 0:
            said = " ".join(done.stderr.decode(errors="replace").split())
            if "No space left on device" in said:
                raise FileError(f"{target}: disk full")
            raise RuntimeInstallError(f"{download.package.name}: cannot be unpacked: {said}")

    def _need(self, size: int) -> None:
        free = self._host.free_space(self._root)
        if free < size:
            raise FileError(
                f"{self._root}: {free // MIB} MiB free, need {-(-size // MIB)} MiB",
                hint="make room, or set XDG_DATA_HOME to a directory that has it",
            )


def _kernel_packages(meta: str, apt: Apt) -> list[str]:
    """The real packages behind the one that always depends on the newest kernel: image and modules."""
    found = [name for name in apt.depends(meta) if KERNEL_PARTS.fullmatch(name)]
    for name in tuple(found):
        found += [part for part in apt.depends(name) if KERNEL_PARTS.fullmatch(part) and part not in found]
    if not found:
        raise RuntimeInstallError(f"{meta}: depends on no kernel")
    return found


def _qemu_version(tree: Path) -> str:
    """Try the unpacked program."""
    qemu = installed_qemu(tree, "0.0.0")
    if qemu is None:
        raise RuntimeInstallError("qemu: the packages hold no qemu-system-x86_64")
    try:
        version = probe(qemu.command, qemu.environment)
    except NoQemuError as error:
        raise RuntimeInstallError(f"qemu: does not run here: {error.message}") from error
    if version < OLDEST:
        raise RuntimeInstallError(
            f"qemu: the mirror has {dotted(version)}, expected {OLDEST[0]}.{OLDEST[1]} or newer", hint=BY_HAND
        )
    return dotted(version)


def _kernel_name(tree: Path) -> str:
    names = [path.name.removeprefix("vmlinuz-") for path in (tree / "boot").glob("vmlinuz-*")]
    if len(names) != 1 or not any((tree / lib / names[0]).is_dir() for lib in ("usr/lib/modules", "lib/modules")):
        raise RuntimeInstallError(f"kernel: the packages hold {len(names)} kernels, expected one and its modules")
    return names[0]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
