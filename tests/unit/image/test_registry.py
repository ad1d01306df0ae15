# SPDX-License-Identifier: Apache-2.0
"""Images from registries: a scripted one that misbehaves, and Debian's, which is a real one."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from oci_layouts import Layout, directory, gzipped, layout, member, tar
from scripted_registry import Answer, Script, query, serving

from enclavekit.eif import Arch
from enclavekit.errors import Error, OfflineError, SourceError
from enclavekit.image.container import read_layers
from enclavekit.image.layer_cache import LayerCache
from enclavekit.image.reference import Reference
from enclavekit.image.registry import Registry
from enclavekit.image.registry_auth import Credentials, DockerConfig

LAYER = [directory("bin"), member("bin/app", b"app" * 1000, mode=0o755)]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """Serves team/app:latest, of two layers."""
    made = Script()
    made.load(layout(tmp_path / "layout", LAYER, [member("etc/conf", b"conf")], pack=gzipped, suffix="+gzip"))
    with serving(made):
        yield made


@dataclass
class Impatient(Registry):
    """Remembers how long it would have waited."""

    pauses: list[float] = field(default_factory=list)


def client(script: Script, name: str = "team/app", config: DockerConfig | None = None) -> Impatient:
    registry = Impatient(Reference.parse(f"//{script.host}/{name}"), config or DockerConfig())
    registry.pause = registry.pauses.append
    return registry


def names(registry: Registry, scratch: Path, arch: Arch | None = None) -> list[bytes]:
    """Of all files of the image."""
    with ExitStack() as files:
        tree, _ = read_layers(registry.find(arch), LayerCache(scratch / "cache"), files, lambda name, done, size: None)
        return [name for name, _ in tree.items()]


def refusal(registry: Registry, scratch: Path, kind: type[Error] = SourceError) -> str:
    with pytest.raises(kind) as caught:
        names(registry, scratch)
    assert type(caught.value) is kind
    return caught.value.message.replace(registry.reference.host, "HOST")


FILES = [b"", b"bin", b"bin/app", b"etc", b"etc/conf"]


def test_by_tag_and_by_digest(script: Script, tmp_path: Path) -> None:
    assert names(client(script), tmp_path) == FILES
    digest = client(script).find(None).manifest
    assert names(client(script, f"team/app@{digest}"), tmp_path) == FILES
    assert not any("authorization" in headers for _, headers in script.requests)


def test_layers_are_fetched_once(script: Script, tmp_path: Path) -> None:
    names(client(script), tmp_path)
    layers = [path for path, _ in script.requests if "/blobs/" in path]
    assert len(layers) == 3  # the configuration, and two layers
    names(client(script), tmp_path)
    assert len([path for path, _ in script.requests if "/blobs/" in path]) == 4  # the configuration again


def test_the_index_chooses_by_architecture(tmp_path: Path) -> None:
    made = Layout(tmp_path / "layout")
    entries = []
    for architecture in ("arm64", "amd64"):
        one = made.manifest([tar([member(architecture)])], architecture=architecture)
        entries.append({**one, "platform": {"os": "linux", "architecture": architecture}})
    entries.append({**entries[0], "platform": {"os": "windows", "architecture": "amd64"}})
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries}
    made.add(made.blob(json.dumps(index).encode(), "application/vnd.oci.image.index.v1+json"))
    script = Script()
    script.load(made.write())
    with serving(script):
        assert names(client(script), tmp_path) == [b"", b"amd64"]
        assert names(client(script), tmp_path, Arch.AARCH64) == [b"", b"arm64"]


def test_too_many_requests_and_busy_servers(script: Script, tmp_path: Path) -> None:
    answers: list[Answer] = [(429, {"Retry-After": "7"}, b""), (503, {}, b""), (500, {}, b"")]
    script.before = lambda path, headers: answers.pop(0) if answers else None
    registry = client(script)
    assert names(registry, tmp_path) == FILES
    assert registry.pauses == [7.0, 2.0, 4.0]


def test_a_server_that_stays_busy(script: Script, tmp_path: Path) -> None:
    script.before = lambda path, headers: (503, {"Retry-After": "99999"}, b"no json")
    registry = client(script)
    assert refusal(registry, tmp_path) == "HOST/team/app:latest: the registry says 503"
    assert registry.pauses == [60.0] * 4


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_off_goes_on(script: Script, tmp_path: Path, ranges: bool) -> None:
    script.cut_after = 60
    script.ranges = ranges
    assert names(client(script), tmp_path) == FILES
    assert [headers["range"] for _, headers in script.requests if "range" in headers] == ["bytes=60-"]


def test_nobody_is_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        registry = client(Script(port=taken.getsockname()[1]))
        assert refusal(registry, tmp_path, OfflineError) == "HOST: cannot be reached: connection refused"
    assert registry.pauses == [1.0, 2.0, 4.0, 8.0]


def test_wrong_bytes(script: Script, tmp_path: Path) -> None:
    tag = script.tags["latest"]
    manifest = json.loads(tag)
    layer = manifest["layers"][0]
    good = script.blobs[layer["digest"]]
    script.blobs[layer["digest"]] = good[:-1] + b"?"
    assert refusal(client(script), tmp_path).startswith("HOST/team/app:latest: layer 0 (")
    script.blobs[layer["digest"]] = good + b"more"
    assert refusal(client(script), tmp_path).endswith(f"more than {len(good)} bytes")
    script.blobs[layer["digest"]] = good
    digest = client(script).find(None).manifest
    script.blobs[str(digest)] = tag + b" "
    assert "expected sha256:" in refusal(client(script, f"team/app@{digest}"), tmp_path)
    script.before = lambda path, headers: (
        (200, {"Docker-Content-Digest": f"sha256:{'0' * 64}"}, tag) if "/manifests/" in path else None
    )
    assert "expected sha256:0000" in refusal(client(script), tmp_path)


def test_a_layer_whose_tar_is_another(tmp_path: Path) -> None:
    made = Layout(tmp_path / "layout")
    made.add(made.manifest([tar(LAYER)], rootfs={"type": "layers", "diff_ids": [f"sha256:{'0' * 64}"]}))
    script = Script()
    script.load(made.write())
    with serving(script):
        message = refusal(client(script), tmp_path)
    assert message.endswith(f"expected sha256:{'0' * 64} as in the configuration")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {}, b'{"errors":[{"message":"not\\u001b here"}]}'), "the registry says 404: not  here"),
        ((403, {}, b""), "the registry says 403"),
        ((418, {}, b"[]"), "the registry says 418"),
        ((401, {}, b""), "the registry says 401"),
        ((401, {"WWW-Authenticate": "Negotiate x"}, b""), "the registry wants 'Negotiate', expected Basic or Bearer"),
        ((401, {"WWW-Authenticate": 'Basic realm="x"'}, b""), "the registry wants a name and password"),
        (
            (401, {"WWW-Authenticate": 'Bearer realm="ftp://x/"'}, b""),
            "tokens from 'ftp://x/', expected https",
        ),
        ((302, {"Location": "ftp://x/"}, b""), "sent to 'ftp://x/', expected https"),
        ((302, {"Location": "/again"}, b""), "more than 5 redirects"),
        ((200, {}, b"not json"), "manifest: the answer is not JSON"),
        ((200, {}, b"{}"), "manifest: of type '', expected an image's or an index's"),
        (
            (200, {"Content-Type": "text/html"}, b"{}"),
            "manifest: of type 'text/html', expected an image's or an index's",
        ),
        ((200, {}, b"[" + b" " * (4 << 20) + b"]"), "manifest: more than 4194304 bytes"),
    ],
)
def test_answers_that_are_none(script: Script, tmp_path: Path, answer: Answer, message: str) -> None:
    script.before = lambda path, headers: answer
    assert refusal(client(script), tmp_path) == f"HOST/team/app:latest: {message}"


def test_redirects_do_not_tell_others_who_we_are(script: Script, tmp_path: Path) -> None:
    elsewhere = Script(blobs=script.blobs)
    with serving(elsewhere):

        def before(path: str, headers: dict[str, str]) -> Answer | None:
            if headers.get("authorization") != Credentials("me", "secret").basic:
                return 401, {"WWW-Authenticate": "Basic realm=x"}, b""
            if "/blobs/" in path:
                return 307, {"Location": f"http://{elsewhere.host}{path}"}, b""
            return None

        script.before = before
        config = DockerConfig(auths={script.host: {"username": "me", "password": "secret"}})
        assert names(client(script, config=config), tmp_path) == FILES
    assert len(elsewhere.requests) == 3
    assert not any("authorization" in headers for _, headers in elsewhere.requests)


def bearer(script: Script, wanted: str | None = None) -> None:
    """The registry wants a token, and its service wants to know who asks."""

    def before(path: str, headers: dict[str, str]) -> Answer | None:
        if path.startswith("/token"):
            if wanted and headers.get("authorization") != wanted:
                return 401, {}, b'{"errors":[{"message":"wrong password"}]}'
            return 200, {}, b'{"token": "t0ken"}'
        if headers.get("authorization") != "Bearer t0ken":
            realm = f"http://{script.host}/token"
            challenge = f'Bearer realm="{realm}",service="reg",scope="repository:team/app:pull"'
            return 401, {"WWW-Authenticate": challenge}, b""
        return None

    script.before = before


def test_tokens(script: Script, tmp_path: Path) -> None:
    bearer(script)
    assert names(client(script), tmp_path) == FILES
    asked = [path for path, _ in script.requests if path.startswith("/token")]
    assert query(asked[0]) == {"service": ["reg"], "scope": ["repository:team/app:pull"]}
    assert len(asked) == 1


def test_tokens_for_those_who_log_in(script: Script, tmp_path: Path) -> None:
    bearer(script, Credentials("me", "secret").basic)
    assert refusal(client(script), tmp_path) == (
        "HOST/team/app:latest: token service 127.0.0.1: says 401: wrong password"
    )
    packed = base64.b64encode(b"me:secret").decode()
    config = DockerConfig(auths={script.host: {"auth": packed}})
    assert names(client(script, config=config), tmp_path) == FILES


def test_identity_tokens_are_posted(script: Script, tmp_path: Path) -> None:
    bearer(script)
    config = DockerConfig(auths={script.host: {"identitytoken": "refresh"}})
    assert names(client(script, config=config), tmp_path) == FILES
    (form,) = [headers["body"] for path, headers in script.requests if path.startswith("/token")]
    assert "grant_type=refresh_token" in form
    assert "refresh_token=refresh" in form


@contextmanager
def debian_registry(tmp_path: Path, auth: str = "") -> Iterator[str]:
    """Debian's docker-registry on loopback."""
    if shutil.which("docker-registry") is None or shutil.which("skopeo") is None:
        pytest.skip("no programs docker-registry and skopeo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "registry.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/data}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n{auth}"
    )
    process = subprocess.Popen(
        ["docker-registry", "serve", tmp_path / "registry.yml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def push(made: Path, registry: str, *words: str) -> None:
    subprocess.run(
        ["skopeo", "copy", "-q", "--dest-tls-verify=false", *words, f"oci:{made}:latest", f"docker://{registry}/a/b:1"],
        check=True,
    )


def test_a_real_registry(tmp_path: Path) -> None:
    made = layout(tmp_path / "layout", LAYER, [member("etc/conf", b"conf")], pack=gzipped, suffix="+gzip")
    with debian_registry(tmp_path) as host:
        push(made, host)
        registry = Registry(Reference.parse(f"//{host}/a/b:1"), DockerConfig())
        assert names(registry, tmp_path) == FILES
        missing = Registry(Reference.parse(f"//{host}/a/none"), DockerConfig())
        assert refusal(missing, tmp_path) == "HOST/a/none:latest: the registry says 404: manifest unknown"


def test_a_real_registry_that_wants_a_password(tmp_path: Path) -> None:
    made = layout(tmp_path / "layout", LAYER, [member("etc/conf", b"conf")], pack=gzipped, suffix="+gzip")
    # Of "secret", by bcrypt.
    (tmp_path / "htpasswd").write_text("user:$2b$04$WnqlS.7HhFB8WfMaOdH2yOpfFQaNtLko4DQpOqmqpTsxi3i144D2K\n")
    with debian_registry(tmp_path, f"auth: {{htpasswd: {{realm: here, path: {tmp_path}/htpasswd}}}}\n") as host:
        push(made, host, "--dest-creds", "user:secret")

        def registry(password: str | None) -> Registry:
            entry = {"auth": base64.b64encode(f"user:{password}".encode()).decode()}
            config = DockerConfig(auths={host: entry} if password else {})
            return Registry(Reference.parse(f"//{host}/a/b:1"), config)

        assert names(registry("secret"), tmp_path) == FILES
        assert refusal(registry("wrong"), tmp_path).startswith("HOST/a/b:1: the registry says 401")
        assert refusal(registry(None), tmp_path) == "HOST/a/b:1: the registry wants a name and password"
