# SPDX-License-Identifier: Apache-2.0
"""Files into a lab's parent and out of it, as cpio archives that go through the agent.

What comes out is the parent's, so hostile: it is read and unpacked as ramdisks of images are, never outside a new
directory, and gets its name from us. A symlink that was asked for is followed there; none is put in its place here, for
the next copy might go through it. Those inside a directory stay what they are.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from enclavekit.eif import FileContent, ImageSection, SectionType
from enclavekit.eif.layout import SECTION_HEADER_SIZE
from enclavekit.errors import FileError, LabError
from enclavekit.image.initramfs import RamdiskFile, open_ramdisk
from enclavekit.image.ramdisk import Ramdisk
from enclavekit.image.sources import open_directory
from enclavekit.image.tree import Node
from enclavekit.inspection.unpack import unpack
from enclavekit.lab.agent_frames import Command
from enclavekit.lab.session import Streams, run_command

MAX_SIZE = 16 << 30
"""Of what comes out at once."""
MAX_WORDS = 4096

IS_DIRECTORY = 'test -d "$1"'
UNPACK = 'cd "$1" && exec busybox cpio -idmu --quiet'
PACK = """
test -e "$1" || { echo "$1: no such file" >&2; exit 1; }
path="$(readlink -f -- "$1")"
cd "$(dirname "$path")" && find "./$(basename "$path")" -print0 | busybox cpio -0 -o -H newc --quiet
"""

Connect = Callable[[], socket.socket]


def copy_in(connect: Connect, source: Path, target: str) -> None:
    """A file or directory; to ``target``, or into it where that is a directory. root owns it there.

    Errors: LabError, SourceError, FileError.
    """
    is_directory, _, _ = _shell(connect, IS_DIRECTORY, target)
    path = PurePosixPath(target)
    place, name = (path, source.resolve().name) if is_directory == 0 else (path.parent, path.name)
    with ExitStack() as opened:
        spool = cast(BinaryIO, opened.enter_context(tempfile.TemporaryFile()))
        for chunk in Ramdisk(_nodes(source, os.fsencode(name), opened)).chunks():
            spool.write(chunk)
        spool.seek(0)
        status, _, said = _shell(connect, UNPACK, str(place), stdin=spool.fileno())
    if status != 0:
        raise LabError(f"{target}: cannot be written in the parent: {said}")


def copy_out(connect: Connect, source: str, target: Path) -> None:
    """A file or directory of the parent's; to ``target``, or into it where that is a directory.

    Errors: LabError, FormatError, FileError.
    """
    final = target / PurePosixPath(source).name if target.is_dir() else target
    if final.is_dir() and not final.is_symlink():
        raise FileError(f"{final}: is a directory, and is left alone")
    try:
        work = Path(tempfile.mkdtemp(prefix=".enclavekit-", dir=final.parent))
    except OSError as error:
        raise FileError.of(error, final.parent, "write to") from error
    try:
        with tempfile.TemporaryFile(dir=work) as file:
            spool = cast(BinaryIO, file)
            _fetch(connect, source, spool)
            _unpack(spool, source, work).replace(final)
    except OSError as error:
        raise FileError.of(error, final, "write") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch(connect: Connect, source: str, spool: BinaryIO) -> None:
    """As an archive, into a file."""

    def take(data: bytes) -> None:
        if spool.tell() + len(data) > MAX_SIZE:
            raise LabError(f"{source}: more than {MAX_SIZE >> 30} GiB")
        spool.write(data)

    status, _, said = _shell(connect, PACK, source, stdout=take)
    if status != 0:
        raise LabError(f"{source}: cannot be read in the parent: {said}")
    spool.flush()


def _unpack(spool: BinaryIO, name: str, work: Path) -> Path:
    """The one file or directory in it. Compressed, it could become much larger than what was sent."""
    section = ImageSection(SectionType.RAMDISK, -SECTION_HEADER_SIZE, spool.tell())
    with open_ramdisk(spool, section, name=name, compressed=False) as ramdisk:
        if ramdisk.trouble is not None:
            raise ramdisk.trouble
        for archive in ramdisk.archives:
            archive.files = [_writable(file) for file in archive.files]
        unpack(ramdisk, work)
    made = list(work.iterdir())
    if len(made) != 1:
        raise LabError(f"{name}: {len(made)} files came from the parent, expected one")
    if made[0].is_symlink():
        raise LabError(f"{name}: a symlink came from the parent, expected what it leads to")
    return made[0]


def _writable(file: RamdiskFile) -> RamdiskFile:
    """Directories can be moved and removed by whoever copies, whatever their modes were."""
    if not stat.S_ISDIR(file.entry.mode):
        return file
    return replace(file, entry=replace(file.entry, mode=file.entry.mode | stat.S_IRWXU))


def _nodes(source: Path, name: bytes, opened: ExitStack) -> list[tuple[bytes, Node]]:
    try:
        if source.is_dir():
            tree = opened.enter_context(open_directory(source)).tree
            return [(name + b"/" + path if path else name, node) for path, node in tree.items()]
        file = cast(BinaryIO, opened.enter_context(source.open("rb")))
        status = os.fstat(file.fileno())
    except OSError as error:
        raise FileError.of(error, source, "read") from error
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{source}: expected a file or a directory")
    content = FileContent(file, 0, status.st_size, str(source))
    return [(name, Node(status.st_mode, mtime=int(max(status.st_mtime, 0)) & 0xFFFFFFFF, content=content))]


def _shell(
    connect: Connect,
    script: str,
    argument: str,
    *,
    stdin: int | None = None,
    stdout: Callable[[bytes], None] | None = None,
) -> tuple[int, bytes, str]:
    """Exit status, what it wrote if ``stdout`` does not take it, and its last word on stderr."""
    out, err = bytearray(), bytearray()

    def take(data: bytes) -> None:
        out.extend(data[: MAX_WORDS - len(out)])

    streams = Streams(stdout or take, lambda data: err.extend(data[: MAX_WORDS - len(err)]), stdin)
    status = run_command(connect(), Command(["/bin/bash", "-o", "pipefail", "-c", script, "sh", argument]), streams)
    last = (err.decode(errors="replace").strip().splitlines() or [f"exit status {status}"])[-1]
    return status, bytes(out), "".join(c for c in last if c.isprintable())[:200]
