# SPDX-License-Identifier: Apache-2.0
"""Container images on disk: layouts and archives, whole and broken; the cache that their layers are unpacked to."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from oci_layouts import INDEX, Layout, digest, directory, gzipped, layout, member, tar

from enclavekit.eif import Arch, Content
from enclavekit.errors import SourceError
from enclavekit.image import tar as tar_module
from enclavekit.image.container import ContainerImage, read_layers
from enclavekit.image.layer_cache import LayerCache
from enclavekit.image.layouts import open_archive, open_docker_archive, open_layout

LAYERS = [[directory("bin"), member("bin/app", b"app", mode=0o755)], [member("etc/conf", b"conf")]]
FILES = [b"", b"bin", b"bin/app", b"etc", b"etc/conf"]


def files_of(find: Callable[[ExitStack], ContainerImage], scratch: Path) -> list[bytes]:
    with ExitStack() as files:
        tree, _ = read_layers(find(files), LayerCache(scratch / "cache"), files, lambda name, done, size: None)
        return [name for name, _ in tree.items()]


def of_layout(path: Path, scratch: Path, tag: str | None = None, arch: Arch | None = None) -> list[bytes]:
    return files_of(lambda files: open_layout(path, tag, arch, files), scratch)


def packed(path: Path, source: Path, *, compress: bool = False) -> Path:
    """A directory as a tar."""
    with tarfile.open(path, "w:gz" if compress else "w") as out:
        for one in sorted(source.rglob("*")):
            out.add(one, one.relative_to(source), recursive=False)
    return path


def archived(path: Path, files: ExitStack) -> ContainerImage:
    return open_archive(path, None, None, files, scratch=None)


def saved(path: Path, tag: str | None, files: ExitStack) -> ContainerImage:
    return open_docker_archive(path, tag, None, files, scratch=None)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(SourceError) as caught:
        call()
    return caught.value.message


def test_a_layout_and_its_archive_are_one_image(tmp_path: Path) -> None:
    made = layout(tmp_path / "layout", *LAYERS, pack=gzipped, suffix="+gzip")
    assert of_layout(made, tmp_path) == FILES
    found = []
    for compress in (False, True):
        archive = packed(tmp_path / f"archive-{compress}.tar", made, compress=compress)
        with ExitStack() as files:
            found.append(open_archive(archive, None, None, files, scratch=tmp_path).config_digest)
        assert files_of(partial(archived, archive), tmp_path) == FILES
    with ExitStack() as files:
        assert found == [open_layout(made, None, None, files).config_digest] * 2


def test_tags(tmp_path: Path) -> None:
    made = Layout(tmp_path / "layout")
    for tag in ("one", "two"):
        made.add(made.manifest([tar([member(tag)])]), tag)
    path = made.write()
    assert of_layout(path, tmp_path, "one") == [b"", b"one"]
    assert of_layout(path, tmp_path, "two") == [b"", b"two"]
    assert refusal(lambda: of_layout(path, tmp_path)) == f"{path}: 2 images, expected 1; tags are one, two"
    assert refusal(lambda: of_layout(path, tmp_path, "three")) == (
        f"{path}: 0 images tagged three, expected 1; tags are one, two"
    )


def test_architectures(tmp_path: Path) -> None:
    path = layout(tmp_path / "layout", *LAYERS, architecture="arm64")
    assert of_layout(path, tmp_path, arch=Arch.AARCH64) == FILES
    assert refusal(lambda: of_layout(path, tmp_path, arch=Arch.X86_64)) == (
        f"{path}: an image for architecture 'arm64', expected amd64"
    )
    odd = layout(tmp_path / "odd", *LAYERS, architecture="mips")
    assert refusal(lambda: of_layout(odd, tmp_path)).endswith("architecture 'mips', expected amd64 or arm64")


def save(path: Path, *, links: bool = False, tag: str = "name:tag", **more: Any) -> Path:
    """What docker save writes; its old versions made symlinks of layers that were there before."""
    layers = [tar(entries) for entries in LAYERS]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
    }
    data = json.dumps(config).encode()
    name = hashlib.sha256(data).hexdigest() + ".json"
    manifest = [{"Config": name, "RepoTags": [tag], "Layers": ["a/layer.tar", "b/layer.tar"], **more}]
    with tarfile.open(path, "w") as out:

        def add(name: str, content: bytes, target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if target:
                info.type, info.linkname = tarfile.SYMTYPE, target
            out.addfile(info, io.BytesIO(content))

        add(name, data)
        add("real/layer.tar" if links else "a/layer.tar", layers[0])
        if links:
            add("a/layer.tar", b"", "../real/layer.tar")
        add("b/layer.tar", layers[1])
        add("manifest.json", json.dumps(manifest).encode())
    return path


@pytest.mark.parametrize("links", [False, True])
def test_docker_save(tmp_path: Path, links: bool) -> None:
    path = save(tmp_path / "save.tar", links=links)
    for tag in (None, "name:tag"):
        assert files_of(partial(saved, path, tag), tmp_path) == FILES
    message = refusal(lambda: files_of(partial(saved, path, "x"), tmp_path))
    assert message == f"{path}: 0 images named x of 1, expected 1"


def test_the_cache_is_checked_each_time(tmp_path: Path) -> None:
    path = layout(tmp_path / "layout", *LAYERS)
    of_layout(path, tmp_path)
    stored = sorted((tmp_path / "cache/sha256").glob("[0-9a-f]*[0-9a-f]"))
    stored = [one for one in stored if one.suffix != ".lock"]
    assert len(stored) == 2
    stored[0].write_bytes(b"rotten")
    assert of_layout(path, tmp_path) == FILES
    assert stored[0].read_bytes() != b"rotten"


def test_many_builds_at_once(tmp_path: Path) -> None:
    path = layout(tmp_path / "layout", *LAYERS, pack=gzipped, suffix="+gzip")
    results: list[list[bytes]] = []
    threads = [threading.Thread(target=lambda: results.append(of_layout(path, tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [FILES] * 8
    assert not list((tmp_path / "cache/sha256").glob(".*"))


def test_prune(tmp_path: Path) -> None:
    of_layout(layout(tmp_path / "layout", *LAYERS), tmp_path)
    cache = LayerCache(tmp_path / "cache")
    assert cache.prune(3600) == (0, 0)
    count, size = cache.prune(0)
    assert count == 2
    assert size > 0
    assert list((tmp_path / "cache/sha256").iterdir()) == []
    assert LayerCache(tmp_path / "none").prune(0) == (0, 0)


def changed(directory: Path, change: Callable[[dict[str, Any]], object], what: str) -> Path:
    """A layout whose index, manifest or configuration is changed, and all digests above it."""
    path = layout(directory / "layout", *LAYERS, pack=gzipped, suffix="+gzip")

    def blob(descriptor: dict[str, Any]) -> Path:
        return path / "blobs/sha256" / str(descriptor["digest"]).removeprefix("sha256:")

    def write(descriptor: dict[str, Any], value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        descriptor["digest"], descriptor["size"] = digest(data), len(data)
        blob(descriptor).write_bytes(data)

    index = json.loads((path / "index.json").read_text())
    manifest = json.loads(blob(index["manifests"][0]).read_bytes())
    config = json.loads(blob(manifest["config"]).read_bytes())
    change({"index": index, "manifest": manifest, "config": config}[what])
    if what == "config":
        write(manifest["config"], config)
    if what != "index":
        write(index["manifests"][0], manifest)
    (path / "index.json").write_text(json.dumps(index))
    return path


def loop(index: dict[str, Any]) -> None:
    """Its entry claims to be an index."""
    index["manifests"][0]["mediaType"] = INDEX


HOSTILE: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    # what is changed, how, and how the message ends
    "no manifests": ("index", lambda made: made.update(manifests=[]), "0 images, expected 1; tags are none"),
    "manifests that are none": ("index", lambda made: made.update(manifests=5), "manifests: int, expected a list"),
    "very many": ("index", lambda made: made.update(manifests=[{}] * 2000), "2000 of them, expected at most 1024"),
    "another digest": (
        "index",
        lambda made: made["manifests"][0].update(digest=f"sha256:{'0' * 64}"),
        f"no file blobs/sha256/{'0' * 64}",
    ),
    "a digest that leads out": (
        "index",
        lambda made: made["manifests"][0].update(digest="sha256:../../../etc/passwd"),
        "digest 'sha256:../../../etc/passwd', expected sha256: and 64 hexadecimal digits",
    ),
    "another algorithm": (
        "index",
        lambda made: made["manifests"][0].update(digest="md5:00"),
        "digest 'md5:00', expected sha256: and 64 hexadecimal digits",
    ),
    "another size": ("index", lambda made: made["manifests"][0].update(size=7), "bytes, expected 7"),
    "a size below zero": (
        "index",
        lambda made: made["manifests"][0].update(size=-1),
        "size -1, expected 0 to 68719476736 bytes",
    ),
    "an index that is none": ("index", loop, "0 images for linux/amd64, expected 1; there are none"),
    "an artifact": (
        "manifest",
        lambda made: made["config"].update(mediaType="application/vnd.example"),
        "config of type 'application/vnd.example', expected that of a container image",
    ),
    "a foreign layer": (
        "manifest",
        lambda made: made["layers"][0].update(mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        "expected a tar, plain, gzip or zstd",
    ),
    "very many layers": (
        "manifest",
        lambda made: made.update(layers=made["layers"] * 300),
        "600 of them, expected at most 512",
    ),
    "fewer layers": ("manifest", lambda made: made["layers"].pop(), "1 layers, but 2 diff_ids in its configuration"),
    "an old schema": ("manifest", lambda made: made.update(schemaVersion=1), "schemaVersion 1, expected 2"),
    "a layer of another size": (
        "manifest",
        lambda made: made["layers"][0].update(size=made["layers"][0]["size"] + 1),
        "bytes, expected 183",
    ),
    "another system": ("config", lambda made: made.update(os="windows"), "an image for 'windows', expected linux"),
    "another tar": (
        "config",
        lambda made: made["rootfs"]["diff_ids"].__setitem__(0, f"sha256:{'0' * 64}"),
        f"expected sha256:{'0' * 64} as in the configuration",
    ),
    "no diff IDs": ("config", lambda made: made.pop("rootfs"), "rootfs: NoneType, expected an object"),
    "a command that is a word": (
        "config",
        lambda made: made.update(config={"Cmd": "sh"}),
        "Cmd: str, expected a list",
    ),
    "a command of numbers": (
        "config",
        lambda made: made.update(config={"Cmd": [1]}),
        "Cmd has something that is no string",
    ),
    "a time that is none": (
        "config",
        lambda made: made.update(created="yesterday"),
        "created 'yesterday', expected a time as RFC 3339 has them",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_layouts(name: str, tmp_path: Path) -> None:
    what, change, message = HOSTILE[name]
    path = changed(tmp_path, change, what)
    found = refusal(lambda: of_layout(path, tmp_path))
    assert found.startswith(str(path))
    if "expected 183" in message:
        assert ": layer 0: " in found
    else:
        assert found.endswith(message)


def test_broken_layers(tmp_path: Path) -> None:
    for data, message in (
        (gzip.compress(tar(LAYERS[0]))[:-9], "gzip ends before its stream does"),
        (b"\x1f\x8b\x08\x00junk" * 10, "damaged gzip"),
        (b"no tar" * 200, "not a tar, or a broken one"),
        (tar(LAYERS[0])[:700], "broken, or cut off"),
        (b"\x28\xb5\x2f\xfd", "zstd ends before its stream does"),
    ):
        made = Layout(tmp_path / hashlib.sha256(data).hexdigest())
        plain = data if data.startswith((b"no", b"bin")) else tar(LAYERS[0])
        made.add(made.manifest([plain], pack=lambda layer, stored=data: stored, suffix="+gzip"))  # type: ignore[misc]
        path = made.write()
        assert message in refusal(lambda path=path: of_layout(path, tmp_path))  # type: ignore[misc]


def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_module, "MIN_UNPACKED_SIZE", 1 << 20)
    path = layout(tmp_path / "layout", [member("zeros", bytes(3 << 20))], pack=gzipped, suffix="+gzip")
    assert refusal(lambda: of_layout(path, tmp_path)).endswith("gzip becomes more than 1048576 bytes")
    assert [one.suffix for one in (tmp_path / "cache/sha256").iterdir()] == [".lock"]


def test_what_is_no_layout(tmp_path: Path) -> None:
    assert refusal(lambda: of_layout(tmp_path, tmp_path)) == f"{tmp_path}: no file oci-layout"
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion": "2.0"}')
    assert refusal(lambda: of_layout(tmp_path, tmp_path)) == f"{tmp_path}: layout of version '2.0', expected 1.0.0"
    (tmp_path / "x.tar").write_bytes(b"junk" * 1000)
    message = refusal(lambda: files_of(partial(archived, tmp_path / "x.tar"), tmp_path))
    assert message.startswith(f"{tmp_path}/x.tar: not a tar, or a broken one")


def test_giving_up_does_not_wait_for_what_is_left(tmp_path: Path) -> None:
    """Someone interrupts while layers are still coming: they stop at their next piece."""

    class Interrupted(BaseException):
        pass

    started = threading.Event()
    given_up: list[str] = []

    class Slow:
        size = 1 << 40

        def chunks(self) -> Iterator[bytes]:
            started.set()
            try:
                while True:
                    yield bytes(1 << 16)
            finally:
                given_up.append("yes")

    class Broken:
        size = 5

        def chunks(self) -> Iterator[bytes]:
            yield b""
            started.wait()
            raise Interrupted

    path = layout(tmp_path / "layout", *LAYERS)
    with ExitStack() as files:
        image = open_layout(path, None, None, files)
        contents: list[Content] = [Broken(), Slow()]
        blobs = [replace(one, content=content) for one, content in zip(image.layers, contents, strict=True)]
        image = replace(image, layers=tuple(blobs))
        cache = LayerCache(tmp_path / "cache")
        with pytest.raises(Interrupted):
            read_layers(image, cache, files, lambda name, done, size: None)
    assert given_up == ["yes"]
    assert not list((tmp_path / "cache/sha256").glob(".*"))
