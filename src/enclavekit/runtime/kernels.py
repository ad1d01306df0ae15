# SPDX-License-Identifier: Apache-2.0
"""Guest kernels by name or digest: the runtime's, and those that were imported to a directory of the user's.

    <root>/<name>/kernel, kernel.config, modules/, kernel.json

A kernel's directory is renamed into place when all of it is there, and never changed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enclavekit.codec.bzimage import READ_SIZE, BzImage
from enclavekit.errors import FileError, FormatError, KernelError, NoKernelError, UsageError
from enclavekit.runtime.find import Kernel, find_kernel

SCHEMA = 1
MAX_KERNEL_SIZE = 1 << 30
KERNEL, CONFIG, MODULES, RECORD = "kernel", "kernel.config", "modules", "kernel.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


@dataclass(frozen=True, slots=True)
class KnownKernel:
    """``version`` is as ``uname -r`` prints it, or nothing; ``digest`` is ``sha384:…`` of the file."""

    name: str
    version: str
    origin: str
    path: Path
    modules: Path | None
    digest: str
    made: Mapping[str, Any] = field(default_factory=dict)
    """Of one that was built here: ``inputs``, a digest of all, ``source``, ``compiler``, ``fragments``, ``arch``."""

    @property
    def kernel(self) -> Kernel:
        """As a build takes it."""
        return Kernel(self.name, self.path, self.modules)


@dataclass(frozen=True, slots=True)
class Kernels:
    """All that are known; ``runtime_root`` is where the runtime is installed."""

    root: Path
    runtime_root: Path

    def all(self) -> list[KnownKernel]:
        """The runtime's first. FormatError for a record that is none."""
        try:
            names = sorted(path.name for path in self.root.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise FileError.of(error, self.root, "read") from error
        runtime = self._runtime()
        return [*([runtime] if runtime else []), *(self._stored(name) for name in names)]

    def choose(self, named: str | None, modules: str | None, digest: str | None = None) -> Kernel:
        """A file, a known kernel's name, or None for the runtime's; with ``digest``, any known one that has it.

        Errors: NoKernelError. Of a file that is named, the digest is not looked at: it is the one that is meant.
        """
        if named is not None and not Path(named).exists() and "/" not in named:
            known = self.all()
            found = next((one for one in known if one.name == named), None)
            if found is None:
                names = ", ".join(one.name for one in known) or "none"
                raise NoKernelError(f"kernel {named!r}: no such file, and no kernel of that name (known: {names})")
            return found.kernel if modules is None else Kernel(found.name, found.path, Path(modules))
        if named is None and digest is not None:
            locked = next((one for one in self.all() if one.digest == digest), None)
            if locked is not None:
                return locked.kernel if modules is None else Kernel(locked.name, locked.path, Path(modules))
        return find_kernel(self.runtime_root, named, modules)

    def made_of(self, path: Path) -> str:
        """What a kernel that was built here was made of, in words for a lock; nothing for others."""
        one = next((one for one in self.all() if one.path == path and one.made), None)
        return f" (Linux {one.made.get('source')}, gcc {one.made.get('compiler')})" if one else ""

    def add(
        self,
        path: Path,
        *,
        name: str | None,
        modules: Path | None,
        config: Path | None,
        version: str = "",
        made: Mapping[str, Any] | None = None,
    ) -> KnownKernel:
        """Copy a kernel here; ``version`` is for one that does not say its own, ``made`` for one that was built.

        Errors: KernelError when it is none, UsageError for a name that is taken, FileError.
        """
        said, digest = _examine(path)
        version = said or version
        chosen = name or version or path.name
        if not NAME.fullmatch(chosen):
            raise UsageError(f"kernel name {chosen[:64]!r}: expected letters, digits, '.', '_', '+' and '-'")
        for one in self.all():
            if one.name == chosen and one.digest == digest:
                return one
            if one.name == chosen:
                raise UsageError(f"kernel {chosen}: there is another one of that name", hint="give it one with --name")
        beside = self.root / f".{secrets.token_hex(8)}"
        try:
            beside.mkdir(parents=True)
            shutil.copyfile(path, beside / KERNEL)
            if config:
                shutil.copyfile(config, beside / CONFIG)
            if modules:
                # What is no file has no place in it: "build" and "source" lead out of it.
                shutil.copytree(modules, beside / MODULES, ignore=_links, copy_function=shutil.copyfile)
            record: dict[str, Any] = {"schema": SCHEMA, "version": version, "origin": "imported", "digest": digest}
            if made is not None:
                record |= {"origin": "built", "made": dict(made)}
            (beside / RECORD).write_text(json.dumps(record) + "\n")
            beside.rename(self.root / chosen)
        except OSError as error:
            raise FileError.of(error, error.filename or path, "copy") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return self._stored(chosen)

    def _runtime(self) -> KnownKernel | None:
        try:
            kernel = find_kernel(self.runtime_root)
        except NoKernelError:
            return None
        version, digest = _examine(kernel.path)
        return KnownKernel(kernel.name, version, "debian", kernel.path, kernel.modules, digest)

    def _stored(self, name: str) -> KnownKernel:
        directory = self.root / name
        try:
            record = json.loads((directory / RECORD).read_bytes())
            if record["schema"] != SCHEMA:
                raise ValueError(record["schema"])
            modules = directory / MODULES
            return KnownKernel(
                name,
                str(record["version"]),
                str(record["origin"]),
                directory / KERNEL,
                modules if modules.is_dir() else None,
                str(record["digest"]),
                dict(record.get("made", {})),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"{directory / RECORD}: damaged", hint=f"remove {directory}") from error


def _examine(path: Path) -> tuple[str, str]:
    """Version and digest."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size > MAX_KERNEL_SIZE:
                raise KernelError(f"{path}: more than {MAX_KERNEL_SIZE} bytes")
            head = file.read(READ_SIZE)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha384").hexdigest()
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    if head[0x38:0x3C] == b"ARM\x64":  # an Image: its header has no version
        return "", f"sha384:{digest}"
    try:
        return BzImage.parse(head, size).banner.partition(" ")[0], f"sha384:{digest}"
    except FormatError as error:
        raise KernelError(f"{path}: {error.message}", hint=error.hint) from error


def _links(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(directory, name).is_symlink()]
