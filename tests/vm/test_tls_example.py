# SPDX-License-Identifier: Apache-2.0
"""examples/tls-binding with its server in a real guest: a client that is sure to talk to this image, or does not."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import HERE, Enclave, stop

from enclavekit.environment import attestation_directory

EXAMPLE = HERE.parents[1] / "examples/tls-binding"
PACKAGES = (HERE.parents[1] / "packages/enclavekit-nsm", "cryptography>=42")
PORT = 5005
TRIES = 100


def client(port: int, image: Path, root: Path) -> subprocess.CompletedProcess[str]:
    words: list[str | Path] = [EXAMPLE / "client.py", "127.0.0.1", str(port), image, "--dev-root", root]
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.timeout(600)
def test_the_client_talks_to_this_image_and_to_no_other(enclave: Enclave, layout: Path, tmp_path: Path) -> None:
    copied, packages, layer = tmp_path / "layout", tmp_path / "packages", tmp_path / "layer.tar"
    shutil.copytree(layout, copied)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", packages, *PACKAGES], check=True
    )
    with tarfile.open(layer, "w") as tar:
        tar.add(packages, "srv/packages")
        for name in ("server.py", "binding.py"):
            tar.add(EXAMPLE / name, f"srv/{name}")
    subprocess.run(["umoci", "raw", "add-layer", "--image", f"{copied}:latest", layer], check=True)
    image, other = tmp_path / "app.eif", tmp_path / "other.eif"
    program = f"import sys, runpy; sys.path[:0] = ['/srv', '/srv/packages']; sys.argv = ['server.py', '{PORT}']; "
    program += "print('here', flush=True); runpy.run_path('/srv/server.py', run_name='__main__')"
    for file, words in ((image, program), (other, "print()")):
        done = enclave("build", f"oci:{copied}:latest", "-o", file, "--logs", "--", "-c", words)
        assert done.returncode == 0, done.stderr
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    root = attestation_directory() / "root.pem"
    process = enclave.start("run", image, "--publish", f"127.0.0.1:{port}:{PORT}")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        for _ in range(TRIES):  # until it listens
            done = client(port, image, root)
            if done.returncode == 0 or process.poll() is not None:
                break
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("connected to i-00000000000000000-enc")
        assert "hello from inside an enclave" in done.stdout
        refused = client(port, other, root)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "PCR" in refused.stderr
    finally:
        stop(process)
