# SPDX-License-Identifier: Apache-2.0
"""Images with known measurements, made without this code: measured, parsed, verified, and rebuilt byte for byte."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from shared_data import DIRECTORY, SIGNED, VECTORS, expected, needs_shared_data
from signing_keys import MemoryKey

from enclavekit import eif
from enclavekit.eif import Section, SectionType, Signature, SigningCertificate

pytestmark = needs_shared_data


@dataclass(frozen=True)
class Vector:
    """One of them, read."""

    name: str
    data: bytes
    examined: eif.Examined

    def parts(self, *, signed: bool) -> list[Section]:
        return [
            Section(SectionType(one.type), eif.BytesContent(self.data[one.offset : one.end]))
            for one in self.examined.image.sections
            if signed or one.type is not SectionType.SIGNATURE
        ]


@pytest.fixture(params=VECTORS)
def vector(request: pytest.FixtureRequest) -> Vector:
    path = DIRECTORY / str(request.param)
    with path.open("rb") as file:
        return Vector(str(request.param), path.read_bytes(), eif.examine(file, str(path), strict=True))


def test_measured(vector: Vector) -> None:
    known = expected(vector.name)
    assert len(vector.data) == known["size"]
    assert hashlib.sha256(vector.data).hexdigest() == known["sha256"]
    assert f"{vector.examined.measured.crc:08x}" == known["crc32"]
    measurements = {name: value for name, value in vector.examined.measurements.items() if name.startswith("PCR")}
    assert measurements == {name: value for name, value in known.items() if name.startswith("PCR")}


def test_rebuilt_byte_for_byte(vector: Vector) -> None:
    """The parts of signed ones too: their signature is an ordinary section then."""
    out = io.BytesIO()
    image = vector.examined.image
    eif.write(out, vector.parts(signed=True), arch=image.arch, version=image.header.version)
    assert out.getvalue() == vector.data


@pytest.mark.parametrize("name", SIGNED)
def test_signed_again_but_for_the_random_signature(name: str) -> None:
    stem = name.removeprefix("signed-").removesuffix(".eif")
    known = (DIRECTORY / name).read_bytes()
    private = load_pem_private_key((DIRECTORY / f"{stem}.key.pem").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    certificate = SigningCertificate((DIRECTORY / f"{stem}.cert.pem").read_bytes())
    with (DIRECTORY / "unsigned.eif").open("rb") as file:
        image, measured = eif.measure_to_sign(file, name)
        made = eif.sign(measured.measurements.pcr0, certificate, MemoryKey(private))
    section = image_section(known)
    theirs = Signature.parse(section)
    assert theirs.canonical
    assert bytes(theirs) == section
    assert made.certificate == theirs.certificate
    assert made.cose.protected == theirs.cose.protected
    assert made.cose.payload == theirs.cose.payload
    assert len(made.cose.signature) == len(theirs.cose.signature)
    assert len(bytes(theirs.cose)) == expected(name)["cose_len"]
    assert len(section) == expected(name)["sig_section_len"]
    assert image.signature is None


def image_section(data: bytes) -> bytes:
    file = io.BytesIO(data)
    found = eif.read(file).signature
    assert found is not None
    return eif.read_section(file, found)
