# SPDX-License-Identifier: Apache-2.0
"""What an image has to be before it is started."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from kernel_files import bzimage

from enclavekit import eif
from enclavekit.eif import Arch, BytesContent, Section, SectionType
from enclavekit.enclave.run import plan
from enclavekit.errors import CertificateError, LaunchError, SignatureError
from enclavekit.signing.certificate import self_signed
from enclavekit.signing.pem import PemSigner

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def image(directory: Path, *, of: bytes = b"", sign: bool = True, arch: Arch = Arch.X86_64) -> Path:
    """Signed over PCR0, or over what ``of`` says, with a certificate that is valid for 10 days from NOW on."""
    key = PemSigner.generate("P-256")
    certificate = self_signed(key, common_name="x", first=NOW, days=10)
    parts = {
        SectionType.KERNEL: bzimage(b"payload"),
        SectionType.CMDLINE: b"quiet",
        SectionType.METADATA: b"{}",
        SectionType.RAMDISK: b"",
    }
    out = io.BytesIO()
    eif.write(
        out,
        [Section(kind, BytesContent(data)) for kind, data in parts.items()],
        arch=arch,
        sign=(lambda measurements: bytes(eif.sign(of or measurements.pcr0, certificate, key))) if sign else None,
    )
    path = directory / "image.eif"
    path.write_bytes(out.getvalue())
    return path


def test_a_signature_that_holds(tmp_path: Path) -> None:
    for sign in (True, False):
        with image(tmp_path, sign=sign).open("rb") as file:
            planned = plan(file, None, NOW)
    assert planned.memory >= 64 << 20


def test_an_expired_certificate_does_not_start(tmp_path: Path) -> None:
    with image(tmp_path).open("rb") as file, pytest.raises(CertificateError) as caught:
        plan(file, None, NOW + timedelta(days=11))
    assert caught.value.message == "certificate: valid from 2026-06-01 to 2026-06-11, not on 2026-06-12"


def test_a_signature_of_another_image_does_not_start(tmp_path: Path) -> None:
    with image(tmp_path, of=bytes(48)).open("rb") as file, pytest.raises(SignatureError) as caught:
        plan(file, None, NOW)
    assert caught.value.message.startswith("signature: for an image with PCR0 0000000000000000..., this one's is ")


def test_another_architecture(tmp_path: Path) -> None:
    with image(tmp_path, arch=Arch.AARCH64).open("rb") as file, pytest.raises(LaunchError) as caught:
        plan(file, None, NOW)
    assert caught.value.message == "image for aarch64, expected x86_64, as this machine is"
