# SPDX-License-Identifier: Apache-2.0
"""Builds a kernel for enclaves: the distribution's source and compiler, our fragments; same inputs, same bytes.

What could differ from one build to the next is pinned: time (the source's own), user, host, number of the build,
directory, environment. A build is known by the digest of its inputs: it is made once, and found by it afterwards.
Source: linux Documentation/kbuild/reproducible-builds.rst.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from enclavekit.errors import FileError, KernelBuildError, RuntimeInstallError, UsageError
from enclavekit.kernel import configuration, source
from enclavekit.kernel.configuration import Target
from enclavekit.kernel.toolchain import HOST, Toolchain, make_toolchain
from enclavekit.linux.locks import locked, try_lock
from enclavekit.runtime import Progress, Runtime, Stage
from enclavekit.runtime.install import Installed
from enclavekit.runtime.kernels import Kernels, KnownKernel

RECIPE = 1
"""Goes up whenever the steps below would make other bytes of the same inputs."""

SPACE = 3 << 30
"""Bytes that a build takes while it runs."""

STEPS = {Target.X86_64: 1500, Target.AARCH64: 1500}
"""Lines that make prints, about: for the progress bar."""

LINUX_ARCH = {Target.X86_64: "x86_64", Target.AARCH64: "arm64"}
TRIPLET = {Target.X86_64: HOST, Target.AARCH64: "aarch64-linux-gnu"}
COMPILER = {Target.X86_64: "compiler", Target.AARCH64: "compiler-aarch64"}
IMAGE = {Target.X86_64: "arch/x86/boot/bzImage", Target.AARCH64: "arch/arm64/boot/Image"}
MAKE_TARGET = {Target.X86_64: "bzImage", Target.AARCH64: "Image"}

TEXT_OFFSET = slice(8, 16)
AARCH64_TEXT_OFFSET = (0x200000).to_bytes(8, "little")
"""Of the header of an Image, as Nitro's loader wants it: AWS's own build writes it there too."""

TOLD_LINES = 40
ERROR_LINE = re.compile(r"(?:error|Error|undefined reference|No space left)")
LOG = "failed.log"

ReportProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """What is to be built: a version like ``6.12``; ``fragments`` are files or names, besides our own."""

    version: str = "6.12"
    target: Target = Target.X86_64
    fragments: Sequence[str] = ()
    name: str | None = None
    newest: bool = False
    """Whether to take what the mirror has now, instead of source and compiler that were fetched before."""


@dataclass(frozen=True, slots=True)
class BuiltKernel:
    """``seconds`` is None for one that was there already."""

    kernel: KnownKernel
    seconds: float | None


def build_kernel(
    request: KernelRequest, *, runtime: Runtime, kernels: Kernels, cache: Path, report: ReportProgress
) -> BuiltKernel:
    """Build it, or find it. ``cache`` is where it is built, in a directory that is gone afterwards.

    Errors: KernelBuildError, FormatError for a fragment, UsageError for a name that is taken, MissingError, FileError,
    and those of ``Runtime.install``.
    """
    package = source.package_of(request.version)
    texts = configuration.fragments(request.target, request.fragments)
    options = configuration.merge(option for name, text in texts for option in configuration.parse(text, name))
    if request.name is not None and any(one.name == request.name and not one.made for one in kernels.all()):
        raise UsageError(f"kernel {request.name}: there is another one of that name", hint="choose another --name")
    names = (COMPILER[request.target], package)
    try:
        installed = {one.component.name: one for one in runtime.install(report, names, newest=request.newest)}
    except RuntimeInstallError as error:
        if "unable to locate package" not in error.message:
            raise
        raise KernelBuildError(
            f"this system's mirror lacks {error.message.rpartition(' ')[2]}",
            hint="another --version: apt-cache search linux-source, in the suite that docs/runtime.md names",
        ) from error
    compiler, linux = (installed[name] for name in names)
    inputs = _inputs(request, options, compiler, linux)
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def known() -> BuiltKernel | None:
        found = next((one for one in kernels.all() if one.made.get("inputs") == key), None)
        return BuiltKernel(found, None) if found and request.name in (None, found.name) else None

    found = known()
    if found:
        return found
    try:
        with _alone(cache, report):
            found = known()  # someone else may have built it meanwhile
            if found:
                return found
            began = time.monotonic()
            job = _Job(request, cache / "work", options, report)
            kernel = job.run(compiler.path, linux.path, lambda: _stored(job, kernels, key, inputs))
            return BuiltKernel(kernel, time.monotonic() - began)
    except OSError as error:
        raise FileError.of(error, error.filename or cache, "write") from error


def _inputs(
    request: KernelRequest, options: Mapping[str, configuration.Option], compiler: Installed, linux: Installed
) -> dict[str, Any]:
    """All that the bytes depend on."""

    def packages(installed: Installed) -> list[list[str]]:
        return [[one.name, one.version, one.sha256] for one in installed.component.packages]

    return {
        "recipe": RECIPE,
        "arch": str(request.target),
        "options": configuration.encode(options),
        "compiler": packages(compiler),
        "source": packages(linux),
        "version": {"compiler": compiler.component.version, "source": linux.component.version},
    }


def _stored(job: _Job, kernels: Kernels, key: str, inputs: Mapping[str, Any]) -> KnownKernel:
    request, release = job.request, job.release
    plain = release if request.target is Target.X86_64 else f"{release}-{request.target}"
    taken = {one.name for one in kernels.all()}
    own = f"{plain}+{key[:8]}"
    name = request.name or (own if request.fragments or plain in taken else plain)
    made = {
        "inputs": key,
        "arch": inputs["arch"],
        "source": inputs["version"]["source"],
        "compiler": inputs["version"]["compiler"],
        "fragments": [Path(name).name for name in request.fragments],
    }
    return kernels.add(job.image, name=name, modules=None, config=job.config, made=made, version=release)


class _Job:
    """One build in ``directory``, which is made, and removed whatever happens."""

    def __init__(
        self,
        request: KernelRequest,
        directory: Path,
        options: Mapping[str, configuration.Option],
        report: ReportProgress,
    ) -> None:
        self.request = request
        self._directory = directory.absolute()
        self._options = options
        self._report = report
        self._out = self._directory / "out"
        self._text = f"Linux {request.version} for {request.target}"

    def run(self, compiler: Path, linux: Path, finish: Callable[[], KnownKernel]) -> KnownKernel:
        """Unpack, configure, compile; what ``finish`` gives, called while all is still there."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        free = shutil.disk_usage(self._directory).free
        try:
            if free < SPACE:
                raise FileError(
                    f"{self._directory}: {free >> 20} MiB free, need {SPACE >> 20} MiB to build a kernel",
                    hint="make room, or set XDG_CACHE_HOME to a directory that has it",
                )
            toolchain = make_toolchain(self._directory / "tools", compiler, TRIPLET[self.request.target])
            self._tell(Stage.UNPACK, 0.0)
            date = source.unpack(linux, self._directory / "linux", lambda part: self._tell(Stage.UNPACK, part))
            self._configure(toolchain, date)
            self._make(toolchain, date, MAKE_TARGET[self.request.target], STEPS[self.request.target])
            if self.request.target is Target.AARCH64:
                _set_text_offset(self.image)
            return finish()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def image(self) -> Path:
        """The kernel."""
        return self._out / IMAGE[self.request.target]

    @property
    def config(self) -> Path:
        """What it was configured with."""
        return self._out / ".config"

    @property
    def release(self) -> str:
        """As ``uname -r`` will print it."""
        return (self._out / "include/config/kernel.release").read_text().strip()

    def _tell(self, stage: Stage, part: float | None) -> None:
        self._report(Progress(stage, self._text, part))

    def _configure(self, toolchain: Toolchain, date: datetime) -> None:
        wanted = self._directory / "wanted.config"
        wanted.write_text(configuration.encode(self._options))
        self._make(toolchain, date, "allnoconfig", 20, {"KCONFIG_ALLCONFIG": str(wanted)})
        configuration.check(self._options, configuration.parse_final(self.config.read_text()))

    def _make(
        self, toolchain: Toolchain, date: datetime, target: str, steps: int, more: Mapping[str, str] | None = None
    ) -> None:
        arch = LINUX_ARCH[self.request.target]
        prefix = "" if self.request.target is Target.X86_64 else f"{TRIPLET[self.request.target]}-"
        self._out.mkdir(exist_ok=True)
        command = [
            *(str(toolchain.directory / "bin/make"), "-C", str(self._directory / "linux"), f"O={self._out}"),
            *(f"ARCH={arch}", f"CROSS_COMPILE={prefix}", "LOCALVERSION=", f"-j{len(os.sched_getaffinity(0))}", target),
        ]
        environment = {
            **toolchain.environment,
            "KBUILD_BUILD_TIMESTAMP": f"{date:%a %b %d %H:%M:%S UTC %Y}",
            "KBUILD_BUILD_USER": "enclavekit",
            "KBUILD_BUILD_HOST": "enclavekit",
            "KBUILD_BUILD_VERSION": "1",
            **(more or {}),
        }
        last: deque[str] = deque(maxlen=TOLD_LINES)
        with (self._directory / "build.log").open("w") as log, _process(command, environment) as process:
            for count, line in enumerate(process.stdout or ()):
                log.write(line)
                last.append(" ".join(line.split()))
                if count % 10 == 0 and steps > TOLD_LINES:
                    self._tell(Stage.COMPILE, min(count / steps, 0.99))
            status = process.wait()
        if status != 0:
            self._fail(target, last)

    def _fail(self, target: str, last: Sequence[str]) -> None:
        kept = self._directory.with_name(LOG)
        shutil.copyfile(self._directory / "build.log", kept)
        if any("No space left on device" in line for line in last):
            raise FileError(f"{self._directory}: disk full")
        told = next((line for line in last if ERROR_LINE.search(line)), last[-1] if last else "make says nothing")
        raise KernelBuildError(f"make {target}: {told[:300]}", hint=f"all that it said is in {kept}")


@contextlib.contextmanager
def _process(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """In a group of its own, which is ended with the block."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def _alone(cache: Path, report: ReportProgress) -> Iterator[None]:
    """One build at a time: it takes all CPUs as it is, and what lies in its directory is no one else's."""
    cache.mkdir(parents=True, exist_ok=True)
    lock = cache / "lock"
    fd = try_lock(lock)
    if fd is None:
        report(Progress(Stage.WAITING, "another enclave command is building a kernel"))
        with locked(lock):
            yield
        return
    try:
        yield
    finally:
        os.close(fd)


def _set_text_offset(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(TEXT_OFFSET.start)
        file.write(AARCH64_TEXT_OFFSET)
