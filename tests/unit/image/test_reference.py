# SPDX-License-Identifier: Apache-2.0
"""Names of images, and who we are to registries."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from enclavekit.errors import SourceError
from enclavekit.image.reference import Reference
from enclavekit.image.registry_auth import Credentials, DockerConfig

DIGEST = f"sha256:{'ab' * 32}"


@pytest.mark.parametrize(
    ("text", "full", "origin"),
    [
        ("alpine", "docker.io/library/alpine:latest", "https://registry-1.docker.io"),
        ("//alpine:3", "docker.io/library/alpine:3", "https://registry-1.docker.io"),
        ("a/b", "docker.io/a/b:latest", "https://registry-1.docker.io"),
        ("index.docker.io/a/b", "docker.io/a/b:latest", "https://registry-1.docker.io"),
        ("ghcr.io/a/b/c:1.2-x_y", "ghcr.io/a/b/c:1.2-x_y", "https://ghcr.io"),
        ("localhost/x", "localhost/x:latest", "http://localhost"),
        ("localhost:5000/x", "localhost:5000/x:latest", "http://localhost:5000"),
        ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest", "http://127.0.0.1:5000"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "http://[::1]:5000"),
        ("host:443/x", "host:443/x:latest", "https://host:443"),
        ("127.0.0.1.evil.example/x", "127.0.0.1.evil.example/x:latest", "https://127.0.0.1.evil.example"),
        (f"a.b/x@{DIGEST}", f"a.b/x@{DIGEST}", "https://a.b"),
        (f"a.b/x:1@{DIGEST}", f"a.b/x@{DIGEST}", "https://a.b"),
    ],
)
def test_names(text: str, full: str, origin: str) -> None:
    found = Reference.parse(text)
    assert str(found) == full
    assert found.origin == origin


@pytest.mark.parametrize(
    "text",
    [
        *("", "//", "UPPER", "a b", "a/../b", "a//b", "a:", "a:b:c", "host.example/", "a@b", "x" * 300, "a\n"),
        *("h.example/a:" + "t" * 200, "user@host.example/x", "host.example:99999999/x"),
    ],
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(SourceError) as caught:
        Reference.parse(text)
    assert caught.value.message.startswith("image name ")


def config(directory: Path, **made: object) -> DockerConfig:
    (directory / "config.json").write_text(json.dumps(made))
    return DockerConfig.read(directory / "config.json", str(directory / "bin"))


def helper(directory: Path, name: str, script: str) -> None:
    (directory / "bin").mkdir(exist_ok=True)
    path = directory / "bin" / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_no_configuration(tmp_path: Path) -> None:
    assert DockerConfig.read(tmp_path / "none").credentials("a.b") is None


def test_stored(tmp_path: Path) -> None:
    auths = {
        "a.b": {"auth": base64.b64encode(b"me:se:cret").decode()},
        "https://c.d": {"username": "you", "password": "word"},
        "https://e.f/v1/": {"identitytoken": "token"},
        "https://index.docker.io/v1/": {"auth": base64.b64encode(b"hub:x").decode()},
        "empty.example": {},
    }
    found = config(tmp_path, auths=auths)
    assert found.credentials("a.b") == Credentials("me", "se:cret")
    assert found.credentials("c.d") == Credentials("you", "word")
    assert found.credentials("e.f") == Credentials(identity_token="token")  # noqa: S106
    assert found.credentials("docker.io") == Credentials("hub", "x")
    assert found.credentials("b") is None
    assert found.credentials("empty.example") is None
    assert "secret" not in repr(Credentials("me", "secret", "secret"))


def test_helpers(tmp_path: Path) -> None:
    helper(tmp_path, "one", """read host; echo "{\\"Username\\": \\"u-$host\\", \\"Secret\\": \\"s\\"}" """)
    helper(tmp_path, "two", """echo '{"Username": "<token>", "Secret": "identity"}'""")
    found = config(tmp_path, credHelpers={"a.b": "one"}, credsStore="two")
    assert found.credentials("a.b") == Credentials("u-a.b", "s")
    assert found.credentials("c.d") == Credentials(identity_token="identity")  # noqa: S106


def test_helpers_that_fail(tmp_path: Path) -> None:
    helper(tmp_path, "none", "echo credentials not found in native keychain; exit 1")
    helper(tmp_path, "bad", "echo locked >&2; exit 3")
    helper(tmp_path, "odd", "echo hello")
    names = {"b.example": "bad", "o.example": "odd", "m.example": "missing", "p.example": "../../evil"}
    found = config(tmp_path, credHelpers=names, credsStore="none")
    assert found.credentials("x.example") is None
    for host, message in (
        ("b.example", "docker-credential-bad: failed for b.example: locked"),
        ("o.example", "docker-credential-odd: its answer is not JSON"),
        ("m.example", "docker-credential-missing: not installed, but docker's configuration names it for m.example"),
        ("p.example", "credential helper '../../evil': expected a name, as ecr-login or pass"),
    ):
        with pytest.raises(SourceError) as caught:
            found.credentials(host)
        assert caught.value.message == message


def test_configurations_that_are_none(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"auths": [1]}', '{"credHelpers": 5}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(SourceError):
            DockerConfig.read(tmp_path / "config.json")
    for auth in ("%%%", base64.b64encode(b"nocolon").decode()):
        with pytest.raises(SourceError):
            config(tmp_path, auths={"a.b": {"auth": auth}}).credentials("a.b")
