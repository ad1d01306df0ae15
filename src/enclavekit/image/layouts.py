# SPDX-License-Identifier: Apache-2.0
"""Container images on disk: OCI layouts, as directories and as tars, and what ``docker save`` writes.

Source: OCI image specification, image-layout.md; moby image/tarexport for ``manifest.json``.

    DIR/oci-layout                {"imageLayoutVersion": "1.0.0"}
    DIR/index.json                an index; a manifest's tag is its annotation org.opencontainers.image.ref.name
    DIR/blobs/sha256/HEX          manifests, configurations, layers
    save.tar/manifest.json        [{"Config": PATH, "RepoTags": [NAME:TAG], "Layers": [PATH]}], paths in the tar
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from enclavekit.eif import Arch, Content, FileContent
from enclavekit.errors import FileError, SourceError
from enclavekit.image.container import ContainerImage, check_image
from enclavekit.image.layer_cache import LayerBlob
from enclavekit.image.oci import (
    ARCHITECTURES,
    INDEXES,
    MAX_DOCUMENT_SIZE,
    MAX_ENTRIES,
    MAX_INDEX_DEPTH,
    MAX_LAYERS,
    Descriptor,
    Digest,
    ImageConfig,
    Manifest,
    choose,
    expect_list,
    expect_object,
    load,
    parse_index,
)
from enclavekit.image.tar import Header, plain

MAX_MEMBERS = 1 << 16
MAX_LINKS = 8
DEFAULT_TAG = "latest"


class Files(Protocol):
    """Files by their path in a layout."""

    def content(self, path: str, where: str) -> Content:
        """SourceError when it is not there."""


@dataclass(frozen=True, slots=True)
class DirectoryFiles:
    """Below a directory. What is opened is closed with ``files``."""

    directory: Path
    files: ExitStack

    def content(self, path: str, where: str) -> Content:
        """The whole file."""
        place = self.directory / path
        try:
            file = self.files.enter_context(place.open("rb"))
        except FileNotFoundError as error:
            raise SourceError(f"{where}: no file {path}") from error
        except OSError as error:
            raise FileError.of(error, place, "read") from error
        return FileContent(file, 0, file.seek(0, 2), str(place))


@dataclass(frozen=True, slots=True)
class TarFiles:
    """In an uncompressed tar."""

    file: BinaryIO
    members: dict[str, tuple[int, int]]
    """Offset and size."""
    name: str

    def content(self, path: str, where: str) -> Content:
        """The member's data."""
        found = self.members.get(path.removeprefix("./"))
        if found is None:
            raise SourceError(f"{where}: no file {path}")
        return FileContent(self.file, *found, f"{self.name} ({path})")


def open_layout(directory: Path, tag: str | None, arch: Arch | None, files: ExitStack) -> ContainerImage:
    """``oci:DIR[:TAG]``. Without a tag, the layout has to have one image, or one called latest."""
    return _layout(DirectoryFiles(directory, files), str(directory), tag, arch)


def open_archive(
    path: Path, tag: str | None, arch: Arch | None, files: ExitStack, *, scratch: Path | None
) -> ContainerImage:
    """``oci-archive:F.tar[:TAG]``."""
    return _layout(_tar_files(path, files, scratch, str(path)), str(path), tag, arch)


def open_docker_archive(
    path: Path, tag: str | None, arch: Arch | None, files: ExitStack, *, scratch: Path | None, name: str | None = None
) -> ContainerImage:
    """``docker-archive:F.tar[:NAME:TAG]``, what ``docker save`` writes. Without a tag it has to have one image.

    ``name`` is what it is called in errors, its path otherwise.
    """
    name = name or str(path)
    found = _tar_files(path, files, scratch, name)
    entries = expect_list(_document(found, "manifest.json", name), MAX_ENTRIES, f"{name}: manifest.json")
    fit = []
    for entry in entries:
        made = expect_object(entry, f"{name}: manifest.json")
        tags = expect_list(made.get("RepoTags"), MAX_ENTRIES, f"{name}: RepoTags")
        if tag is None or tag in tags or f"{tag}:{DEFAULT_TAG}" in tags:
            fit.append(made)
    if len(fit) != 1:
        raise SourceError(f"{name}: {len(fit)} images{f' named {tag}' if tag else ''} of {len(entries)}, expected 1")
    paths = [fit[0].get("Config"), *expect_list(fit[0].get("Layers"), MAX_LAYERS, f"{name}: Layers")]
    if not all(isinstance(one, str) for one in paths):
        raise SourceError(f"{name}: manifest.json: a path that is no string")
    data = _read(found.content(paths[0], name), name)
    config = ImageConfig.parse(data, f"{name}: configuration")
    check_image(name, config, paths[1:], arch)
    layers = tuple(
        LayerBlob(found.content(layer, name), None, diff_id)
        for layer, diff_id in zip(paths[1:], config.diff_ids, strict=True)
    )
    return ContainerImage(name, None, Digest.of(data), config, layers)


def image_of(
    name: str, manifest: tuple[Descriptor, bytes], config: bytes, arch: Arch | None, contents: Iterator[Content]
) -> ContainerImage:
    """From a manifest and a configuration that were checked, and the layers' contents in the manifest's order."""
    descriptor, data = manifest
    layers = Manifest.parse(data, f"{name}: manifest").layers
    parsed = ImageConfig.parse(config, f"{name}: configuration")
    check_image(name, parsed, layers, arch)
    blobs = []
    for number, (layer, content, diff_id) in enumerate(zip(layers, contents, parsed.diff_ids, strict=True)):
        layer.check_size(content.size, f"{name}: layer {number}")
        blobs.append(LayerBlob(content, layer.digest, diff_id))
    return ContainerImage(name, descriptor.digest, Digest.of(config), parsed, tuple(blobs))


def _layout(files: Files, name: str, tag: str | None, arch: Arch | None) -> ContainerImage:
    version = expect_object(_document(files, "oci-layout", name), f"{name}: oci-layout").get("imageLayoutVersion")
    if not isinstance(version, str) or not version.startswith("1."):
        raise SourceError(f"{name}: layout of version {str(version)[:16]!r}, expected 1.0.0")
    entries = parse_index(_read(files.content("index.json", name), f"{name}: index.json"), f"{name}: index.json")
    chosen = _tagged(entries, tag, name)
    data = _blob(files, chosen, name)
    for _ in range(MAX_INDEX_DEPTH):
        if chosen.media_type not in INDEXES:
            break
        chosen = choose(parse_index(data, f"{name}: index"), goarch(arch), name)
        data = _blob(files, chosen, name)
    else:
        raise SourceError(f"{name}: more than {MAX_INDEX_DEPTH} indexes in one another")
    manifest = Manifest.parse(data, f"{name}: manifest")
    contents = (files.content(_path(layer.digest), name) for layer in manifest.layers)
    return image_of(name, (chosen, data), _blob(files, manifest.config, name), arch, contents)


def _tagged(entries: tuple[Descriptor, ...], tag: str | None, name: str) -> Descriptor:
    named = [entry for entry in entries if entry.name == (tag or DEFAULT_TAG)]
    fit = named if tag or named else list(entries)
    if len(fit) == 1:
        return fit[0]
    tags = ", ".join(sorted({entry.name for entry in entries if entry.name})[:16]) or "none"
    raise SourceError(f"{name}: {len(fit)} images{f' tagged {tag}' if tag else ''}, expected 1; tags are {tags}")


def _blob(files: Files, descriptor: Descriptor, name: str) -> bytes:
    where = f"{name}: {descriptor.digest}"
    data = _read(files.content(_path(descriptor.digest), name), where)
    descriptor.check_size(len(data), where)
    return descriptor.digest.check(data, where)


def _document(files: Files, path: str, name: str) -> object:
    where = f"{name}: {path}"
    return load(_read(files.content(path, name), where), where)


def _read(content: Content, where: str) -> bytes:
    if content.size > MAX_DOCUMENT_SIZE:
        raise SourceError(f"{where}: {content.size} bytes, expected at most {MAX_DOCUMENT_SIZE}")
    return b"".join(content.chunks())


def _path(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.hex}"


def goarch(arch: Arch | None) -> str:
    """As GOARCH names it; x86_64 when nothing is wanted."""
    return next(theirs for theirs, ours in ARCHITECTURES.items() if ours is (Arch.X86_64 if arch is None else arch))


def _tar_files(path: Path, files: ExitStack, scratch: Path | None, name: str) -> TarFiles:
    try:
        file = files.enter_context(path.open("rb"))
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    opened = plain(file, name, scratch)
    if opened is not file:
        files.enter_context(opened)
    size = opened.seek(0, 2)
    opened.seek(0)
    members: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=opened, mode="r:", errors="surrogateescape", tarinfo=Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                inner = member.name.removeprefix("./")
                if len(members) + len(links) >= MAX_MEMBERS:
                    raise SourceError(f"{name}: more than {MAX_MEMBERS} files")
                if member.isreg() and not member.issparse() and 0 <= member.size <= size - member.offset_data:
                    members[inner] = (member.offset_data, member.size)
                elif member.issym() or member.islnk():  # old versions of docker save shared layers so
                    links[inner] = _link_target(inner, member)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise SourceError(f"{name}: not a tar, or a broken one: {str(error).lower()}") from error
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    for inner in links:
        target = inner
        for _ in range(MAX_LINKS):
            target = links.get(target, target)
        if target in members:
            members.setdefault(inner, members[target])
    return TarFiles(opened, members, name)


def _link_target(name: str, member: tarfile.TarInfo) -> str:
    """Within the tar; what leads out is simply not found."""
    if member.islnk():
        return member.linkname.removeprefix("./")
    parts = name.split("/")[:-1]
    for part in member.linkname.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
