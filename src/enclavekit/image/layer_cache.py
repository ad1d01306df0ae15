# SPDX-License-Identifier: Apache-2.0
"""Layers unpacked to plain tars, named by their diff ID, so that each is fetched and unpacked once.

    DIRECTORY/sha256/HEX          a tar, whole: it was written beside its place, checked, then renamed
    DIRECTORY/sha256/HEX.lock     held while it is made: another build waits for it, and finds it
    DIRECTORY/sha256/.HEX-…       being written; what a killed build left is swept

Every use checks the digest again: a disk that forgets must not change what is measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from enclavekit.eif import CHUNK_SIZE, Content
from enclavekit.errors import FileError, FormatError, SourceError
from enclavekit.image.decompress import decompressed
from enclavekit.image.oci import Digest
from enclavekit.image.tar import unpacked_limit
from enclavekit.linux.locks import locked

ABANDONED_S = 24 * 3600
COMPRESSIONS = ("gzip", "zstd")


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """A layer as it is stored. ``digest`` is of the stored bytes, if known; ``diff_id`` of the tar in them."""

    content: Content
    digest: Digest | None
    diff_id: Digest


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Of one user. Everything in it can be taken away at any time: open files stay what they are."""

    directory: Path

    def open(self, layer: LayerBlob, where: str, report: Callable[[int], None]) -> BinaryIO:
        """The layer's tar, open; unpacked from what is stored, if it is not there yet.

        SourceError when either digest is another one, or the layer is a bomb. ``report`` is told of bytes read of what
        is stored, and may raise to end it.
        """
        diff_id = layer.diff_id
        place = self.directory / diff_id.algorithm / diff_id.hex
        try:
            found = self._usable(place, diff_id)
            if found:
                return found
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(place.with_suffix(".lock")):
                found = self._usable(place, diff_id)
                if not found:
                    self._make(place, layer, where, report)
                    found = place.open("rb")
            return found
        except OSError as error:
            raise FileError.of(error, place, "write") from error

    def prune(self, older_than_s: float) -> tuple[int, int]:
        """Take away what was not used for that long; how many layers, and their bytes."""
        count = size = 0
        for place in self._files():
            with contextlib.suppress(OSError):
                status = place.stat()
                if time.time() - max(status.st_atime, status.st_mtime) >= older_than_s:
                    place.unlink()
                    if not place.name.startswith(".") and place.suffix != ".lock":
                        count, size = count + 1, size + status.st_size
        return count, size

    def _files(self) -> Iterator[Path]:
        for algorithm in ("sha256", "sha512"):
            with contextlib.suppress(FileNotFoundError):
                yield from sorted((self.directory / algorithm).iterdir())

    def _usable(self, place: Path, diff_id: Digest) -> BinaryIO | None:
        """The file, if it is there and what its name says; one that is not is taken away."""
        try:
            file = place.open("rb")
        except FileNotFoundError:
            return None
        hasher = hashlib.new(diff_id.algorithm)
        try:
            while chunk := file.read(CHUNK_SIZE):
                hasher.update(chunk)
        except BaseException:
            file.close()
            raise
        if hasher.hexdigest() == diff_id.hex:
            with contextlib.suppress(OSError):  # taken away meanwhile; it is open
                os.utime(place)
            return cast(BinaryIO, file)
        file.close()
        place.unlink(missing_ok=True)
        return None

    def _make(self, place: Path, layer: LayerBlob, where: str, report: Callable[[int], None]) -> None:
        self._sweep(place.parent)
        beside = place.with_name(f".{place.name}-{secrets.token_hex(4)}")
        try:
            with beside.open("xb") as out:
                found = _unpack(layer, out, where, report)
            if found != layer.diff_id:
                raise SourceError(
                    f"{where}: its tar has the digest {found}, expected {layer.diff_id} as in the configuration"
                )
            beside.rename(place)
        finally:
            beside.unlink(missing_ok=True)

    def _sweep(self, directory: Path) -> None:
        for one in directory.glob(".*"):
            with contextlib.suppress(OSError):
                if time.time() - one.stat().st_mtime > ABANDONED_S:
                    one.unlink()


def _unpack(layer: LayerBlob, out: BinaryIO, where: str, report: Callable[[int], None]) -> Digest:
    """Write the tar in a stored layer; its digest. The digest of the stored bytes is checked on the way."""
    content, digest, algorithm = layer.content, layer.digest, layer.diff_id.algorithm
    stored = hashlib.new(digest.algorithm if digest else "sha256")
    plain = hashlib.new(algorithm)
    done = 0

    def chunks() -> Iterator[bytes]:
        nonlocal done
        for chunk in content.chunks():
            stored.update(chunk)
            done += len(chunk)
            report(done)
            yield chunk

    try:
        for piece in decompressed(chunks(), where, compressions=COMPRESSIONS, limit=unpacked_limit(content.size)):
            plain.update(piece)
            out.write(piece)
    except FormatError as error:
        raise SourceError(error.message) from error
    if done != content.size:
        raise SourceError(f"{where}: {done} bytes, expected {content.size}")
    if digest and stored.hexdigest() != digest.hex:
        raise SourceError(f"{where}: digest {digest.algorithm}:{stored.hexdigest()}, expected {digest}")
    return Digest(algorithm, plain.hexdigest())
