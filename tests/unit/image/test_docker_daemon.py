# SPDX-License-Identifier: Apache-2.0
"""Images from a docker daemon's socket."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from oci_layouts import member, tar
from scripted_daemon import scripted_daemon

from enclavekit.errors import NoDockerError, NoImageError, SourceError
from enclavekit.image.container import ContainerImage
from enclavekit.image.docker_daemon import open_daemon
from enclavekit.image.oci import Digest


def archive(command: str = "app") -> bytes:
    """What ``docker save`` writes, without a tag, as by its id."""
    layer = tar([member("file", b"content")])
    config = {
        "os": "linux",
        "architecture": "amd64",
        "config": {"Cmd": [command]},
        "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(layer))]},
    }
    out = io.BytesIO()
    files = {
        "c.json": json.dumps(config).encode(),
        "l.tar": layer,
        "manifest.json": json.dumps([{"Config": "c.json", "RepoTags": None, "Layers": ["l.tar"]}]).encode(),
    }
    with tarfile.open(fileobj=out, mode="w") as made:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return out.getvalue()


def ask(tmp_path: Path, name: str, archives: Mapping[str, bytes], files: ExitStack) -> tuple[ContainerImage, list[str]]:
    with scripted_daemon(tmp_path / "s", archives) as asked:
        none = tmp_path / "none.sock"
        return open_daemon(name, None, [none, tmp_path / "s"], files, scratch=tmp_path), asked


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("app", "app:latest"),
        ("app:1", "app:1"),
        ("host:5000/a/b", "host:5000/a/b:latest"),
        ("a@sha256:0", "a@sha256:0"),
        ("sha256:12", "sha256:12"),
    ],
)
def test_an_image_by_any_name(tmp_path: Path, name: str, asked: str) -> None:
    with ExitStack() as files:
        image, paths = ask(tmp_path, name, {asked: archive()}, files)
        assert image.config.command == ("app",)
        assert image.name == f"docker daemon: {asked}"
        assert b"content" in b"".join(image.layers[0].content.chunks())
    assert paths == [f"/images/{asked.replace('/', '%2F').replace(':', '%3A').replace('@', '%40')}/get"]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (None, NoImageError, "docker daemon: app:latest: no such image"),
        (b"broken", SourceError, 'docker daemon: app:latest: status 500: {"message": "no"}'),
        (b"short", SourceError, "docker daemon: app:latest: "),
        (b"no tar at all", SourceError, ""),
    ],
)
def test_a_daemon_that_has_it_not(tmp_path: Path, data: bytes | None, kind: type[SourceError], message: str) -> None:
    with ExitStack() as files, pytest.raises(kind) as caught:
        ask(tmp_path, "app", {} if data is None else {"app:latest": data}, files)
    assert caught.value.message.startswith(message)


def test_no_daemon(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with ExitStack() as files, pytest.raises(NoDockerError) as caught:
        open_daemon("app", None, [tmp_path / "none", tmp_path / "file"], files, scratch=None)
    assert caught.value.message == (
        f"no docker daemon ({tmp_path}/none: no such file or directory; {tmp_path}/file: connection refused)"
    )
    with ExitStack() as files, pytest.raises(NoDockerError, match=r"^no docker daemon \(no socket\)$"):
        open_daemon("app", None, [], files, scratch=None)
