# SPDX-License-Identifier: Apache-2.0
"""An image's measured parts as ``nitro-cli build-enclave`` makes them: its blobs, its init, its way with ENTRYPOINT.

Source: aws-nitro-enclaves-cli enclave_build/src/lib.rs and docker.rs. So PCRs of images that exist can be matched; what
that init does not do (working directory, user, stop signal, logs) cannot be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enclavekit.build.application import Application, text_bytes
from enclavekit.eif import Arch, BytesContent
from enclavekit.errors import BuildError, FileError, NoKernelError, UsageError
from enclavekit.image.linuxkit import LinuxkitRamdisk, bootstrap_ramdisk, customer_ramdisk, exported
from enclavekit.image.oci import ImageConfig
from enclavekit.image.sources import Source

KERNELS = {"bzImage": Arch.X86_64, "Image": Arch.AARCH64}
MAX_BLOB_SIZE = 64 << 20


@dataclass(frozen=True, slots=True)
class Blobs:
    """nitro-cli's directory of them: ``bzImage`` or ``Image``, ``cmdline``, ``init``, ``nsm.ko``."""

    directory: Path

    @property
    def kernel(self) -> Path:
        """NoKernelError when there is none, or two."""
        found = [self.directory / name for name in KERNELS if (self.directory / name).is_file()]
        if len(found) != 1:
            raise NoKernelError(
                f"{self.directory}: {len(found)} kernels, expected bzImage or Image",
                hint="--blobs takes the directory that nitro-cli installs, /usr/share/nitro_enclaves/blobs",
            )
        return found[0]

    @property
    def cmdline(self) -> str:
        """Without the space around it, as nitro-cli takes it."""
        return self._read("cmdline").decode("ascii", "backslashreplace").strip()

    def first_ramdisk(self) -> LinuxkitRamdisk:
        """With its init and its NSM driver."""
        return bootstrap_ramdisk(*(BytesContent(data) for data in self.programs().values()))

    def programs(self) -> dict[str, bytes]:
        """Its init, and its NSM driver, by what a lock calls them."""
        return {"init": self._read("init"), "module nsm": self._read("nsm.ko")}

    def _read(self, name: str) -> bytes:
        path = self.directory / name
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BLOB_SIZE + 1)
        except OSError as error:
            raise FileError.of(error, path, "read") from error
        if len(data) > MAX_BLOB_SIZE:
            raise BuildError(f"{path}: more than {MAX_BLOB_SIZE} bytes")
        return data


def command_of(application: Application, image: ImageConfig | None) -> tuple[bytes, ...]:
    """What init runs: CMD if the image has one, and otherwise ENTRYPOINT, never both; or what the builder says.

    UsageError for what nitro-cli's init cannot do.
    """
    for what, value in (
        ("workdir", application.workdir),
        ("user", application.user),
        ("stop-signal", application.stop_signal),
        ("logs", application.logs or None),
        ("launch-value", application.launch or None),
        ("attest", application.attest or None),
    ):
        if value is not None:
            raise UsageError(f"--{what}: nitro-cli's init does not know it", hint="leave --compat nitro-cli out")
    found = image or ImageConfig("linux", "", ())
    words = (*(application.entrypoint or ()), *application.command) or found.command or found.entrypoint
    if not words:
        raise UsageError(
            "no command: the image would have nothing to run", hint="put it last: ... -- /bin/app argument"
        )
    return tuple(_line(word) for word in words)


def second_ramdisk(source: Source, application: Application) -> LinuxkitRamdisk:
    """The container's file system, with the command and the environment beside it."""
    image = source.container.config if source.container else None
    command = command_of(application, image)
    environment = [_line(item) for item in (*(image.environment if image else ()), *application.environment)]
    return customer_ramdisk(exported(source.tree), command, environment)


def _line(text: str) -> bytes:
    if "\n" in text or "\0" in text:
        raise BuildError(f"{text[:64]!r}: a line end, which nitro-cli's init takes for the end of the word")
    return text_bytes(text)
