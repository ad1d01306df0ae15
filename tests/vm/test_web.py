# SPDX-License-Identifier: Apache-2.0
"""A real application: a Python web service on Debian, built by a user who may nothing, answering over vsock."""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Enclave, stop

from enclavekit.environment import data_directory
from enclavekit.runtime.find import find_kernel

PYTHON_PACKAGES = (
    "click",
    "rich",
    "cbor2",
    "cryptography",
    "cffi",
    "_cffi_backend",
    "pygments",
    "markdown_it",
    "mdurl",
)


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The runtime's, where every user can read it, as options."""
    found = find_kernel(data_directory() / "runtime")
    assert found.modules is not None
    place = tmp_path_factory.mktemp("kernel")
    shutil.copyfile(found.path, place / found.path.name)
    shutil.copytree(found.modules, place / "modules", symlinks=True)
    return ["--kernel", str(place / found.path.name), "--modules", str(place / "modules")]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``enclave`` where every user can read it: this one may be in a place that is only ours."""
    place = tmp_path_factory.mktemp("program")
    for name in ("enclavekit", *PYTHON_PACKAGES):
        found = importlib.util.find_spec(name)
        assert found is not None, name
        assert found.origin is not None
        if found.submodule_search_locations:
            directory = Path(found.origin).parent
            shutil.copytree(directory, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(found.origin, place)
    python = f"/usr/bin/python3.{sys.version_info.minor}"
    return [
        python if Path(python).exists() else sys.executable, "-c",
        f"import sys; sys.path.insert(0, {str(place)!r}); from enclavekit.cli.main import main; main()",
    ]  # fmt: skip


def open_to_all(*paths: Path) -> None:
    subprocess.run(["chmod", "-R", "a+rX", *paths], check=True)
    for parent in {parent for path in paths for parent in path.parents}:
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)


def request(path: Path, head: bytes, body: bytes = b"") -> tuple[bytes, bytes]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(b"CONNECT 8080\n" + head + f" HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        received = b""
        while part := client.recv(65536):
            received += part
    line, _, answer = received.partition(b"\n")
    assert line.startswith(b"OK ")
    headers, _, content = answer.partition(b"\r\n\r\n")
    return headers.splitlines()[0], content


def ordinary_programs(place: Path, port: int) -> None:
    """curl through the published port, socat through the Unix socket."""
    curl = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60"]
    url = f"http://127.0.0.1:{port}"
    done = subprocess.run(
        [*curl, "--data-binary", "@-", f"{url}/upper"], input=b"x" * 300_000, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"X" * 300_000
    asked = b"CONNECT 8080\nGET / HTTP/1.0\r\n\r\n"
    done = subprocess.run(
        ["socat", "-t", "60", "-", f"UNIX-CONNECT:{place}"], input=asked, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"OK ")
    assert b"HTTP/1.0 200 OK" in done.stdout


def test_a_web_service(enclave: Enclave, layout: Path, kernel: list[str], program: list[str], tmp_path: Path) -> None:
    """Two users in two time zones build the same file, which then serves requests."""
    images = tmp_path / "mine.eif", tmp_path / "nobody" / "theirs.eif"
    images[1].parent.mkdir()
    users: list[dict[str, object]] = [{}, {}]
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(images[1].parent, nobody.pw_uid, nobody.pw_gid)
        open_to_all(tmp_path, layout.parent, Path(kernel[1]).parent, Path(program[2].split("'")[1]))
        users[1] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    for image, user, zone in zip(images, users, ("America/New_York", "Asia/Tokyo"), strict=True):
        variables = {
            "PATH": os.environ["PATH"],
            "TZ": zone,
            "HOME": str(image.parent),
        }
        words = [*program, "build", f"oci:{layout}", "-o", image, "--logs", *kernel]
        done = subprocess.run(  # type: ignore[call-overload]
            words, env=variables, capture_output=True, text=True, cwd=image.parent, umask=0o027, check=False, **user
        )
        assert done.returncode == 0, done.stderr
    assert images[0].read_bytes() == images[1].read_bytes()
    if os.getuid() == 0:
        assert images[1].stat().st_uid == nobody.pw_uid

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = enclave.start("run", images[1], "--publish", f"{port}:8080")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening on vsock port 8080\n"
        (name,) = enclave.left()
        place = enclave.directory / name / "vsock.sock"
        status, content = request(place, b"GET /")
        assert status == b"HTTP/1.0 200 OK"
        said = json.loads(content)
        assert said["bottle"] == "0.13.4"
        assert (said["directory"], said["uid"]) == ("/srv", 33)
        assert request(place, b"POST /upper", b"hello" * 10_000) == (b"HTTP/1.0 200 OK", b"HELLO" * 10_000)
        assert request(place, b"GET /none")[0] == b"HTTP/1.0 404 Not Found"
        ordinary_programs(place, port)
    finally:
        stop(process)
