# SPDX-License-Identifier: Apache-2.0
"""Container images and signed images, booted: what they say of how they run is so inside."""

from __future__ import annotations

import json
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

from conftest import Enclave
from oci_layouts import Layout, directory, gzipped, member, tar, whiteout


def container(path: Path, rootfs: Path) -> Path:
    """The root file system, and two layers more, with everything that an image can say."""
    base = BytesIO()
    with tarfile.open(fileobj=base, mode="w") as out:
        for one in sorted(rootfs.rglob("*")):
            out.add(one, one.relative_to(rootfs), recursive=False)
    layers = [
        base.getvalue(),
        tar([directory("srv", 0o755, uid=1000, gid=1000), member("srv/hidden", b"no"), member("srv/shown", b"yes")]),
        tar([whiteout("srv/hidden")]),
    ]
    run = {
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ["echo default"],
        "Env": ["PATH=/bin:/usr/bin", "COLOUR=blue"],
        "WorkingDir": "/srv",
        "User": "app",
        "StopSignal": "SIGINT",
    }
    made = Layout(path)
    made.add(made.manifest(layers, pack=gzipped, suffix="+gzip", run=run, created="2026-01-02T03:04:05Z"))
    return made.write()


def test_what_a_container_image_says_is_so(enclave: Enclave, rootfs: Path, tmp_path: Path) -> None:
    layout = container(tmp_path / "layout", rootfs)
    done = enclave("run", f"oci:{layout}", "--logs", "--", "echo $COLOUR; id -u; pwd; ls; exit 6")
    assert done.returncode == 6, done.stderr
    assert done.stdout.split() == ["blue", "1000", "/srv", "shown"]
    assert enclave("run", f"oci:{layout}:latest", "--logs").stdout == "default\n"


def test_a_signed_image_boots_and_a_changed_one_does_not(enclave: Enclave, rootfs: Path, tmp_path: Path) -> None:
    key, certificate, image = tmp_path / "key.pem", tmp_path / "cert.pem", tmp_path / "app.eif"
    assert enclave("keygen", "--key", key, "--cert", certificate).returncode == 0
    signing = ("--sign-cert", certificate, "--sign-key", key)
    built = enclave("build", f"dir:{rootfs}", "-o", image, *signing, "--", "sh", "-c", "exit 9")
    assert built.returncode == 0, built.stderr
    assert enclave("describe", image, "--strict").returncode == 0
    assert enclave("run", image).returncode == 9
    # Another command line, the CRC made right again: only the signature tells.
    data = bytearray(image.read_bytes().replace(b"console=ttyS0 quiet", b"console=ttyS0 debug"))
    data[544:548] = zlib.crc32(data[548:], zlib.crc32(data[:544])).to_bytes(4, "big")
    image.write_bytes(data)
    done = enclave("run", image, "--json")
    assert done.returncode == 125
    assert json.loads(done.stderr)["error"]["code"] == "signature"
