# SPDX-License-Identifier: Apache-2.0
"""The root file system of a lab's parent: the distribution's packages, Python ones from PyPI, and this package.

A ramdisk, made without root. What is large and stays the same is made once for each set of packages and kept by its
digest, as is this package, compiled: under TCG a start from source takes its time, each time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import enclavekit
from enclavekit.errors import BuildError, FileError, MissingError
from enclavekit.image.ramdisk import Ramdisk
from enclavekit.image.sources import open_directory
from enclavekit.linux.locks import locked

REQUIREMENTS = ("click>=8.1", "rich>=13", "cbor2>=6.3", "cryptography>=42", "backports.zstd>=1")
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")
LIBRARY = "usr/lib/python3/dist-packages"
"""Where Debian's Python looks for packages."""
LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = f"{LIBRARIES}/ld-linux-x86-64.so.2"
BUSYBOX = "usr/bin/busybox"

LEFT_OUT = (
    *("boot", "var", "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/share/info"),
    *("usr/share/zoneinfo", "usr/share/perl5", "usr/share/debconf", "usr/share/dpkg", "usr/share/python3"),
    *("usr/lib/python3.*/pydoc_data", "usr/lib/x86_64-linux-gnu/gconv"),
)
"""Of the packages; nothing that programs need."""
KEPT = 4
"""Compiled states of this package that are kept."""

ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:user:/home/user:/bin/bash\n",
    "group": "root:x:0:\ntty:x:5:\nne:x:990:user\nuser:x:1000:\n",
    "hosts": "127.0.0.1 localhost parent\n",
    "hostname": "parent\n",
    "profile": "PS1='\\u@\\h:\\w\\$ '\n",
}
"""With an ordinary user, of the group that may use the device, as nitro-cli's packages have it."""
DIRECTORIES = (
    "etc/nitro_enclaves",
    "home/user",
    "run/nitro_enclaves",
    "tmp",
    "usr/local/bin",
    "var/log/nitro_enclaves",
)
PROGRAM = "#!/usr/bin/python3 -Es\nfrom enclavekit.cli.main import main\nmain()\n"


@dataclass(frozen=True, slots=True)
class System:
    """The system without this package, as a directory and as a ramdisk."""

    directory: Path

    @property
    def root(self) -> Path:
        """Its files."""
        return self.directory / "root"

    @property
    def ramdisk(self) -> Path:
        """All of them, in one archive."""
        return self.directory / "root.cpio"

    def compile(self, directory: Path) -> None:
        """Compile Python files by the Python in there. Errors: BuildError."""
        words = ["-S", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(directory)]
        _run(
            self.root / LOADER, "--library-path", self.root / LIBRARIES, python_of(self.root), *words,
            environment={"PYTHONHOME": str(self.root / "usr")},
        )  # fmt: skip


def make_system(packages: Path, cache: Path, bring: Callable[[Path], None] | None = None) -> System:
    """Of the unpacked ``packages``, below ``cache``; made once. ``bring`` adds Python packages to a root file system:
    ours, from PyPI, unless another is given. Errors: BuildError, MissingError, FileError.
    """
    made = system_of(packages, cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / "lock"):
            if made.ramdisk.exists():
                return made
            with tempfile.TemporaryDirectory(prefix="making-", dir=cache) as directory:
                making = System(Path(directory, "system"))
                _lay_out(packages, making, bring or bring_requirements)
                making.directory.rename(made.directory)
    except (OSError, shutil.Error) as error:
        raise _file_error(error, cache) from error
    return made


def system_of(packages: Path, cache: Path) -> System:
    """Where the system of these packages is, made or not: another when this file is another."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + packages.name.encode()).hexdigest()
    return System(cache / f"system-{digest[:16]}")


def package_ramdisk(system: System, cache: Path) -> Path:
    """This package as it is now, compiled, as a ramdisk; kept by its content. Errors: BuildError, FileError."""
    source = Path(enclavekit.__file__).parent
    try:
        with locked(cache / "lock"):
            os.utime(system.ramdisk)  # it is in use
            ramdisk = cache / f"package-{system.directory.name}-{_digest_of(source)}.cpio"
            if ramdisk.exists():
                os.utime(ramdisk)
                return ramdisk
            with tempfile.TemporaryDirectory(prefix="making-", dir=cache) as directory:
                root = Path(directory, "root")
                package = root / LIBRARY / "enclavekit"
                shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
                for python in package.rglob("*.py"):
                    python.chmod(0o644)
                system.compile(package)
                _write(Path(directory, "package.cpio"), root).rename(ramdisk)
            kept = sorted(cache.glob("package-*.cpio"), key=lambda path: path.stat().st_mtime)
            for old in kept[:-KEPT]:
                old.unlink(missing_ok=True)
    except (OSError, shutil.Error) as error:
        raise _file_error(error, cache) from error
    return ramdisk


def prune(cache: Path, older_than_s: float) -> tuple[int, int]:
    """Take away systems that were not used for that long; how many, and their ramdisks' bytes."""
    count = size = 0
    if not cache.is_dir():
        return 0, 0
    with locked(cache / "lock"):
        for ramdisk in sorted(cache.glob("system-*/root.cpio")):
            status = ramdisk.stat()
            if time.time() - status.st_mtime >= older_than_s:
                shutil.rmtree(ramdisk.parent, ignore_errors=True)
                count, size = count + 1, size + status.st_size
        for package in cache.glob("package-*.cpio"):
            if not (cache / package.name[len("package-") :].rpartition("-")[0]).is_dir():
                package.unlink(missing_ok=True)
    return count, size


def python_of(root: Path) -> Path:
    """The Python of a root file system. Errors: BuildError."""
    found = next(
        (path for path in (root / "usr/bin").glob("python3.*") if re.fullmatch(r"[0-9.]+", path.name[6:])), None
    )
    if found is None:
        raise BuildError(f"{root}: no Python in the packages")
    return found


def _lay_out(packages: Path, system: System, bring: Callable[[Path], None]) -> None:
    root = system.root
    left_out = {path for pattern in LEFT_OUT for path in packages.glob(pattern)}
    shutil.copytree(
        packages, root, symlinks=True,
        ignore=lambda directory, names: {name for name in names if Path(directory, name) in left_out},
    )  # fmt: skip
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, text in ETC.items():
        (root / "etc" / name).write_text(text)
    (root / "etc/mtab").unlink(missing_ok=True)
    program = root / "usr/bin/enclave"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    (root / "usr/bin/python").symlink_to("python3")
    for name in _run(root / BUSYBOX, "--list").split():
        link = root / "usr/bin" / name
        if not link.is_symlink() and not link.exists() and not (root / "usr/sbin" / name).exists():
            link.symlink_to("busybox")
    bring(root)
    system.compile(root / "usr/lib")
    _write(system.ramdisk, root)


def bring_requirements(root: Path) -> None:
    """By pip, for the Python in there. Errors: BuildError, MissingError."""
    if importlib.util.find_spec("pip") is None:
        raise MissingError(
            f"no pip beside {sys.executable}: it brings the parent's Python packages",
            hint="install pip into enclavekit's environment",
        )
    version = python_of(root).name.removeprefix("python")
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    _run(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
        "--only-binary=:all:", "--python-version", version, *platforms, "--target", root / LIBRARY, *REQUIREMENTS,
        environment=None,
    )  # fmt: skip


def _write(target: Path, root: Path) -> Path:
    """All below ``root`` as an archive, renamed into place when whole."""
    beside = target.with_name(f".{target.name}")
    with open_directory(root) as source, beside.open("wb") as file:
        for chunk in Ramdisk([(path, node) for path, node in source.tree.items() if path]).chunks():
            file.write(chunk)
    return beside.rename(target)


def join(parts: Sequence[Path | Ramdisk], target: int) -> None:
    """Archives one after the other into an open file, each at a multiple of four, as the kernel takes them."""
    with os.fdopen(os.dup(target), "wb") as file:
        for part in parts:
            for chunk in _chunks(part) if isinstance(part, Path) else part.chunks():
                file.write(chunk)
            file.write(bytes(-file.tell() % 4))


def _chunks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _digest_of(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _file_error(error: OSError | shutil.Error, path: Path) -> FileError:
    if isinstance(error, shutil.Error):
        return FileError(f"{path}: cannot copy: {error.args[0][0][2] if error.args and error.args[0] else 'failed'}")
    return FileError.of(error, error.filename or path, "write")


NOTHING: Mapping[str, str] = {}


def _run(*words: str | Path, environment: Mapping[str, str] | None = NOTHING) -> str:
    """Its output. An ``environment`` of None is the caller's own."""
    done = subprocess.run(
        words, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        env=environment,
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BuildError(f"parent's root file system: {Path(words[0]).name} fails: {said[:200]}")
    return done.stdout
