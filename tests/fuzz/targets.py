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
sys.path.insert(0, str(Path(__file__).parents[1] / "unit/virtio"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit/attest"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit/lab"))

import atheris

with atheris.instrument_imports(include=["enclavekit"]):
    from enclavekit import eif
    from enclavekit.attest import Document, Policy, Verifier
    from enclavekit.attest.chain import ChainCertificate
    from enclavekit.attest.recipient import RecipientKey
    from enclavekit.codec import cbor
    from enclavekit.codec.cose import Sign1
    from enclavekit.eif import ImageSection, SectionType, Signature, SigningCertificate
    from enclavekit.eif.certificate_object import certificate_object
    from enclavekit.eif.metadata import Metadata
    from enclavekit.errors import AttestationError, Error, RecipientError
    from enclavekit.image.initramfs import open_ramdisk
    from enclavekit.inspection.unpack import unpack
    from enclavekit.lab import ne_device, vfio_user  # noqa: F401 - what a rig imports is instrumented if it is here first
    from enclavekit.lab.agent_frames import Command, Decoder, Kind, encode
    from enclavekit.virtio import vsock  # noqa: F401
    from enclavekit.virtio.nsm import MAX_RESPONSE, Nsm

import made_documents
from attestation_data import MADE as MADE_DOCUMENTS
from attestation_data import REAL
from hostile_images import good, hostile_images
from signing_keys import certificate
from test_ne_fuzz import run as run_parent
from test_recipient import enveloped, recipient
from test_vsock_fuzz import check_bounds, step
from vsock_rig import Rig

GENUINE = [made_documents.document(nonce=b"n" * 32), made_documents.document(user_data=b"", public_key=b"k")]
PAYLOADS = [Document.parse(one).payload for one in GENUINE]
VERIFIER = Verifier([made_documents.root_of()])
POLICIES = [Policy(any_measurement=True, allow_debug=True, ignore_unknown=unknown) for unknown in (False, True)]


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


def fuzz_vsock(data: bytes) -> None:
    """A driver that writes anything anywhere, and sends packets, while the host does what it likes."""
    chosen = atheris.FuzzedDataProvider(data)
    rig = Rig(size=8, slot=256)
    for _ in range(64):
        if not chosen.remaining_bytes():
            break
        queue = chosen.PickValueInList([rig.guest.rx, rig.guest.tx])
        match chosen.ConsumeIntInRange(0, 5):
            case 0:
                op, source, port = (chosen.ConsumeInt(4) & 0xFFFFFFFF for _ in range(3))
                names = ("flags", "buf_alloc", "fwd_cnt")
                fields = {name: chosen.ConsumeInt(4) & 0xFFFFFFFF for name in names}
                with suppress(ValueError, KeyError):  # its queue is full, or it has lost count of it
                    rig.guest.send(op % 9, source, port, chosen.ConsumeBytes(64), **fields)
            case 1:
                address, length, flags = chosen.ConsumeInt(8), chosen.ConsumeInt(4), chosen.ConsumeInt(2)
                table = chosen.PickValueInList([None, queue.table_gpa(0)])
                following = chosen.ConsumeInt(1) & 0xFFFF
                index = chosen.ConsumeIntInRange(0, 7)
                values = (index, address & (1 << 64) - 1, length & 0xFFFFFFFF, flags & 0xFFFF, following)
                queue.describe(*values, table=table)
            case 2:
                queue.offer(chosen.ConsumeInt(2) & 0xFFFF)
            case 3:
                queue.announce(chosen.ConsumeInt(2) & 0xFFFF)
            case 4:
                events = [
                    "open",
                    "accept",
                    "refuse",
                    "give",
                    "finish",
                    "hang up",
                    "room",
                    "no room",
                    "timers",
                    "restart",
                ]
                step(rig, chosen.PickValueInList(events), (0, 0, 0, b""), {})
            case _:
                place = queue.buffer_gpa(chosen.ConsumeIntInRange(0, 7))
                written = chosen.ConsumeBytes(96)
                queue._memory[place : place + len(written)] = written
        rig.work()
        check_bounds(rig)
    rig.device.close()
    assert all(stream.closed for stream in rig.route.streams)


def fuzz_document(data: bytes) -> None:
    """The reader of attestation documents, and the verifier behind it: nothing that is made up holds."""
    for parse in (Document.parse, Document.parse_text):
        with suppress(AttestationError):
            assert len(parse(data).signature) == 96
    for policy in POLICIES:
        with suppress(AttestationError):
            assert VERIFIER.verify_archived(data, policy).document.payload in PAYLOADS


def fuzz_chain(data: bytes) -> None:
    """A certificate of a chain, in every place of it."""
    with suppress(AttestationError):
        ChainCertificate.parse(data, "fuzzed")
    good = made_documents.good_chain()
    for index in range(1, 5):
        chain = (*good[:index], data[:1024] or b"0", *good[index + 1 :])
        with suppress(AttestationError):
            VERIFIER.verify_archived(
                made_documents.envelope(made_documents.encode(made_documents.payload(chain)), bytes(95) + b"\1"),
                POLICIES[0],
            )
            raise AssertionError("a document without a signature holds")


def fuzz_recipient(data: bytes) -> None:
    """What is not from a KMS does not open."""
    key: RecipientKey = recipient()
    with suppress(RecipientError):
        key.open(data)


def fuzz_nsm(data: bytes) -> None:
    """A guest that asks its security module anything, several times."""
    module = Nsm(made_documents.MODULE, {}, lambda pcrs, **options: b"document")
    for request in data.split(b"\0\0", 15):
        response = module.answer(request)
        assert len(response) <= MAX_RESPONSE
        cbor.decode(response, "response")


def fuzz_device(data: bytes) -> None:
    """A parent's QEMU, and its driver, that say anything to the Nitro Enclaves device."""
    chosen = atheris.FuzzedDataProvider(data)
    run_parent(lambda count: chosen.ConsumeIntInRange(0, count - 1), chosen.ConsumeBytes)


def fuzz_agent(data: bytes) -> None:
    """What the host and the agent in a lab's parent read of each other."""
    with suppress(Error):
        for kind, payload in Decoder().feed(data):
            if kind is Kind.RUN:
                Command.decode(payload)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "eif": fuzz_eif,
    "signature": fuzz_signature,
    "certificate": fuzz_certificate,
    "cpio": fuzz_cpio,
    "vsock": fuzz_vsock,
    "device": fuzz_device,
    "agent": fuzz_agent,
    "nsm": fuzz_nsm,
    "document": fuzz_document,
    "chain": fuzz_chain,
    "recipient": fuzz_recipient,
}


def seeds(target: str) -> list[bytes]:
    """What fuzzing starts from."""
    images = [good(), *(hostile.data for hostile in hostile_images().values())]
    small = [image for image in images if len(image) < 1 << 16]
    if target == "eif":
        return small
    if target == "document":
        beside = [path.read_bytes() for path in (*MADE_DOCUMENTS.glob("*.bin"), *REAL.glob("*.bin"))]
        return [*GENUINE, *beside]
    if target == "chain":
        return list(made_documents.good_chain())
    if target == "recipient":
        return [enveloped()]
    if target == "nsm":
        arguments = {"index": 16, "data": b"x", "range": 20, "nonce": b"n", "user_data": None, "public_key": "k"}
        names = ("DescribePCR", "ExtendPCR", "LockPCR", "LockPCRs", "Attestation")
        return [cbor.encode("GetRandom"), cbor.encode("DescribeNSM"), *(cbor.encode({one: arguments}) for one in names)]
    if target == "agent":
        return [Command(["a", "b"], {"K": "v"}, (24, 80)).encode() + encode(Kind.INPUT, b"x")]
    if target in ("vsock", "device"):
        return [bytes(200), bytes(range(256))]
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
