# SPDX-License-Identifier: Apache-2.0
"""What each distribution calls the packages that the runtime is made of, and in which of its suites they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from enclavekit.errors import UnsupportedHostError

BY_HAND = (
    "install QEMU 10.2 or newer and get a Linux kernel, then name them with --qemu, --kernel and --modules, or in "
    "ENCLAVEKIT_QEMU, ENCLAVEKIT_KERNEL and ENCLAVEKIT_MODULES"
)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A distribution whose mirror has a QEMU that is new enough."""

    id: str
    """Of os-release(5)."""

    keyring: Path
    suites: tuple[str, ...]
    """Whose package lists are fetched, whichever suites the machine itself runs."""

    qemu_suite: str
    """Where QEMU comes from; everything else, the kernel above all, comes from the first of ``suites``."""

    qemu: str
    kernel: str


DISTRIBUTIONS = (
    Distribution(
        id="debian",
        keyring=Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
        suites=("trixie", "trixie-backports"),
        qemu_suite="trixie-backports",
        qemu="qemu-system-x86",
        kernel="linux-image-cloud-amd64",
    ),
    Distribution(
        id="ubuntu",
        keyring=Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
        suites=("resolute", "resolute-updates"),
        qemu_suite="resolute",
        qemu="qemu-system-x86",
        kernel="linux-image-virtual",
    ),
)

_COMPILER = ("base-files", "bc", "bison", "flex", "gcc", "libelf-dev", "make", "xz-utils", "zstd")
COMPILERS = {"compiler": _COMPILER, "compiler-aarch64": (*_COMPILER, "gcc-aarch64-linux-gnu")}
"""What kernels are built with, from the first suite, with all that it depends on."""

PARENT = "parent"
SETS = {
    **COMPILERS,
    PARENT: ("base-files", "bash", "busybox-static", "libgcc-s1", "libpython3-stdlib", "libssl3t64", "python3-minimal"),
}
"""All that are installed with what they depend on; ``PARENT`` is the system of a lab's parent machine."""

ALIASES = ("stable", "oldstable", "testing", "unstable", "sid", "devel")


@dataclass(frozen=True, slots=True)
class OsRelease:
    """Who this system says it is: os-release(5)."""

    name: str
    id: str
    codename: str

    @classmethod
    def read(cls, path: Path) -> OsRelease:
        """A system without the file is of an unknown kind."""
        try:
            text = path.read_text(errors="replace")
        except OSError:
            text = ""
        fields = {key: value.strip("\"'") for key, value in re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)}
        name = fields.get("PRETTY_NAME", fields.get("ID", "an unknown system"))
        return cls(name, fields.get("ID", ""), fields.get("VERSION_CODENAME", ""))

    @property
    def suites(self) -> tuple[str, ...]:
        """Names that the distribution's own suites may have in the configuration."""
        return (*ALIASES, *((self.codename,) if self.codename else ()))


def distribution_of(release: OsRelease) -> Distribution:
    """The entry for this system; ``UnsupportedHostError`` where there is none."""
    for distribution in DISTRIBUTIONS:
        if distribution.id == release.id:
            return distribution
    raise UnsupportedHostError(
        f"the runtime cannot be installed on {release.name}: expected Debian or Ubuntu", hint=BY_HAND
    )
