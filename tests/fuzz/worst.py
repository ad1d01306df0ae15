# SPDX-License-Identifier: Apache-2.0
"""Inputs of 1 MiB that are as slow and as large as we know how: none takes more than a second, or 64 MiB.

python tests/fuzz/worst.py            all of them, each in a process of its own
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from enclavekit import eif
from enclavekit.codec import cpio
from enclavekit.codec.cose import Sign1
from enclavekit.eif import Arch, BytesContent, Section, SectionType
from enclavekit.errors import Error
from enclavekit.inspection.diff import Opened, compare
from enclavekit.inspection.extract import extract
from enclavekit.inspection.html import render
from enclavekit.inspection.lint import lint

MIB = 1 << 20
LIMIT_S, LIMIT_KIB = 1.0, 64 << 10


def image(*, metadata: bytes = b"{}", ramdisk: bytes = b"", signature: bytes | None = None) -> bytes:
    out = io.BytesIO()
    parts = [
        Section(SectionType.KERNEL, BytesContent(b"kernel")),
        Section(SectionType.CMDLINE, BytesContent(b"quiet")),
        Section(SectionType.METADATA, BytesContent(metadata)),
        Section(SectionType.RAMDISK, BytesContent(ramdisk)),
    ]
    if signature is not None:
        parts.append(Section(SectionType.SIGNATURE, BytesContent(signature)))
    eif.write(out, parts, arch=Arch.X86_64)
    return out.getvalue()


def entries(name: Callable[[int], bytes]) -> bytes:
    """As many as fit."""
    made, size, number = [], 0, 0
    while size < MIB - 8192:
        head = bytes(cpio.Entry(name(number), stat.S_IFREG | 0o644))
        made.append(head)
        size, number = size + len(head), number + 1
    return b"".join(made) + bytes(cpio.Entry(cpio.TRAILER, 0))


PEM = b"-----BEGIN CERTIFICATE-----\n"
INPUTS: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: bytes(MIB),
    "sections of nothing": lambda: b".eif\0\4" + bytes(0x14) + b"\0\x20" + bytes(MIB - 28),
    "metadata: lists": lambda: image(metadata=b"[" * (MIB - 4096)),
    "metadata: a long list": lambda: image(metadata=b"[" + b"1," * (MIB // 2 - 4096) + b"1]"),
    "metadata: short keys": lambda: image(
        metadata=b"{" + b",".join(b'"%x":{}' % number for number in range(85_000)) + b"}"
    ),
    "metadata: digits": lambda: image(metadata=b"1" * (MIB - 4096)),
    "signature: nested": lambda: image(signature=b"\x81" * 32768),
    "signature: small items": lambda: image(signature=b"\x99\x7f\xf0" + b"\0" * 32752),
    "signature: begins of certificates": lambda: image(
        signature=bytes(eif.Signature(eif.SigningCertificate(PEM * 400), Sign1(b"", b"", b"")))
    ),
    "cpio: short names": lambda: image(ramdisk=entries(lambda number: b"%x" % number)),
    "cpio: deep names": lambda: image(ramdisk=entries(lambda number: b"d/" * 200 + b"%x" % number)),
    "cpio: one name": lambda: image(ramdisk=entries(lambda number: b"a")),
    "cpio: NULs": lambda: image(ramdisk=bytes(MIB - 4096)),
    "cpio: archives": lambda: image(ramdisk=b"".join(cpio.archive([])) * 2000),
    "gzip": lambda: image(ramdisk=gzip.compress(bytes(47 * MIB)) * 20),
    "bzip2": lambda: image(ramdisk=bz2.compress(bytes(47 * MIB))),
    "xz": lambda: image(ramdisk=lzma.compress(bytes(47 * MIB), preset=9)),
    "gzip of entries": lambda: image(ramdisk=gzip.compress(entries(lambda number: b"%x" % number) * 40)),
}


def describe(path: Path) -> None:
    with path.open("rb") as file:
        eif.describe_eif_object(eif.examine(file, "image"))


def diff(path: Path) -> None:
    with path.open("rb") as file, path.open("rb") as same:
        found = eif.inspect(file)
        compare(Opened(file, found, "one"), Opened(same, found, "two"), pcrs=False)


def take_apart(path: Path) -> None:
    with path.open("rb") as file:
        extract(file, eif.inspect(file), path.parent / "out", name="image")


def judge(path: Path) -> None:
    with path.open("rb") as file:
        lint(file, name="image", now=datetime(2026, 6, 1, tzinfo=UTC))


def draw(path: Path) -> None:
    with path.open("rb") as file:
        for _ in render(file, eif.examine(file, "image", section_digests=True), "image", None):
            pass


def run_one(path: Path) -> None:
    """In a process of its own: CPU seconds of the slowest of all that reads an image, and KiB that it took."""
    with suppress(Error), tempfile.TemporaryFile() as nothing:
        eif.examine(nothing, "warm")
    before = peak_kib()
    slowest = 0.0
    for one in (describe, diff, take_apart, judge, draw):
        start = time.process_time()
        with suppress(Error):
            one(path)
        slowest = max(slowest, time.process_time() - start)
    print(slowest, peak_kib() - before)


def peak_kib() -> int:
    """Resident memory of this process at most so far; getrusage would count its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Fails when an input is too slow or too large."""
    if len(sys.argv) > 1:
        run_one(Path(sys.argv[1]))
        return
    failed = False
    for name, make in INPUTS.items():
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "image.eif")
            path.write_bytes(make())
            done = subprocess.run([sys.executable, __file__, path], stdout=subprocess.PIPE, check=True)
            seconds, kib = float(done.stdout.split()[0]), int(done.stdout.split()[1])
        bad = seconds > LIMIT_S or kib > LIMIT_KIB
        failed = failed or bad
        print(f"{'TOO MUCH' if bad else 'fine':<9}{name:<36}{seconds:6.3f} s {kib / 1024:6.1f} MiB")
    sys.exit(failed)


if __name__ == "__main__":
    main()
