# SPDX-License-Identifier: Apache-2.0
"""The security module in a real guest, by the kernel's own driver: documents that hold, PCRs, debug, randomness."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from hashlib import sha384
from itertools import groupby
from pathlib import Path

import cbor2
import pytest
from conftest import Enclave, stop

from enclavekit import eif
from enclavekit.attest import Document, Policy, Root, Verified, Verifier
from enclavekit.environment import attestation_directory
from enclavekit.errors import DebugModeError, PcrMismatchError

NONCE, OTHER = bytes(range(32)), bytes(range(32, 64))
ROLE = "arn:aws:iam::123456789012:role/parent"
INSTANCE = "i-0123456789abcdef0"
BLOCK = 2500  # bytes that each of FIPS 140-2's tests looks at


def command(request: object) -> str:
    return f"nsm {cbor2.dumps(request).hex()}"


SCRIPT = "; ".join(
    [
        command({"ExtendPCR": {"index": 16, "data": b"configuration"}}),
        command({"LockPCR": {"index": 16}}),
        command({"ExtendPCR": {"index": 16, "data": b"more"}}),
        command({"Attestation": {"nonce": NONCE, "user_data": b"of the guest's", "public_key": None}}),
        "cat /sys/class/misc/hw_random/rng_current",
        f"dd if=/dev/hwrng bs={BLOCK} count=4 iflag=fullblock 2>/dev/null | od -An -v -tx1 | tr -d ' \\n'; echo",
        "echo ready; sleep 1000",
    ]
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, rootfs: Path) -> Path:
    """Signed; asks its security module, and lets its host ask."""
    directory = tmp_path_factory.mktemp("image")
    subprocess.run(
        [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-Os", "-static", "-s", "-o",
         rootfs / "bin/nsm", Path(__file__).parent / "guest/nsm.c"],
        check=True,
    )  # fmt: skip
    enclave = Enclave(directory)
    certificate, key, made = directory / "cert.pem", directory / "key.pem", directory / "app.eif"
    done = enclave("keygen", "--cert", certificate, "--key", key)
    assert done.returncode == 0, done.stderr
    done = enclave(
        "build", f"dir:{rootfs}", "-o", made, "--attest", "--logs", "--sign-cert", certificate, "--sign-key", key,
        "--", "sh", "-c", SCRIPT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def running(enclave: Enclave, image: Path) -> Iterator[list[str]]:
    """What the guest of enclave ``app`` says until it is ready."""
    done = enclave("run", "-d", image, "--name", "app", "--role", ROLE, "--instance-id", INSTANCE)
    assert done.returncode == 0, done.stderr
    follower = enclave.start("logs", "-f", "app")
    try:
        assert follower.stdout is not None
        lines: list[str] = []
        while lines[-1:] != ["ready"]:
            line = follower.stdout.readline().decode()
            assert line, "the enclave ended"
            lines.append(line.rstrip("\n"))
        yield lines
    finally:
        stop(follower)
        enclave("stop", "--grace", "0", "app")


def verify(document: bytes, policy: Policy) -> Verified:
    root = Root.development_from_pem((attestation_directory() / "root.pem").read_bytes(), "development")
    return Verifier([root]).verify(document, policy)


def policy_of_changed(image: Path, target: Path) -> Policy:
    """Of an image with one bit changed, in the command line, and the checksum made right."""
    data = bytearray(image.read_bytes())
    data[data.index(b"reboot=k")] ^= 1
    data[544:548] = zlib.crc32(data[548:], zlib.crc32(data[:544])).to_bytes(4, "big")
    target.write_bytes(data)
    with target.open("rb") as file:
        measured = eif.measure(file, eif.read(file), name="changed").measurements
    return Policy(accepted=[{0: measured.pcr0, 1: measured.pcr1, 2: measured.pcr2}], nonce=NONCE)


def test_a_document_of_the_guests(running: list[str], image: Path, tmp_path: Path) -> None:
    extended, locked, refused, answer = (cbor2.loads(bytes.fromhex(line)) for line in running[:4])
    value = sha384(bytes(48) + b"configuration").digest()
    assert extended == {"ExtendPCR": {"data": value}}
    assert (locked, refused) == ("LockPCR", {"Error": "ReadOnlyIndex"})
    document = answer["Attestation"]["document"]
    verified = verify(document, Policy.from_eif(image, nonce=NONCE, user_data=b"of the guest's"))
    assert set(verified.pcrs) == set(range(17))
    assert verified.pcrs[3] == sha384(bytes(48) + ROLE.encode()).digest()
    assert verified.pcrs[4] == sha384(bytes(48) + INSTANCE.encode()).digest()
    assert verified.pcrs[8] != bytes(48)
    assert verified.pcrs[16] == value
    assert verified.module_id.startswith(f"{INSTANCE}-enc")
    with pytest.raises(PcrMismatchError, match="PCR0"):
        verify(document, policy_of_changed(image, tmp_path / "changed.eif"))
    assert running[4] == "nsm-hwrng"
    check_randomness(bytes.fromhex(running[5]))


def check_randomness(data: bytes) -> None:
    """FIPS 140-2 §4.9.1, as rngtest has it: monobit, poker, runs, long runs."""
    assert len(data) == 4 * BLOCK
    intervals = [(2315, 2685), (1114, 1386), (527, 723), (240, 384), (103, 209), (103, 209)]
    failures = 0
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        bits = "".join(f"{byte:08b}" for byte in block)
        nibbles = block.hex()
        poker = 16 / 5000 * sum(nibbles.count(digit) ** 2 for digit in "0123456789abcdef") - 5000
        runs = [(bit, len(list(group))) for bit, group in groupby(bits)]
        counts = [
            sum(bit == of and min(size, 6) == length for bit, size in runs) for of in "01" for length in range(1, 7)
        ]
        good = (
            9725 < bits.count("1") < 10275
            and 2.16 < poker < 46.17
            and all(low <= count <= high for count, (low, high) in zip(counts, intervals * 2, strict=True))
            and max(size for _, size in runs) < 26
        )
        failures += not good
    assert failures <= 1  # of 1000 blocks of good ones 1 fails


@pytest.mark.usefixtures("running")
def test_the_host_asks_and_verifies_in_one_line(enclave: Enclave, image: Path) -> None:
    nonce = OTHER.hex()
    asked = enclave("attest", "app", "--nonce", nonce)
    assert asked.returncode == 0, asked.stderr
    done = subprocess.run(
        enclave.words("verify", "-", "--eif", image, "--nonce", nonce, "--dev-root", "--json"),
        input=asked.stdout, capture_output=True, text=True, check=False, env=enclave.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True
    untrusted = subprocess.run(
        enclave.words("verify", "-", "--eif", image, "--nonce", nonce),
        input=asked.stdout, capture_output=True, text=True, check=False, env=enclave.environment(),
    )  # fmt: skip
    assert untrusted.returncode == 3


def test_debug_mode_fails_as_debug(enclave: Enclave, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "document"
    done = enclave("run", "-d", image, "--name", "app", "--debug")
    assert done.returncode == 0, done.stderr
    try:
        done = enclave("attest", "app", "--nonce", NONCE.hex(), "-o", target)
    finally:
        enclave("stop", "--grace", "0", "app")
    assert done.returncode == 0, done.stderr
    with pytest.raises(DebugModeError):
        verify(target.read_bytes(), Policy.from_eif(image, nonce=NONCE))
    pcrs = Document.parse(target.read_bytes()).unverified.pcrs
    assert [index for index in (0, 1, 2, 3, 4, 8) if any(pcrs[index])] == [4]


PROGRAM = """
from enclavekit.nsm import Nsm, Pcr
with Nsm() as nsm:
    assert len(nsm.random(1000)) == 1000
    value = nsm.extend_pcr(17, b"application")
    nsm.lock_pcr(17)
    assert nsm.pcr(17) == Pcr(value, True)
    assert 17 in nsm.describe().locked_pcrs
    print(nsm.attest(nonce=bytes(range(32)), user_data=b"in Python").hex())
"""


def test_the_python_client_alone(enclave: Enclave, layout: Path, tmp_path: Path) -> None:
    """The small distribution in a container image, as a user who may nothing."""
    copied, packages, layer = tmp_path / "layout", tmp_path / "packages", tmp_path / "layer.tar"
    shutil.copytree(layout, copied)
    source = Path(__file__).parents[2] / "packages/enclavekit-nsm"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", packages, source], check=True
    )
    with tarfile.open(layer, "w") as tar:
        tar.add(packages, "srv/packages")
    subprocess.run(["umoci", "raw", "add-layer", "--image", f"{copied}:latest", layer], check=True)
    image = tmp_path / "app.eif"
    done = enclave("build", f"oci:{copied}:latest", "-o", image, "--logs", "--", "-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    done = enclave("run", image)
    assert done.returncode == 0, done.stdout + done.stderr
    verified = verify(bytes.fromhex(done.stdout), Policy.from_eif(image, nonce=NONCE, user_data=b"in Python"))
    assert verified.pcrs[17] == sha384(bytes(48) + b"application").digest()


def test_an_image_that_has_not_opted_in(enclave: Enclave, rootfs: Path) -> None:
    process = enclave.start("run", f"dir:{rootfs}", "--logs", "--name", "shy", "--", "sh", "-c", "echo up; sleep 1000")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        done = enclave("attest", "shy", "--nonce", "00")
        assert done.returncode == 1
        assert re.search("its image does not let the host ask for documents, which build --attest does", done.stderr)
    finally:
        enclave("stop", "--grace", "0", "shy")
        stop(process)
