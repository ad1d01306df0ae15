# SPDX-License-Identifier: Apache-2.0
"""The client against our own security module, and against one that answers nonsense; and the small distribution."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from hashlib import sha384
from pathlib import Path

import cbor2
import pytest

from enclavekit.errors import NsmError
from enclavekit.nsm import Nsm, Pcr
from enclavekit.virtio.nsm import Nsm as SecurityModule

PACKAGE = Path(__file__).parents[3] / "packages" / "enclavekit-nsm"
MODULE = "i-0123456789abcdef0-enc0123456789abcdef"


def sign(pcrs: Mapping[int, bytes], **options: bytes | None) -> bytes:
    return cbor2.dumps([len(pcrs), options])


@pytest.fixture
def nsm() -> Nsm:
    return Nsm(exchange=SecurityModule(MODULE, {0: bytes([7]) * 48}, sign).answer)


def test_all_requests(nsm: Nsm) -> None:
    assert nsm.pcr(0) == Pcr(bytes([7]) * 48, locked=True)
    assert nsm.extend_pcr(16, b"data") == sha384(bytes(48) + b"data").digest()
    nsm.lock_pcr(16)
    nsm.lock_pcrs(20)
    found = nsm.describe()
    assert (found.module_id, found.version, found.digest, found.max_pcrs) == (MODULE, (1, 0, 0), "SHA384", 32)
    assert found.locked_pcrs == tuple(range(20))
    assert len(nsm.random(1000)) == 1000
    assert nsm.random(0) == b""
    count, options = cbor2.loads(nsm.attest(nonce=b"n", user_data=b""))
    assert (count, options) == (20, {"nonce": b"n", "user_data": b"", "public_key": None})


@pytest.mark.parametrize(("index", "name"), [(0, "ReadOnlyIndex"), (32, "InvalidIndex")])
def test_errors_have_the_modules_name(nsm: Nsm, index: int, name: str) -> None:
    with pytest.raises(NsmError, match=f"^ExtendPCR: the module answers {name}$") as caught:
        nsm.extend_pcr(index, b"")
    assert caught.value.name == name


def test_a_request_that_is_too_large_is_not_sent(nsm: Nsm) -> None:
    with pytest.raises(NsmError, match=r"^Attestation: request of 4142 bytes, expected at most 4096$") as caught:
        nsm.attest(user_data=bytes(4096))
    assert caught.value.name == "InputTooLarge"


@pytest.mark.parametrize("response", [b"", b"\xff", b"\x80", b"\xf6", cbor2.dumps({"Attestation": {"document": 1}})])
def test_nonsense_is_one_error(response: bytes) -> None:
    with pytest.raises(NsmError, match=r"^Attestation: a response (that is no CBOR|without document)$"):
        Nsm(exchange=lambda _: response).attest()


def test_a_machine_without_one(tmp_path: Path) -> None:
    with pytest.raises(NsmError, match=r"none: no such file or directory$") as caught:
        Nsm(str(tmp_path / "none"))
    assert caught.value.name == ""


def test_the_small_distribution_needs_nothing_but_cbor2(tmp_path: Path) -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
    assert [one.partition(">")[0] for one in project["project"]["dependencies"]] == ["cbor2"]
    for source, target in project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        path = tmp_path / target
        path.parent.mkdir(parents=True, exist_ok=True)
        if (PACKAGE / source).is_dir():
            shutil.copytree(PACKAGE / source, path)
        else:
            shutil.copy(PACKAGE / source, path)
    shutil.copytree(Path(cbor2.__file__).parent, tmp_path / "cbor2")
    for extension in Path(cbor2.__file__).parents[1].glob("_cbor2*"):
        shutil.copy(extension, tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from enclavekit.nsm import Nsm; import enclavekit; "
        "assert not getattr(enclavekit, '__file__', None); "
        "print(Nsm(exchange=lambda request: b'\\xa1\\x69GetRandom\\xa1\\x66random\\x41\\x07').random(1))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("b'\\x07'\n", "")
