# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: functions of bytes that end well or raise our Error, whatever they are; and what it starts from.

python tests/fuzz/targets.py TARGET [libFuzzer's options] CORPUS
"""

from __future__ import annotations

import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/eif"))

import atheris

with atheris.instrument_imports(include=["enclavekit"]):
    from enclavekit import eif
    from enclavekit.codec import cbor
    from enclavekit.codec.cose import Sign1
    from enclavekit.eif import ImageSection, SectionType, Signature, SigningCertificate
    from enclavekit.eif.certificate_object import certificate_object
    from enclavekit.eif.metadata import Metadata
    from enclavekit.errors import Error
    from enclavekit.image.initramfs import open_ramdisk
    from enclavekit.inspection.unpack import unpack

from hostile_images import good, hostile_images
from signing_keys import certificate


def fuzz_eif(data: bytes) -> None:
    """Both readers, and all that looks at a whole image."""
    with suppress(Error):
        image = eif.read(io.BytesIO(data))
        assert image.refusals == ()
        assert eif.inspect(io.BytesIO(data)).sections == image.sections
    with tempfile.TemporaryFile() as file, suppress(Error):
        file.write(data)
        file.flush()
        examined = eif.examine(file, "fuzzed")
        eif.describe_eif_object(examined)


def fuzz_signature(data: bytes) -> None:
    """CBOR, COSE, the signature section, metadata."""
    with suppress(Error):
        cbor.decode(data, "fuzzed")
    with suppress(Error):
        Sign1.parse(data, "fuzzed").algorithm("fuzzed")
    with suppress(Error):
        Signature.parse(data).verify(bytes(48))
    with suppress(Error):
        Metadata.parse(data)


def fuzz_certificate(data: bytes) -> None:
    """Certificates, in PEM and as their bytes."""
    import base64

    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(data) + b"-----END CERTIFICATE-----\n"
    for one in (data, pem):
        found = SigningCertificate(one)
        with suppress(Error):
            found.check_validity(found.validity[0])
        with suppress(Error):
            certificate_object(found)
        with suppress(Error):
            found.check_key(found.key)
            found.check_own_signature()


def fuzz_cpio(data: bytes) -> None:
    """Ramdisks, and what is unpacked of them."""
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory() as directory, suppress(Error):
        file.write(bytes(12) + data)
        file.flush()
        with open_ramdisk(file, ImageSection(SectionType.RAMDISK, 0, len(data)), name="fuzzed") as ramdisk:
            unpack(ramdisk, Path(directory))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "eif": fuzz_eif,
    "signature": fuzz_signature,
    "certificate": fuzz_certificate,
    "cpio": fuzz_cpio,
}


def seeds(target: str) -> list[bytes]:
    """What fuzzing starts from."""
    images = [good(), *(hostile.data for hostile in hostile_images().values())]
    small = [image for image in images if len(image) < 1 << 16]
    if target == "eif":
        return small
    if target == "certificate":
        return [certificate(curve).der for curve in ("P-256", "P-384", "P-521")] + [certificate().pem]
    wanted = {
        "signature": (SectionType.SIGNATURE, SectionType.METADATA),
        "cpio": (SectionType.RAMDISK,),
    }[target]
    found = []
    for image in small:
        with suppress(Error):
            sections = eif.inspect(io.BytesIO(image)).sections
            found += [image[one.offset : one.end] for one in sections if one.type in wanted]
    return found


def main() -> None:
    """Fuzz one target; a corpus directory that is empty gets the seeds."""
    warnings.simplefilter("ignore")
    name = sys.argv.pop(1)
    corpus = Path(sys.argv[-1])
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
