# SPDX-License-Identifier: Apache-2.0
"""Layouts for the tests, made by hand: layers are tars, described as the specification says."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAYER = "application/vnd.oci.image.layer.v1.tar"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
Entry = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, **fields: Any) -> Entry:
    """An entry of a tar."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mode = len(data), kind, mode
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def directory(name: str, mode: int = 0o755, **fields: Any) -> Entry:
    return member(name, kind=tarfile.DIRTYPE, mode=mode, **fields)


def symlink(name: str, target: str) -> Entry:
    return member(name, kind=tarfile.SYMTYPE, mode=0o777, linkname=target)


def hard_link(name: str, target: str) -> Entry:
    return member(name, kind=tarfile.LNKTYPE, linkname=target)


def whiteout(name: str) -> Entry:
    head, _, tail = name.rpartition("/")
    return member(f"{head}/.wh.{tail}" if head else f".wh.{tail}")


def opaque(name: str) -> Entry:
    return member(f"{name}/.wh..wh..opq" if name else ".wh..wh..opq")


def tar(entries: Sequence[Entry]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as out:
        for info, data in entries:
            out.addfile(info, io.BytesIO(data))
    return made.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Layout:
    """A layout being made. ``add`` one image or several, then ``write``."""

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        """Written, and described."""
        place = self.path / "blobs/sha256" / hashlib.sha256(data).hexdigest()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    def manifest(
        self,
        layers: Sequence[bytes],
        *,
        pack: Callable[[bytes], bytes] | None = None,
        suffix: str = "",
        architecture: str = "amd64",
        run: dict[str, Any] | None = None,
        **config: Any,
    ) -> dict[str, Any]:
        """An image's descriptor."""
        made = {
            "architecture": architecture,
            "os": "linux",
            "config": run or {},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
            **config,
        }
        stored = [pack(layer) if pack else layer for layer in layers]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.blob(json.dumps(made).encode(), CONFIG),
            "layers": [self.blob(layer, LAYER + suffix) for layer in stored],
        }
        return self.blob(json.dumps(manifest).encode(), MANIFEST)

    def add(self, descriptor: dict[str, Any], tag: str | None = "latest") -> None:
        named = {"annotations": {"org.opencontainers.image.ref.name": tag}} if tag else {}
        self.entries.append({**descriptor, **named})

    def write(self) -> Path:
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self.entries}
        (self.path / "index.json").write_text(json.dumps(index))
        return self.path


def layout(path: Path, *layers: Sequence[Entry], **words: Any) -> Path:
    """Of one image."""
    made = Layout(path)
    made.add(made.manifest([tar(layer) for layer in layers], **words))
    return made.write()


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)
