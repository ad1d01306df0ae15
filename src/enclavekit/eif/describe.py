# SPDX-License-Identifier: Apache-2.0
"""What an EIF is, as an object for JSON: the keys of ``nitro-cli describe-eif``, in its order, and then our own.

Source: aws-nitro-enclaves-cli src/enclave_proc_comm, aws-nitro-enclaves-image-format src/utils/eif_reader.rs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from enclavekit.eif.certificate_object import certificate_object
from enclavekit.eif.measure import Measured, Measurements, measure
from enclavekit.eif.metadata import Metadata
from enclavekit.eif.reader import Image, inspect, read, read_section
from enclavekit.eif.signature import Signature
from enclavekit.errors import CertificateError, EifError, Error, FileError, FormatError, SignatureError

HASH_ALGORITHM = "Sha512_48 { .. }"
"""How nitro-cli since 1.5.0 names SHA-384."""


@dataclass(slots=True)
class Examined:
    """A whole image, read, measured and verified. A part that cannot be read is None, and its error says why.

    ``signature_error`` is also there when the signature can be read and does not hold.
    """

    image: Image
    measured: Measured
    metadata: Metadata | None = None
    metadata_error: FormatError | None = None
    signature: Signature | None = None
    signature_error: FormatError | SignatureError | None = None

    @property
    def crc_holds(self) -> bool:
        """As the hypervisor computes it."""
        return self.measured.crc == self.image.header.crc

    @property
    def measurements(self) -> dict[str, str]:
        """The object that stands under ``Measurements`` in nitro-cli's output."""
        pcr8 = None
        if self.signature:
            with suppress(CertificateError):
                pcr8 = self.signature.certificate.pcr8
        return measurements_object(self.measured.measurements, pcr8)


def examine(file: BinaryIO, name: str, *, strict: bool = False, section_digests: bool = False) -> Examined:
    """Read the whole file. ``strict`` raises what a hypervisor would refuse it for, but for the certificate's dates.

    Otherwise only what cannot be understood at all is an error.
    """
    image = read(file) if strict else inspect(file)
    examined = Examined(image, measure(file, image, name=name, section_digests=section_digests))
    if image.metadata:
        try:
            data = read_section(file, image.metadata)
            if data.strip() != b"null":  # which is nitro-cli's way to have none
                examined.metadata = Metadata.parse(data)
        except FormatError as error:
            examined.metadata_error = error
    if image.signature:
        try:
            examined.signature = Signature.parse(read_section(file, image.signature))
            examined.signature.verify(examined.measured.measurements.pcr0)
        except (FormatError, SignatureError) as error:
            examined.signature_error = error
    if strict:
        if not examined.crc_holds:
            raise EifError(_crc_message(examined))
        if examined.signature_error:
            raise examined.signature_error
    return examined


def describe(
    path: Path, *, strict: bool = False, section_digests: bool = False, at: datetime | None = None
) -> dict[str, Any]:
    """Read, measure and verify the whole file. Sections have the key SHA384 when ``section_digests`` is set.

    ``at`` is when the certificate ought to be valid: a warning if it is not, an error when ``strict``.
    """
    try:
        with path.open("rb") as file:
            examined = examine(file, str(path), strict=strict, section_digests=section_digests)
    except OSError as error:
        raise FileError.of(error, path, "read") from error
    if strict and at and examined.signature:
        examined.signature.certificate.check_validity(at)
    made = describe_eif_object(examined)
    if examined.metadata and examined.metadata.kernel:
        kernel = examined.metadata.kernel
        made["Metadata"]["Kernel"] = {
            "Name": kernel.name,
            "SHA384": kernel.sha384,
            "Discovery": kernel.discovery.value,
        }
    made["Architecture"] = str(examined.image.arch)
    made["Accepted"] = examined.crc_holds and not examined.image.refusals and not examined.signature_error
    made["Sections"] = [
        {"Type": section.kind, "Offset": section.offset, "Size": section.size} for section in examined.image.sections
    ]
    for section, digest in zip(made["Sections"], examined.measured.section_digests or (), strict=section_digests):
        section["SHA384"] = digest.hex()
    made["Warnings"] = warnings(examined, at)
    return made


def measurements_object(measurements: Measurements, pcr8: bytes | None = None) -> dict[str, str]:
    """The object that stands under ``Measurements`` in nitro-cli's output."""
    made = {
        "HashAlgorithm": HASH_ALGORITHM,
        "PCR0": measurements.pcr0.hex(),
        "PCR1": measurements.pcr1.hex(),
        "PCR2": measurements.pcr2.hex(),
    }
    return made | {"PCR8": pcr8.hex()} if pcr8 else made


def describe_eif_object(examined: Examined) -> dict[str, Any]:
    """What describe-eif prints, and no more; a part that cannot be read is left out."""
    made: dict[str, Any] = {
        "EifVersion": examined.image.header.version,
        "Measurements": examined.measurements,
        "IsSigned": examined.image.signature is not None,
    }
    if examined.signature:
        with suppress(CertificateError):  # signature_error has it
            made["SigningCertificate"] = certificate_object(examined.signature.certificate)
    made["CheckCRC"] = examined.crc_holds
    if examined.image.signature:
        made["SignatureCheck"] = examined.signature_error is None
    if examined.metadata:
        made |= _metadata(examined.metadata)
    return made


def warnings(examined: Examined, at: datetime | None = None) -> list[str]:
    """Sentences for people: what will not boot, what is odd."""
    found = [remark.message for remark in examined.image.remarks]
    if not examined.crc_holds:
        found.insert(0, _crc_message(examined))
    elif examined.measured.crc != examined.measured.sections_crc:
        found.append("the CRC covers bytes between or behind sections: QEMU, which leaves them out, refuses it")
    if examined.metadata_error:
        found.append(examined.metadata_error.message)
    if examined.signature_error:
        found.append(f"{examined.signature_error.message}: it will not boot")
    if examined.signature:
        try:
            found += filter(None, [examined.signature.certificate.warning(at)] if at else [])
        except Error as error:
            found.append(error.message)
        if not examined.signature.canonical:
            found.append("the signature section is not encoded as AWS's tools do: some readers refuse it")
    return found


def size_text(size: int) -> str:
    """Bytes in the unit that people would use."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def _crc_message(examined: Examined) -> str:
    message = f"the CRC is 0x{examined.measured.crc:08x}, the header says 0x{examined.image.header.crc:08x}"
    if examined.image.header.crc == examined.measured.sections_crc:
        return f"{message}, which leaves out bytes between or behind sections: QEMU takes it, EC2 does not"
    return f"{message}: it will not boot"


def _metadata(metadata: Metadata) -> dict[str, Any]:
    build = metadata.build
    made: dict[str, Any] = {
        "BuildTime": build.time,
        "BuildTool": build.tool,
        "BuildToolVersion": build.tool_version,
        "OperatingSystem": build.operating_system,
        "KernelVersion": build.kernel_version,
        "DockerInfo": _sorted(metadata.docker_info),
    }
    # nitro-cli flattens custom metadata into the rest, and fails when they are no object.
    if isinstance(metadata.custom, dict):
        made |= {key: _sorted(metadata.custom[key]) for key in sorted(metadata.custom) if key not in made}
    return {"ImageName": metadata.image_name, "ImageVersion": metadata.image_version, "Metadata": made}


def _sorted(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Keys in the order of their bytes, as nitro-cli's maps are."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(one) for one in value] if isinstance(value, list) else value
