# SPDX-License-Identifier: Apache-2.0
"""enclave.toml: what is read, where paths lead, what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from enclavekit.build.project import KEYS, read_project, template
from enclavekit.errors import FileError, ProjectError


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "enclave.toml"
    path.write_text(text)
    return dict(read_project(path).values)


def test_every_key(tmp_path: Path) -> None:
    text = "".join(line.removeprefix("# ") if " = " in line else line for line in template().splitlines(True))
    found = read(tmp_path, text)
    assert found == {
        "source": f"oci:{tmp_path}/layout:latest",
        "target": str(tmp_path / "app.eif"),
        "name": "app",
        "version": "1.0",
        "arch": "x86_64",
        "keep_owners": False,
        "compat": "nitro-cli",
        "blobs": str(tmp_path / "blobs"),
        "kernel": str(tmp_path / "bzImage"),
        "modules": str(tmp_path / "modules"),
        "cmdline": "reboot=k panic=1",
        "entrypoint": "/bin/app",
        "command": ["--port", "80"],
        "env": ["NAME=value"],
        "workdir": "/srv",
        "user": "app:app",
        "stop_signal": "SIGINT",
        "logs": True,
        "attest": True,
        "launch_value": ["GREETING"],
        "memory": "512M",
        "cpus": 2,
        "sign_cert": str(tmp_path / "release.pem"),
        "sign_key": str(tmp_path / "a.key"),
        "pkcs11_module": "/x.so",
    }
    assert set(found) == {key.parameter for key in KEYS}


@pytest.mark.parametrize(
    ("line", "parameter", "expected"),
    [
        ('[image]\nsource = "docker://a/b:1"', "source", "docker://a/b:1"),
        ('[image]\nsource = "docker-daemon:a:1"', "source", "docker-daemon:a:1"),
        ('[image]\nsource = "docker-archive:a.tar"', "source", "docker-archive:{}/a.tar"),
        ('[image]\nsource = "dir:/a"', "source", "dir:/a"),
        ('[signing]\nkey = "arn:aws:kms:a"', "sign_key", "arn:aws:kms:a"),
        ('[signing]\nkey = "pkcs11:token=a"', "sign_key", "pkcs11:token=a"),
        ('[kernel]\npath = "6.12"', "kernel", "6.12"),
        ("[command]\nentrypoint = \"sh -c 'a b'\"", "entrypoint", "sh -c 'a b'"),
        ('[command]\nentrypoint = ["sh", "-c", "a b"]', "entrypoint", "sh -c 'a b'"),
    ],
)
def test_values(tmp_path: Path, line: str, parameter: str, expected: str) -> None:
    assert read(tmp_path, line) == {parameter: expected.format(tmp_path)}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[image]\nsorce = 1", "image.sorce: unknown key", "did you mean image.source?"),
        ("[comand]\nuser = 1", "comand: unknown key", "did you mean command?"),
        ("[zzz]\na = 1", "zzz: unknown key", "known: image, kernel, command, resources, signing"),
        ("image = 1", "image: expected a table", "[image]"),
        ("[command]\nlogs = 1", "command.logs: got 1, expected true or false", "logs = true"),
        ("[command]\nuser = 1000", "command.user: got 1000, expected a string", 'user = "app:app"'),
        ("[resources]\ncpus = true", "resources.cpus: got True, expected a number", "cpus = 2"),
        (
            "[command]\nenv = { A = 1 }",
            "command.env: got {'A': 1}, expected a table of strings",
            'env = { NAME = "value" }',
        ),
        (
            '[command]\narguments = ["a", 1]',
            "command.arguments: got ['a', 1], expected a list of strings",
            'arguments = ["--port", "80"]',
        ),
        (
            '[image]\nsource = "rootfs"',
            "image.source: 'rootfs', expected one of dir:, tar:, oci:, oci-archive:, docker-archive:, docker-daemon:,"
            " docker:",
            None,
        ),
        ("[image\n", "expected ']' at the end of a table declaration (at line 1, column 7)", None),
        ("a = " + "[" * 5000, "not text in UTF-8, or nested too deeply", None),
        ("#" * ((1 << 20) + 1), "more than 1048576 bytes", None),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    with pytest.raises(ProjectError) as caught:
        read(tmp_path, text)
    assert (caught.value.message, caught.value.hint) == (f"{tmp_path / 'enclave.toml'}: {message}", hint)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "enclave.toml"
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ProjectError):
        read_project(path)
    with pytest.raises(FileError):
        read_project(tmp_path / "none")


@pytest.mark.parametrize("source", [None, "dir:./a", 'dir:./odd "name"\\'])
def test_the_template_is_toml(source: str | None) -> None:
    assert tomllib.loads(template(source))["image"] == {
        "output": "app.eif",
        **({} if source is None else {"source": source}),
    }
