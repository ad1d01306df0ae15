# SPDX-License-Identifier: Apache-2.0
"""Packages by the system's own apt, without root: private state, lists and cache, signatures checked by apt as ever.

Nothing is installed: archives are downloaded for an empty system, dependencies and all, and unpacked into a directory.
Sources: apt-get(8), apt.conf(5), README.progress-reporting of apt.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from enclavekit.errors import MissingError, RuntimeInstallError
from enclavekit.runtime.debian import BY_HAND, Mirror

OFFLINE = re.compile(
    r"Temporary failure resolving|Could not resolve|Could not connect|Network is unreachable|Connection timed out|"
    r"Unable to connect|Failed to fetch"
)
DISK_FULL = re.compile(r"No space left on device|don't have enough free space")


class OfflineError(RuntimeInstallError):
    """The mirror cannot be reached."""

    code = "offline"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step is: ``fraction`` from 0 to 1, or None where it cannot be told."""

    step: str
    fraction: float | None = None


@dataclass(frozen=True, slots=True)
class Package:
    """An unpacked archive."""

    name: str
    version: str
    sha256: str
    size: int

    def as_dict(self) -> dict[str, str | int]:
        """For the manifest."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256, "size": self.size}


@dataclass(frozen=True, slots=True)
class Apt:
    """apt-get with everything of its own under ``directory``; ``environment`` has PATH, and proxies if any."""

    directory: Path
    mirror: Mirror
    environment: Mapping[str, str]

    def unpack(
        self,
        packages: Sequence[str],
        suites: Sequence[str],
        target: Path,
        progress: Callable[[Progress], None],
        *,
        release: str | None = None,
    ) -> list[Package]:
        """Download ``packages`` with all they depend on from ``suites``, and unpack them into ``target``.

        ``release`` is preferred over the others. Downloads that were cut off are resumed. Errors:
        ``RuntimeInstallError``, ``MissingError``.
        """
        self._configure(suites)
        what = ", ".join(packages)
        self._run(["update"], lambda fraction: progress(Progress("reading package lists", fraction)))
        # Whatever an earlier, different request left; partial downloads are kept.
        for old in self._archives():
            old.unlink()
        command = ["install", "--yes", "--no-install-recommends", "--download-only"]
        if release is not None:
            command += ["--target-release", release]
        self._run([*command, *packages], lambda fraction: progress(Progress(f"downloading {what}", fraction)))
        archives = self._archives()
        target.mkdir(parents=True, exist_ok=True)
        done = []
        for number, archive in enumerate(archives):
            progress(Progress(f"unpacking {what}", number / len(archives)))
            done.append(self._unpack(archive, target))
        progress(Progress(f"unpacking {what}", 1.0))
        return done

    def _archives(self) -> list[Path]:
        return sorted((self.directory / "cache/archives").glob("*.deb"))

    def _program(self, name: str) -> str:
        found = shutil.which(name, path=self.environment.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
        if found is None:
            raise MissingError(f"no {name} on this system: the runtime comes through it", hint=BY_HAND)
        return found

    def _configure(self, suites: Sequence[str]) -> None:
        """Configuration and sources of our own; the system's proxy and certificate settings stay in force."""
        for part in ("state/lists/partial", "cache/archives/partial"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        (self.directory / "status").touch()
        sources = [f"deb [signed-by={self.mirror.keyring}] {self.mirror.uri} {suite} main\n" for suite in suites]
        (self.directory / "sources.list").write_text("".join(sources))
        here = self.directory
        (here / "apt.conf").write_text(
            f"""\
// Hooks of the system are meant for its own packages.
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Post-Invoke;
Dir::State "{here}/state";
Dir::State::status "{here}/status";
Dir::Cache "{here}/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Etc::sourcelist "{here}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Sandbox::User "";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::GzipIndexes "false";
"""
        )

    def _run(self, arguments: list[str], progress: Callable[[float], None]) -> None:
        """One apt-get, its progress read from a pipe (``APT::Status-Fd``)."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        command = [self._program("apt-get"), "-q", "-o", f"APT::Status-Fd={write_end}", *arguments]
        environment = {**self.environment, "APT_CONFIG": str(self.directory / "apt.conf"), "LC_ALL": "C.UTF-8"}
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[write_end],
            env=environment,
        ) as process:
            os.close(write_end)
            reader = threading.Thread(target=_follow, args=(read_end, progress), daemon=True)
            reader.start()
            output, _ = process.communicate()
            reader.join()
        if process.returncode:
            raise _failure(arguments[0], output)

    def _unpack(self, archive: Path, target: Path) -> Package:
        dpkg = self._program("dpkg-deb")
        for command in (
            ["--extract", str(archive), str(target)],
            ["--show", "--showformat=${Package} ${Version}", str(archive)],
        ):
            done = subprocess.run([dpkg, *command], capture_output=True, text=True, errors="replace", check=False)
            if done.returncode:
                raise _failure("dpkg-deb", done.stderr or f"{archive.name}: failed")
        name, _, version = done.stdout.strip().partition(" ")
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Package(name, version, digest, archive.stat().st_size)


def _follow(fd: int, progress: Callable[[float], None]) -> None:
    """``dlstatus:1:42.5:Retrieving …`` lines until the pipe closes."""
    with os.fdopen(fd, errors="replace") as lines:
        for line in lines:
            fields = line.split(":", 3)
            if fields[0] == "dlstatus" and len(fields) > 2:
                try:
                    progress(min(float(fields[2]) / 100, 1.0))
                except ValueError:
                    continue


def _failure(step: str, output: str) -> RuntimeInstallError:
    """What apt said, in one line."""
    lines = [line.strip() for line in output.splitlines() if line.startswith(("E: ", "Err:", "dpkg-deb: error"))]
    said = (lines[-1] if lines else (output.strip().splitlines() or ["no reason given"])[-1]).removeprefix("E: ")
    if DISK_FULL.search(output):
        return RuntimeInstallError(f"{step}: the disk is full", hint="about 700 MB are needed")
    if OFFLINE.search(output):
        return OfflineError(
            f"{step}: the package mirror cannot be reached: {said}",
            hint="what was downloaded is kept: run it again when the network is back",
        )
    return RuntimeInstallError(f"{step}: {said}")
