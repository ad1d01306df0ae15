# SPDX-License-Identifier: Apache-2.0
"""What ``describe`` says of an image."""

from __future__ import annotations

import io
import json
import subprocess
import zlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from eif_images import METADATA, PARTS, PCR0, PCR1, PCR2, image, patched, saved
from signing_keys import NOW, certificate, key

from enclavekit.eif import (
    Arch,
    BytesContent,
    Discovery,
    KernelInfo,
    Metadata,
    Section,
    SectionType,
    SigningCertificate,
    describe,
    sign,
    write,
)
from enclavekit.eif.certificate_object import certificate_object
from enclavekit.errors import CertificateError, EifError, FileError, SignatureError, TruncatedError


def test_keys_values_and_order(tmp_path: Path) -> None:
    made = describe(saved(tmp_path, image("kcm01s")))
    expected = {
        "EifVersion": 4,
        "Measurements": {"HashAlgorithm": "Sha512_48 { .. }", "PCR0": PCR0, "PCR1": PCR1, "PCR2": PCR2},
        "IsSigned": True,
        "CheckCRC": True,
        "SignatureCheck": False,
        "ImageName": "hello",
        "ImageVersion": "v1",
        "Metadata": {
            "BuildTime": "1970-01-01T00:00:00+00:00",
            "BuildTool": "nitro-cli",
            "BuildToolVersion": "1.5.0",
            "OperatingSystem": "Linux",
            "KernelVersion": "4.14.256",
            "DockerInfo": None,
        },
        "Architecture": "x86_64",
        "Accepted": False,
        "Sections": [
            {"Type": "kernel", "Offset": 560, "Size": 32},
            {"Type": "cmdline", "Offset": 604, "Size": 84},
            {"Type": "metadata", "Offset": 700, "Size": 243},
            {"Type": "ramdisk", "Offset": 955, "Size": 512},
            {"Type": "ramdisk", "Offset": 1479, "Size": 2048},
            {"Type": "signature", "Offset": 3539, "Size": 9},
        ],
        "Warnings": [made["Warnings"][0]],
    }
    assert json.dumps(made) == json.dumps(expected)
    assert made["Warnings"][0].startswith("signature section: not the CBOR expected: ")
    assert made["Warnings"][0].endswith(": it will not boot")


def test_section_digests(tmp_path: Path) -> None:
    made = describe(saved(tmp_path, image()), section_digests=True)
    assert list(made["Sections"][0]) == ["Type", "Offset", "Size", "SHA384"]
    assert made["Sections"][0]["SHA384"].startswith("c40b9798ae3491456339b567f57677f0")
    assert made["Warnings"] == []


def test_without_metadata(tmp_path: Path) -> None:
    made = describe(saved(tmp_path, image("kc0", version=2, arch=Arch.AARCH64)))
    assert list(made) == [
        *("EifVersion", "Measurements", "IsSigned", "CheckCRC", "Architecture", "Accepted", "Sections", "Warnings"),
    ]
    assert made["Architecture"] == "aarch64"
    assert made["IsSigned"] is False


def test_custom_metadata_and_kernel(tmp_path: Path) -> None:
    plain = Metadata.parse(METADATA)
    kernel = KernelInfo("k", "00", Discovery.CMDLINE)
    metadata = Metadata("n", "v", plain.build, {"Id": "x"}, {"team": "a", "DockerInfo": "hidden"}, kernel)
    path = tmp_path / "image.eif"
    sections = [PARTS["k"], PARTS["c"], Section(SectionType.METADATA, BytesContent(metadata.encode())), PARTS["0"]]
    with path.open("wb") as out:
        write(out, sections, arch=Arch.X86_64)
    made = describe(path)["Metadata"]
    assert made["team"] == "a"
    assert made["DockerInfo"] == {"Id": "x"}
    assert made["Kernel"] == {"Name": "k", "SHA384": "00", "Discovery": "cmdline"}


def test_warnings(tmp_path: Path) -> None:
    data = image("kcm0")
    odd = data[:943] + b"gap" + data[943:] + b"tail"
    odd = patched(odd, (0x1C + 24, (946).to_bytes(8, "big")), (6, b"\2\0"), (700, b"!"))
    made = describe(saved(tmp_path, odd))
    assert made["CheckCRC"] is True
    assert made["Accepted"] is True
    assert made["Warnings"] == [
        "unknown header flags 0x0200",
        "a gap between sections at offset 0x3af: some tools cannot read this image",
        "4 bytes behind the last section",
        "the CRC covers bytes between or behind sections: QEMU, which leaves them out, refuses it",
        "metadata: not JSON in UTF-8: expecting value",
    ]


def test_a_crc_without_the_gaps_is_qemus(tmp_path: Path) -> None:
    data = image("kcm0") + b"tail"
    made = describe(saved(tmp_path, data))
    assert made["CheckCRC"] is False
    crc = zlib.crc32(data[548:], zlib.crc32(data[:544]))
    assert made["Warnings"] == [
        f"the CRC is 0x{crc:08x}, the header says 0x{int.from_bytes(data[544:548], 'big'):08x},"
        " which leaves out bytes between or behind sections: QEMU takes it, EC2 does not",
        "4 bytes behind the last section",
    ]


def test_a_wrong_crc(tmp_path: Path) -> None:
    data = image("kcm0")[:544] + bytes(4) + image("kcm0")[548:]
    made = describe(saved(tmp_path, data))
    assert made["Accepted"] is False
    (warning,) = made["Warnings"]
    assert warning.endswith(", the header says 0x00000000: it will not boot")
    with pytest.raises(EifError) as caught:
        describe(saved(tmp_path, data), strict=True)
    assert caught.value.message == warning


def signed_image(directory: Path, chosen: SigningCertificate) -> Path:
    path = directory / "signed.eif"
    out = io.BytesIO()
    write(
        out,
        [PARTS[part] for part in "kcm01"],
        arch=Arch.X86_64,
        sign=lambda measurements: bytes(sign(measurements.pcr0, chosen, key())),
    )
    path.write_bytes(out.getvalue())
    return path


def test_a_signed_image(tmp_path: Path) -> None:
    path = signed_image(tmp_path, certificate())
    made = describe(path, strict=True, at=NOW)
    assert made["IsSigned"] is made["SignatureCheck"] is made["Accepted"] is True
    assert made["Measurements"]["PCR8"] == certificate().pcr8.hex()
    assert list(made)[:6] == [
        *("EifVersion", "Measurements", "IsSigned", "SigningCertificate", "CheckCRC", "SignatureCheck"),
    ]
    assert made["SigningCertificate"]["IssuerName"] == {"commonName": "test"}
    assert made["SigningCertificate"]["Algorithm"] == "ecdsa-with-SHA256"
    assert made["SigningCertificate"]["NotBefore"] == "Feb 21 00:00:00 2026 GMT"
    assert made["SigningCertificate"]["NotAfter"] == "Nov 17 00:00:00 2028 GMT"
    assert made["Warnings"] == []


def test_an_expired_certificate_warns_and_strictly_refuses(tmp_path: Path) -> None:
    path = signed_image(tmp_path, certificate())
    late = datetime(2029, 1, 1, tzinfo=UTC)
    message = "certificate: valid from 2026-02-21 to 2028-11-17, not on 2029-01-01"
    assert describe(path, at=late)["Warnings"] == [f"{message}: the enclave will not start"]
    assert describe(path)["Warnings"] == []
    with pytest.raises(CertificateError) as caught:
        describe(path, strict=True, at=late)
    assert caught.value.message == message


def test_changed_after_it_was_signed(tmp_path: Path) -> None:
    data = signed_image(tmp_path, certificate()).read_bytes()
    made = describe(saved(tmp_path, patched(data, (570, b"!"))))
    assert made["CheckCRC"] is True
    assert made["SignatureCheck"] is made["Accepted"] is False
    (warning,) = made["Warnings"]
    assert warning.startswith("signature: for an image with PCR0 2ff93628c698b055..., this one's is ")
    with pytest.raises(SignatureError):
        describe(tmp_path / "image.eif", strict=True)


def test_the_signing_certificate_in_openssls_words(tmp_path: Path) -> None:
    names = [
        (NameOID.COUNTRY_NAME, "XY"),
        (NameOID.ORGANIZATION_NAME, 'A "B" C'),
        (NameOID.COMMON_NAME, "first"),
        (NameOID.COMMON_NAME, "last"),
        (NameOID.EMAIL_ADDRESS, "a@b.example"),
        (x509.ObjectIdentifier("1.2.3.4"), "odd"),
    ]
    subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in names])
    made = (
        x509.CertificateBuilder(subject, subject, key().public_key, 1, NOW, datetime(2030, 1, 9, 3, 4, 5, tzinfo=UTC))
        .sign(key().private, SHA512())
        .public_bytes(Encoding.PEM)
    )
    found = certificate_object(SigningCertificate(made))
    assert list(found) == ["IssuerName", "Algorithm", "NotBefore", "NotAfter", "Signature"]
    assert list(found["IssuerName"].items()) == [
        ("commonName", "last"),
        ("countryName", "XY"),
        ("emailAddress", "a@b.example"),
        ("organizationName", "A B C"),
        ("undefined", "odd"),
    ]
    assert found["Algorithm"] == "ecdsa-with-SHA512"
    (tmp_path / "c.pem").write_bytes(made)
    text = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "c.pem", "-noout", "-dates"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    assert text == f"notBefore={found['NotBefore']}\nnotAfter={found['NotAfter']}\n"


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        describe(tmp_path / "none.eif")
    assert caught.value.message == f"cannot read {tmp_path}/none.eif: no such file or directory"
    with pytest.raises(FileError) as caught:
        describe(tmp_path)
    assert caught.value.message == f"cannot read {tmp_path}: is a directory"
    with pytest.raises(TruncatedError):
        describe(saved(tmp_path, image()[:-1]), strict=True)
    with pytest.raises(TruncatedError):
        describe(saved(tmp_path, image()[:500]))
