# SPDX-License-Identifier: Apache-2.0
"""A distribution's kernel source package, unpacked as far as an enclave's kernel needs it.

The package holds one tar in xz, ``usr/src/linux-source-VERSION.tar.xz``. Of drivers that no enclave has, and of other
architectures, only what the configuration reads is taken: that saves a GiB.
"""

from __future__ import annotations

import lzma
import re
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from enclavekit.errors import KernelBuildError

VERSION = re.compile(r"[0-9]{1,2}\.[0-9]{1,3}")
MAX_MEMBERS = 200_000
MAX_SIZE = 4 << 30
"""Of all files; 6.12 has 1.5 GB."""
REPORT_EACH = 1000

LEFT_OUT = re.compile(
    r"(?:Documentation|sound|tools/(?:perf|testing)|drivers/(?:gpu|media|staging|infiniband|scsi|usb|iio|crypto"
    r"|net/(?:ethernet|wireless))"
    r"|arch/(?!x86/|arm64/|arm/|Kconfig)[^/]+)/"
)
KEPT = re.compile(r"(?:.*/)?(?:Kconfig|Kbuild|Makefile)[^/]*")


def package_of(version: str) -> str:
    """The package's name. Errors: KernelBuildError for what is no version."""
    if not VERSION.fullmatch(version):
        raise KernelBuildError(f"version {version[:32]!r}: expected one like 6.12")
    return f"linux-source-{version}"


def unpack(package: Path, target: Path, report: Callable[[float], None]) -> datetime:
    """Unpack the source in the unpacked ``package`` into ``target``, new; returns the source's own date.

    Errors: KernelBuildError for a package that holds something else, OSError.
    """
    tars = sorted((package / "usr/src").glob("linux-source-*.tar.xz"))
    if len(tars) != 1:
        raise KernelBuildError(f"{package}: holds {len(tars)} kernel sources, expected one")
    size, date, count, taken = tars[0].stat().st_size, None, 0, 0
    target.mkdir(parents=True)
    try:
        with tars[0].open("rb") as file, tarfile.open(fileobj=file, mode="r|xz") as tar:
            for member in tar:
                count += 1
                if count % REPORT_EACH == 0:
                    report(file.tell() / size)
                _, _, name = member.name.partition("/")
                taken += member.size
                if count > MAX_MEMBERS or taken > MAX_SIZE:
                    raise KernelBuildError(f"{tars[0].name}: more than {MAX_MEMBERS} files or {MAX_SIZE} bytes")
                if not name or (LEFT_OUT.match(name) and not KEPT.fullmatch(name)):
                    continue
                member.name = name
                if name == "Makefile":
                    date = datetime.fromtimestamp(member.mtime, UTC)
                tar.extract(member, target, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise KernelBuildError(f"{tars[0].name}: {str(error) or 'damaged'}") from error
    if date is None:
        raise KernelBuildError(f"{tars[0].name}: no Makefile, expected the source of Linux")
    return date
