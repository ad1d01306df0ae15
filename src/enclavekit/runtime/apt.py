# SPDX-License-Identifier: Apache-2.0
"""The system's apt with state, lists and cache of our own: no root, nothing of the system's is changed.

The system's configuration (proxy, TLS, authentication, retries) stays in force; what could weaken signature checks,
pin versions or run hooks is overruled. The chain of trust: gpgv and the distribution's keyring check InRelease, which
names the digests of the package lists, which name those of the packages; apt checks each, and the last is checked again
when packages are unpacked. Sources: apt.conf(5), sources.list(5), apt-get(8), apt README.progress-reporting.
"""

from __future__ import annotations

import hashlib
import os
import re
import select
import shutil
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from enclavekit.errors import FileError, OfflineError, RuntimeInstallError, UnsupportedHostError
from enclavekit.runtime.distribution import BY_HAND
from enclavekit.runtime.manifest import Package
from enclavekit.runtime.sources import Source

MIB = 1 << 20
RESERVE = 4 * MIB
"""With less space than this, apt is ended: on a full disk it waits for ever instead of failing."""

TICK_S = 1.0
OUTPUT_LIMIT = 4 * MIB

SETTINGS = """\
#clear APT::Architectures;
#clear APT::Default-Release;
#clear APT::Update;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Get::AllowUnauthenticated "false";
APT::Get::Assume-Yes "true";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::ForceHash "SHA256";
Acquire::GzipIndexes "false";
Acquire::Languages "none";
Acquire::PDiffs "false";
Acquire::Retries "2";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Etc::preferences "/dev/null";
Dir::Etc::sourcelist "/dev/null";
"""

URI_LINE = re.compile(
    r"'(?P<uri>[^']+)' (?P<name>[a-z0-9][a-z0-9+.-]*)_(?P<version>[A-Za-z0-9.+~%-]+)_(?:amd64|all)\.deb "
    r"(?P<size>[0-9]{1,12}) SHA256:(?P<sha256>[0-9a-f]{64})"
)
PROGRESS_LINE = re.compile(r"(?:dlstatus|pmstatus):[^:]*:(?P<percent>[0-9.]+):")
OFFLINE = re.compile(
    r"(?:failure resolving|Could not resolve|Could not connect|Unable to connect|Connection failed|timed out"
    r"|Network is unreachable|No route to host|Connection refused)"
)
UNSIGNED = re.compile(r"NO_PUBKEY|[Mm]issing key|signatures? .*verif|OpenPGP|is not signed|signed-by|EXPKEYSIG")


@dataclass(frozen=True, slots=True)
class Host:
    """What is used of this system."""

    apt_get: Path = Path("/usr/bin/apt-get")
    apt_cache: Path = Path("/usr/bin/apt-cache")
    apt_helper: Path = Path("/usr/lib/apt/apt-helper")
    dpkg_deb: Path = Path("/usr/bin/dpkg-deb")
    etc: Path = Path("/etc/apt")
    os_release: Path = Path("/etc/os-release")
    machine: str = field(default_factory=lambda: os.uname().machine)
    free_space: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free

    def check(self) -> None:
        """Errors: ``UnsupportedHostError``."""
        if self.machine != "x86_64":
            raise UnsupportedHostError(f"the runtime cannot be installed on {self.machine}: expected x86_64")
        for program in (self.apt_get, self.apt_cache, self.apt_helper, self.dpkg_deb):
            if not program.exists():
                raise UnsupportedHostError(
                    f"the runtime cannot be installed without apt: {program} does not exist", hint=BY_HAND
                )


@dataclass(frozen=True, slots=True)
class Download:
    """A package, and where it is."""

    package: Package
    uri: str

    @property
    def file(self) -> str:
        """A name that only these bytes have."""
        return f"{self.package.name}-{self.package.sha256[:16]}.deb"


Report = Callable[[float], None]


class Apt:
    """One private apt, in ``directory``. Errors of all methods: ``RuntimeInstallError``, ``FileError``."""

    def __init__(self, directory: Path, host: Host) -> None:
        self._directory = directory
        self._host = host
        self._configuration = directory / "apt.conf"
        self.archives = directory / "archives"

    def prepare(self, source: Source, suites: Sequence[str], keyring: Path) -> None:
        """Write the configuration: package lists of ``suites`` from the mirror of ``source``."""
        self._keyring = keyring
        sources = self._directory / "sources"
        for path in (sources, self._directory / "preferences", self.archives, self._directory / "cache"):
            path.mkdir(parents=True, exist_ok=True)
        (self._directory / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (self._directory / "status").write_text("")
        paths = {
            "Dir::State": "state",
            "Dir::State::lists": "lists",
            "Dir::State::status": "status",
            "Dir::Cache": "cache",
            "Dir::Etc::sourceparts": "sources",
            "Dir::Etc::preferencesparts": "preferences",
        }
        settings = [f'{name} "{self._directory / path}";\n' for name, path in paths.items()]
        self._configuration.write_text(SETTINGS + "".join(settings))
        (sources / "mirror.sources").write_text(
            f"Types: deb\nURIs: {source.uri}\nSuites: {' '.join(suites)}\nComponents: main\n"
            f"Architectures: amd64\nTargets: Packages\nSigned-By: {source.signed_by or keyring}\n"
        )

    def update(self, report: Report) -> None:
        """Fetch and check the package lists."""
        self._run(self._host.apt_get, "update", report=report)

    def plan(self, packages: Sequence[str], suite: str | None = None) -> list[Download]:
        """What to fetch for ``packages``: with ``suite``, all that they depend on, else only themselves."""
        words = ["--print-uris", "download"] if suite is None else ["--print-uris", "-t", suite, "install"]
        output = self._run(self._host.apt_get, *words, *packages)
        downloads = []
        for match in URI_LINE.finditer(output):
            version = urllib.parse.unquote(match["version"])
            package = Package(match["name"], version, int(match["size"]), match["sha256"])
            downloads.append(Download(package, match["uri"]))
        missing = set(packages) - {download.package.name for download in downloads}
        if missing:
            raise RuntimeInstallError(f"apt-get: says nothing about the package {min(missing)}")
        return downloads

    def depends(self, package: str) -> list[str]:
        """Names of the packages that the candidate of ``package`` depends on."""
        output = self._run(self._host.apt_cache, "show", "--no-all-versions", package)
        match = re.search(r"^Depends: (.*)$", output, re.MULTILINE)
        return re.findall(r"(?:^|[,|]) *([a-z0-9][a-z0-9+.-]*)", match[1]) if match else []

    def fetch(self, downloads: Sequence[Download], report: Report) -> None:
        """Get all files into ``archives``; what is there already stays, one that was begun before is gone on with."""
        words: list[str] = []
        for download in downloads:
            file = self.archives / download.file
            if not file.exists() or sha256_of(file) != download.package.sha256:
                words += [download.uri, str(file), f"SHA256:{download.package.sha256}"]
        if words:
            self._run(self._host.apt_helper, "download-file", *words, report=report)

    def clean(self) -> None:
        """Remove all but packages that are wholly or partly there: a later ``fetch`` goes on from them."""
        for path in self._directory.iterdir():
            if path.is_dir() and path != self.archives:
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()
        for path in (self.archives, self._directory):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def _run(self, program: Path, *words: str, report: Report | None = None) -> str:
        """Run one of apt's programs to its end and return its stdout."""
        what = f"{program.name} {next((word for word in words if word[0] != '-'), '')}"
        with (
            (self._directory / "stdout").open("w+b") as stdout,
            (self._directory / "stderr").open("w+b") as stderr,
            _pipe() as (read_end, write_end),
        ):
            command = ["/usr/bin/env", "LC_ALL=C", str(program), "-c", str(self._configuration), "-q"]
            process = subprocess.Popen(
                [*command, "-o", f"APT::Status-Fd={write_end.fileno()}", *words],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[write_end.fileno()],
                cwd=self._directory,
            )
            write_end.close()
            try:
                self._watch(read_end.fileno(), report)
                status = process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            stdout.seek(0)
            stderr.seek(0)
            output = stdout.read(OUTPUT_LIMIT).decode(errors="replace")
            if status != 0:
                raise self._failure(what, stderr.read(OUTPUT_LIMIT).decode(errors="replace") + "\n" + output)
            return output

    def _watch(self, status_fd: int, report: Report | None) -> None:
        """Pass progress on until apt closes its end of the pipe."""
        pending = b""
        poll = select.poll()
        poll.register(status_fd, select.POLLIN)
        while True:
            ready = poll.poll(TICK_S * 1000)
            if self._host.free_space(self._directory) < RESERVE:
                raise FileError(f"{self._directory}: disk full")
            if not ready:
                continue
            data = os.read(status_fd, 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                match = PROGRESS_LINE.match(line.decode(errors="replace"))
                if match and report is not None:
                    report(min(float(match["percent"]) / 100, 1.0))
            pending = pending[-4096:]

    def _failure(self, what: str, output: str) -> RuntimeInstallError | FileError:
        lines = [" ".join(line.split()) for line in output.splitlines()]
        told = [line[3:] for line in lines if line.startswith("E: ")] or [line for line in lines if line] or ["failed"]

        def one(pattern: re.Pattern[str]) -> str | None:
            return next((line for line in told if pattern.search(line)), None)

        if "No space left on device" in output:
            return FileError(f"{self._directory}: disk full")
        if line := one(OFFLINE):
            return OfflineError(
                f"{what}: {_lower(line)}", hint="connect this machine to its package mirror, then try again"
            )
        if line := one(UNSIGNED):
            return RuntimeInstallError(
                f"{what}: {_lower(line)}",
                hint=f"the keyring is missing or too old: upgrade the package that holds {self._keyring}",
            )
        return RuntimeInstallError(f"{what}: {_lower(told[0])}")


def sha256_of(path: Path) -> str:
    """In hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _pipe() -> Iterator[tuple[FileIO, FileIO]]:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    with FileIO(read_fd, "r") as read_end, FileIO(write_fd, "w") as write_end:
        yield read_end, write_end


def _lower(line: str) -> str:
    return line[:1].lower() + line[1:].rstrip(".")
