# SPDX-License-Identifier: Apache-2.0
"""What container images are made of: descriptors, indexes, manifests and configurations, as JSON from hostile hands.

Source: OCI image specification 1.1 (descriptor.md, image-index.md, manifest.md, config.md), and Docker's media types
for the same things (distribution/distribution, spec/manifest-v2-2). Everything is named by the digest of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from enclavekit.eif import Arch
from enclavekit.errors import SourceError

MAX_DOCUMENT_SIZE = 4 << 20
"""Of an index, manifest or configuration; registries take no larger manifests."""
MAX_ENTRIES = 1024
MAX_LAYERS = 512
MAX_LAYER_SIZE = 64 << 30
MAX_INDEX_DEPTH = 4

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

INDEXES = (OCI_INDEX, DOCKER_LIST)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
CONFIGS = (OCI_CONFIG, DOCKER_CONFIG)
LAYERS = {
    # media type: compression
    "application/vnd.oci.image.layer.v1.tar": None,
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": None,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
}

ARCHITECTURES = {"amd64": Arch.X86_64, "arm64": Arch.AARCH64}
"""As GOARCH names them."""

_DIGESTS = {"sha256": 64, "sha512": 128}
_DIGEST = re.compile(r"(sha256|sha512):([0-9a-f]{64,128})")
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d{1,12})?(Z|[+-]\d\d:\d\d)")


@dataclass(frozen=True, slots=True)
class Digest:
    """``sha256:…`` or ``sha512:…`` of some bytes."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    @property
    def short(self) -> str:
        """For people."""
        return self.hex[:12]

    @classmethod
    def parse(cls, text: object, where: str) -> Self:
        """SourceError for anything else."""
        match = _DIGEST.fullmatch(text) if isinstance(text, str) else None
        if match is None or len(match[2]) != _DIGESTS[match[1]]:
            raise SourceError(f"{where}: digest {str(text)[:80]!r}, expected sha256: and 64 hexadecimal digits")
        return cls(match[1], match[2])

    @classmethod
    def of(cls, data: bytes) -> Self:
        """SHA-256 of it."""
        return cls("sha256", hashlib.sha256(data).hexdigest())

    def check(self, data: bytes, where: str) -> bytes:
        """The data; SourceError when they have another digest."""
        found = hashlib.new(self.algorithm, data).hexdigest()
        if found != self.hex:
            raise SourceError(f"{where}: digest {self.algorithm}:{found}, expected {self}")
        return data


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Names some bytes. ``platform`` is operating system, architecture, variant, where an index says so."""

    media_type: str
    digest: Digest
    size: int
    platform: tuple[str, str, str] | None = None
    name: str | None = None
    """The tag, in the index of a layout."""

    @classmethod
    def parse(cls, value: object, where: str) -> Self:
        """From JSON."""
        made = expect_object(value, where)
        size = made.get("size")
        if type(size) is not int or not 0 <= size <= MAX_LAYER_SIZE:
            raise SourceError(f"{where}: size {str(size)[:32]}, expected 0 to {MAX_LAYER_SIZE} bytes")
        platform = None
        if made.get("platform") is not None:
            found = expect_object(made["platform"], f"{where}: platform")
            platform = (_text(found, "os", where), _text(found, "architecture", where), _text(found, "variant", where))
        annotations = made.get("annotations") or {}
        name = expect_object(annotations, f"{where}: annotations").get("org.opencontainers.image.ref.name")
        return cls(
            media_type=_text(made, "mediaType", where),
            digest=Digest.parse(made.get("digest"), where),
            size=size,
            platform=platform,
            name=name if isinstance(name, str) else None,
        )

    def check_size(self, size: int, where: str) -> None:
        """SourceError when there are more or fewer bytes than it says."""
        if size != self.size:
            raise SourceError(f"{where}: {size} bytes, expected {self.size}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image: its configuration, and its layers from the lowest up."""

    config: Descriptor
    layers: tuple[Descriptor, ...]

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """SourceError for artifacts that are no images, and for layers that are elsewhere or of unknown kinds."""
        made = expect_object(load(data, where), where)
        if made.get("schemaVersion") != 2:
            raise SourceError(f"{where}: schemaVersion {str(made.get('schemaVersion'))[:16]}, expected 2")
        config = Descriptor.parse(made.get("config"), f"{where}: config")
        if config.media_type not in CONFIGS:
            raise SourceError(f"{where}: config of type {config.media_type[:80]!r}, expected that of a container image")
        layers = expect_list(made.get("layers"), MAX_LAYERS, f"{where}: layers")
        found = tuple(Descriptor.parse(layer, f"{where}: layer {index}") for index, layer in enumerate(layers))
        for index, layer in enumerate(found):
            if layer.media_type not in LAYERS:
                raise SourceError(
                    f"{where}: layer {index} of type {layer.media_type[:80]!r}, expected a tar, plain, gzip or zstd",
                    hint="foreign and encrypted layers cannot be had",
                )
        return cls(config, found)


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image says of how it is run. ``created`` is in seconds since 1970, None when it is not said."""

    os: str
    architecture: str
    diff_ids: tuple[Digest, ...]
    created: int | None = None
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    stop_signal: str = ""

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """From JSON; SourceError for one that is none."""
        made = expect_object(load(data, where), where)
        run = expect_object(made.get("config") or {}, f"{where}: config")
        rootfs = expect_object(made.get("rootfs"), f"{where}: rootfs")
        diff_ids = expect_list(rootfs.get("diff_ids"), MAX_LAYERS, f"{where}: diff_ids")
        return cls(
            os=_text(made, "os", where),
            architecture=_text(made, "architecture", where),
            diff_ids=tuple(Digest.parse(one, f"{where}: diff_ids") for one in diff_ids),
            created=_seconds(made.get("created"), where),
            entrypoint=_texts(run, "Entrypoint", where),
            command=_texts(run, "Cmd", where),
            environment=_texts(run, "Env", where),
            workdir=_text(run, "WorkingDir", where),
            user=_text(run, "User", where),
            stop_signal=_text(run, "StopSignal", where),
        )


def parse_index(data: bytes, where: str) -> tuple[Descriptor, ...]:
    """The manifests of an index; those whose type we do not know are left out."""
    made = expect_object(load(data, where), where)
    entries = expect_list(made.get("manifests"), MAX_ENTRIES, f"{where}: manifests")
    found = (Descriptor.parse(entry, f"{where}: manifest {index}") for index, entry in enumerate(entries))
    return tuple(one for one in found if one.media_type in (*INDEXES, *MANIFESTS))


def choose(entries: tuple[Descriptor, ...], architecture: str, where: str) -> Descriptor:
    """The manifest for Linux on this architecture; SourceError says which there are."""
    fit = [one for one in entries if one.platform is None or one.platform[:2] == ("linux", architecture)]
    exact = [one for one in fit if one.platform is not None]
    if len(exact) > 1:  # variants: the plainest is the one that runs everywhere
        exact.sort(key=lambda one: one.platform or ("", "", ""))
    if exact:
        return exact[0]
    if len(fit) == 1:
        return fit[0]
    there = ", ".join(sorted("/".join(filter(None, one.platform)) for one in entries if one.platform)[:16]) or "none"
    raise SourceError(f"{where}: {len(fit)} images for linux/{architecture}, expected 1; there are {there}")


def load(data: bytes, where: str) -> object:
    """JSON in UTF-8."""
    try:
        value: object = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(": ")[0].lower()
        raise SourceError(f"{where}: not JSON in UTF-8: {reason}") from error
    return value


def expect_object(value: object, where: str) -> dict[str, Any]:
    """SourceError unless it is one."""
    if not isinstance(value, dict):
        raise SourceError(f"{where}: {type(value).__name__}, expected an object")
    return value


def expect_list(value: object, limit: int, where: str) -> list[Any]:
    """SourceError unless it is one, and short enough; null is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise SourceError(f"{where}: {type(value).__name__}, expected a list")
    if len(value) > limit:
        raise SourceError(f"{where}: {len(value)} of them, expected at most {limit}")
    return value


def _text(made: dict[str, Any], key: str, where: str) -> str:
    value = made.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SourceError(f"{where}: {key} is {type(value).__name__}, expected a string")
    return value


def _texts(made: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = expect_list(made.get(key), MAX_ENTRIES, f"{where}: {key}")
    if not all(isinstance(one, str) for one in value):
        raise SourceError(f"{where}: {key} has something that is no string")
    return tuple(value)


def _seconds(value: object, where: str) -> int | None:
    """RFC 3339, rounded down."""
    if value is None or value == "":
        return None
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    try:
        if match is None:
            raise ValueError
        moment = datetime.fromisoformat(match[1] + match[2].replace("Z", "+00:00"))
    except ValueError as error:
        raise SourceError(f"{where}: created {str(value)[:64]!r}, expected a time as RFC 3339 has them") from error
    return max(0, int(moment.astimezone(UTC).timestamp()))
