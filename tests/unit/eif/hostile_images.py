# SPDX-License-Identifier: Apache-2.0
"""Images made to do harm, each with the words that refuse it. The fuzzers start from them, too."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import cbor2
from cryptography.hazmat.primitives.asymmetric import ed25519
from eif_images import BOOT, CMDLINE, KERNEL, METADATA, image, patched
from signing_keys import NOW, certificate, certificate_pem, key

from enclavekit.codec import cpio
from enclavekit.eif import (
    Arch,
    BytesContent,
    Section,
    SectionType,
    Signature,
    SigningCertificate,
    sign,
    unsigned,
    write,
)

FILE, DIRECTORY, SYMLINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777
OFFSETS, SIZES = 0x1C, 0x11C


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "big")


def of_parts(
    *, metadata: bytes = METADATA, ramdisk: bytes = BOOT, signature: Callable[[bytes], bytes] | bytes | None = None
) -> bytes:
    """An image with these parts; a function is given PCR0 and makes the signature section."""
    sections = [
        Section(SectionType.KERNEL, BytesContent(KERNEL)),
        Section(SectionType.CMDLINE, BytesContent(CMDLINE)),
        Section(SectionType.METADATA, BytesContent(metadata)),
        Section(SectionType.RAMDISK, BytesContent(ramdisk)),
    ]
    making = (lambda measurements: signature) if isinstance(signature, bytes) else None
    if callable(signature):
        making = lambda measurements: signature(measurements.pcr0)  # noqa: E731
    out = io.BytesIO()
    write(out, sections, arch=Arch.X86_64, sign=making)
    return out.getvalue()


def good() -> bytes:
    """A signed image that nothing is wrong with."""
    return of_parts(signature=lambda pcr0: bytes(sign(pcr0, certificate(), key())))


def entry(name: bytes, mode: int = FILE, data: bytes = b"", **fields: Any) -> tuple[cpio.Entry, list[bytes]]:
    return replace(cpio.Entry(name, mode, len(data)), **fields), [data] if data else []


def files(*entries: tuple[cpio.Entry, list[bytes]]) -> bytes:
    return of_parts(ramdisk=b"".join(cpio.archive(entries)))


def raw_cpio(**changes: bytes) -> bytes:
    """One entry, some of its header's fields other digits."""
    data = bytearray(b"".join(cpio.archive([entry(b"file", data=b"data")])))
    places = {"magic": 0, "mode": 14, "filesize": 54, "namesize": 94, "name": 110}
    for field, value in changes.items():
        data[places[field] : places[field] + len(value)] = value
    return of_parts(ramdisk=bytes(data))


def signed_by(change: Callable[[Signature], object]) -> bytes:
    """A good signature, and then something of it is changed; what comes back is the section, or becomes it."""

    def make(pcr0: bytes) -> bytes:
        made = change(sign(pcr0, certificate(), key()))
        return made if isinstance(made, bytes) else bytes(made)  # type: ignore[call-overload]

    return of_parts(signature=make)


def over(pcr0: bytes) -> bytes:
    """A good signature over something else."""
    return bytes(sign(pcr0, certificate(), key()))


def with_payload(value: object) -> Callable[[bytes], bytes]:
    """The key signs any payload."""

    def make(pcr0: bytes) -> bytes:
        from enclavekit.codec.cose import Algorithm, der_to_raw

        to_sign = replace(unsigned(pcr0, certificate()), payload=cbor2.dumps(value))
        raw = der_to_raw(key().sign_digest(to_sign.digest("x")), Algorithm.ES384, "x")
        return bytes(Signature(certificate(), replace(to_sign, signature=raw)))

    return make


def with_certificate(pem: bytes) -> bytes:
    return signed_by(lambda made: replace(made, certificate=SigningCertificate(pem)))


def section(**values: object) -> bytes:
    return cbor2.dumps([values])


@dataclass(frozen=True)
class Hostile:
    """An image, and what refuses it; ``…`` stands for words that are not ours."""

    data: bytes
    refusal: str


def _structure() -> dict[str, Hostile]:
    data = image()
    many = b"".join(b"\0\3\0\0" + number(0) for _ in range(33))
    return {
        "empty": Hostile(b"", "EIF header: magic b'', expected b'.eif'"),
        "another format": Hostile(b"\x7fELF" + bytes(1000), "EIF header: magic b'\\x7fELF', expected b'.eif'"),
        "only the magic": Hostile(b".eif", "EIF header: need 548 bytes, have 4"),
        "half a header": Hostile(data[:300], "EIF header: need 548 bytes, have 300"),
        "only a header": Hostile(data[:548], "section 0: header at offset 0x224, the file ends at 0x224"),
        "from the future": Hostile(patched(data, (4, b"\xff\xff")), "EIF header: version 65535, expected 2, 3 or 4"),
        "no sections": Hostile(patched(data, (0x1A, b"\0\0")), "EIF header: 0 sections, expected 1 to 32"),
        "33 sections": Hostile(patched(data + many, (0x1A, b"\0\x21")), "EIF header: 33 sections, expected 1 to 32"),
        "65535 sections": Hostile(patched(data, (0x1A, b"\xff\xff")), "EIF header: 65535 sections, expected 1 to 32"),
        "a section over the header": Hostile(
            patched(data, (OFFSETS, number(0))), "section 0: header at offset 0x0, expected 0x224 or later"
        ),
        "sections over each other": Hostile(
            patched(data, (OFFSETS + 8, number(560))), "section 1: header at offset 0x230, expected 0x250 or later"
        ),
        "backwards": Hostile(
            patched(data, (OFFSETS + 16, number(600))), "section 2: header at offset 0x258, expected 0x2b0 or later"
        ),
        "an offset past the end": Hostile(
            patched(data, (OFFSETS + 32, number(1 << 62))),
            "section 4: header at offset 0x4000000000000000, the file ends at 0xdc7",
        ),
        "an offset that wraps": Hostile(
            patched(data, (OFFSETS, number((1 << 64) - 1))),
            "section 0: header at offset 0xffffffffffffffff, the file ends at 0xdc7",
        ),
        "a size that wraps": Hostile(
            patched(data, (SIZES, number((1 << 64) - 1)), (552, number((1 << 64) - 1))),
            "section 0: kernel ends at 0x1000000000000022f, the file ends at 0xdc7",
        ),
        "a size that is larger than the file": Hostile(
            patched(data, (SIZES + 32, number(1 << 40)), (1467 + 4, number(1 << 40))),
            "section 4: ramdisk ends at 0x100000005c7, the file ends at 0xdc7",
        ),
        "two sizes": Hostile(
            patched(data, (SIZES, number(0))),
            "section header at offset 0x224: size 0x20, expected 0x0 as in the EIF header",
        ),
        "a type that is invalid": Hostile(
            patched(data, (548, b"\0\0")), "section header at offset 0x224: type 0, expected 1 to 5"
        ),
        "a type that nobody knows": Hostile(
            patched(data, (548, b"\xff\xff")), "section header at offset 0x224: type 65535, expected 1 to 5"
        ),
        "two kernels": Hostile(patched(data, (592, b"\0\1")), "EIF sections: 2 of type kernel, expected exactly 1"),
        "no kernel": Hostile(patched(data, (548, b"\0\3")), "EIF sections: 0 of type kernel, expected exactly 1"),
        "no ramdisk": Hostile(
            patched(image("kcm0"), (943, b"\0\5")), "EIF sections: 0 of type ramdisk, expected at least 1"
        ),
        "a wrong CRC": Hostile(
            data[:544] + b"\0\0\0\0" + data[548:],
            f"the CRC is 0x{int.from_bytes(data[544:548], 'big'):08x}, the header says 0x00000000: it will not boot",
        ),
        "a byte changed": Hostile(
            data[:570] + b"\xff" + data[571:],
            f"the CRC is 0x…, the header says 0x{int.from_bytes(data[544:548], 'big'):08x}: it will not boot",
        ),
        "cut off in a section": Hostile(data[:-1], "section 4: ramdisk ends at 0xdc7, the file ends at 0xdc6"),
        "metadata of 2 MiB": Hostile(
            patched_size(of_parts(metadata=b"1" * (1 << 20)), 2, b"1"),
            "EIF sections: metadata of 1048577 bytes, expected at most 1048576",
        ),
    }


def patched_size(data: bytes, index: int, more: bytes) -> bytes:
    """With more bytes at the end of a section: what the writer would not write."""
    start = int.from_bytes(data[OFFSETS + 8 * index :][:8], "big")
    size = int.from_bytes(data[SIZES + 8 * index :][:8], "big")
    end = start + 12 + size
    later = int.from_bytes(data[OFFSETS + 8 * (index + 1) :][:8], "big")
    return patched(
        data[:end] + more + data[end:],
        (start + 4, number(size + len(more))),
        (SIZES + 8 * index, number(size + len(more))),
        (OFFSETS + 8 * (index + 1), number(later + len(more))),
    )


def _metadata() -> dict[str, Hostile]:
    whole = json.loads(METADATA)
    deep = b'{"DockerInfo":' + b"[" * 70 + b"]" * 70 + b"}"
    return {
        "metadata: no JSON": Hostile(of_parts(metadata=b"{"), "metadata: not JSON in UTF-8: …"),
        "metadata: nested deeply": Hostile(
            of_parts(metadata=b"[" * 100_000), "metadata: not JSON in UTF-8: nested too deeply"
        ),
        "metadata: nested too deeply for us": Hostile(
            of_parts(metadata=deep), "metadata: not JSON in UTF-8: nested too deeply"
        ),
        "metadata: NaN": Hostile(of_parts(metadata=b'{"a":NaN}'), "metadata: not JSON in UTF-8: nan is no json number"),
        "metadata: infinity": Hostile(of_parts(metadata=b'{"a":1e999}'), "metadata: not JSON in UTF-8: …"),
        "metadata: half a character": Hostile(of_parts(metadata=b'{"a":"\\ud800"}'), "metadata: not JSON in UTF-8: …"),
        "metadata: not UTF-8": Hostile(of_parts(metadata=b'"\xff"'), "metadata: not JSON in UTF-8: …"),
        "metadata: a number of many digits": Hostile(
            of_parts(metadata=b'{"a":' + b"9" * 100_000 + b"}"), "metadata: not JSON in UTF-8: …"
        ),
        "metadata: a list": Hostile(of_parts(metadata=b"[]"), "metadata: list, expected an object"),
        "metadata: a name that is a list": Hostile(
            of_parts(metadata=json.dumps({**whole, "ImageName": []}).encode()),
            "metadata: ImageName is list, expected a string",
        ),
    }


def _ramdisks() -> dict[str, Hostile]:
    expected = "expected a plain archive, at a multiple of 4, or a compressed one"
    return {
        "ramdisk: neither": Hostile(of_parts(ramdisk=b"hello!"), f"ramdisk at offset 0x0: b'hello!', {expected}"),
        "cpio: another magic": Hostile(
            raw_cpio(magic=b"070702"), "cpio entry at offset 0x3bb: magic b'070702', expected b'070701'"
        ),
        "cpio: no digits": Hostile(
            raw_cpio(mode=b"0x0081a4"), "cpio entry at offset 0x3bb: header is not all hexadecimal digits"
        ),
        "cpio: 4 GiB of data": Hostile(
            raw_cpio(filesize=b"ffffffff"), "cpio data at offset 0x42f: need 4294967295 bytes, have …"
        ),
        "cpio: 4 GiB of name": Hostile(
            raw_cpio(namesize=b"ffffffff"), "cpio entry at offset 0x3bb: name of 4294967295 bytes, expected 2 to 4096"
        ),
        "cpio: no name": Hostile(
            raw_cpio(namesize=b"00000000"), "cpio entry at offset 0x3bb: name of 0 bytes, expected 2 to 4096"
        ),
        "cpio: a NUL in a name": Hostile(
            raw_cpio(name=b"f\0le"), "cpio entry at offset 0x3bb: name does not end at its NUL"
        ),
        "cpio: cut off": Hostile(of_parts(ramdisk=BOOT[:200]), "cpio header at offset 0x42f: need 110 bytes, have 84"),
        "a gzip bomb": Hostile(
            of_parts(ramdisk=gzip.compress(bytes(60 << 20))),
            "ramdisk at offset 0x0: gzip becomes more than 50331648 bytes",
        ),
        "an xz bomb": Hostile(
            of_parts(ramdisk=lzma.compress(bytes(60 << 20), preset=0)),
            "ramdisk at offset 0x0: xz becomes more than 50331648 bytes",
        ),
        "a bzip2 bomb": Hostile(
            of_parts(ramdisk=bz2.compress(bytes(60 << 20))),
            "ramdisk at offset 0x0: bzip2 becomes more than 50331648 bytes",
        ),
        "gzip: cut off": Hostile(
            of_parts(ramdisk=gzip.compress(BOOT)[:40]), "ramdisk at offset 0x0: gzip ends before its stream does"
        ),
        "gzip: only a magic": Hostile(
            of_parts(ramdisk=b"\x1f\x8b" + b"\xff" * 20), "ramdisk at offset 0x0: damaged gzip: …"
        ),
        "file: up": Hostile(files(entry(b"../escaped")), "../escaped: a path with .., expected one that stays inside"),
        "file: up from below": Hostile(
            files(entry(b"a/../../escaped")), "a/../../escaped: a path with .., expected one that stays inside"
        ),
        "file: through a loop of symlinks": Hostile(
            files(entry(b"a", SYMLINK, b"b"), entry(b"b", SYMLINK, b"a"), entry(b"a/x")),
            "a/x: more than 40 symlinks on the way",
        ),
        "file: in a file": Hostile(files(entry(b"a"), entry(b"a/b")), "a/b: lies in a, which is no directory"),
        "file: very deep": Hostile(files(entry(b"d/" * 300 + b"x")), f"{'d/' * 300}x: more than 256 directories deep"),
        "file: a symlink to very far": Hostile(
            files(entry(b"a", SYMLINK, b"x" * 5000)), "a: a symlink of 5000 bytes, expected at most 4095"
        ),
        "file: a directory that is not empty": Hostile(
            files(entry(b"a/b"), entry(b"a")), "cannot unpack a: directory not empty"
        ),
    }


def _signatures() -> dict[str, Hostile]:
    good_pem = certificate().pem
    edwards = certificate_pem(ed25519.Ed25519PrivateKey.generate())
    other = certificate("P-384", 1)
    old = certificate_pem(key(), first=NOW - timedelta(days=900), days=100)
    not_ours = "signature: the signature is not by this key, or not over these bytes"
    integers = "expected an array of integers from 0 to 255"
    return {
        "signature: nothing": Hostile(of_parts(signature=b""), "signature section: not the CBOR expected: …"),
        "signature: not CBOR": Hostile(of_parts(signature=b"\xff" * 64), "signature section: not the CBOR expected: …"),
        "signature: nested": Hostile(
            of_parts(signature=b"\x81" * 30_000), "signature section: not the CBOR expected: …"
        ),
        "signature: a length that lies": Hostile(
            of_parts(signature=bytes.fromhex("81a2737369676e696e675f6365727469666963617465 9bffffffffffffffff")),
            "signature section: not the CBOR expected: …",
        ),
        "signature: a tag that makes objects": Hostile(
            of_parts(signature=bytes.fromhex("d81c81d81d00")), "signature section: not the CBOR expected: a tag"
        ),
        "signature: a key twice": Hostile(
            of_parts(signature=bytes.fromhex("81a2") + b"\x69signature\x40" * 2),
            "signature section: not the CBOR expected: …",
        ),
        "signature: more behind it": Hostile(
            signed_by(lambda made: bytes(made) + b"\0"), "signature section: 1 bytes after the CBOR item, expected none"
        ),
        "signature: no map": Hostile(
            of_parts(signature=cbor2.dumps([[]])), "signature section: expected an array with a map in it"
        ),
        "signature: integers that are no bytes": Hostile(
            of_parts(signature=section(signing_certificate=[256], signature=b"")),
            f"signature section: signing_certificate: {integers}",
        ),
        "signature: text": Hostile(
            of_parts(signature=section(signing_certificate=good_pem, signature="x")),
            f"signature section: signature: {integers}",
        ),
        "COSE: three parts": Hostile(
            of_parts(signature=section(signing_certificate=good_pem, signature=cbor2.dumps([b"", {}, b""]))),
            "signature: an array of 3, expected an array of 4",
        ),
        "COSE: another algorithm": Hostile(
            signed_by(lambda made: replace(made, cose=replace(made.cose, protected=cbor2.dumps({1: -8})))),
            "signature: algorithm -8, expected -7, -35 or -36 (ES256, ES384, ES512)",
        ),
        "COSE: no algorithm": Hostile(
            signed_by(lambda made: replace(made, cose=replace(made.cose, protected=b"\xa0"))),
            "signature: no algorithm in the protected header",
        ),
        "COSE: the algorithm of another curve": Hostile(
            signed_by(lambda made: replace(made, cose=replace(made.cose, protected=cbor2.dumps({1: -7})))),
            "signature: ES256 by a key on secp384r1, expected secp256r1",
        ),
        "COSE: no signature": Hostile(
            signed_by(lambda made: replace(made, cose=replace(made.cose, signature=b""))),
            "signature: signature of 0 bytes, expected 96 for ES384",
        ),
        "COSE: zeros": Hostile(
            signed_by(lambda made: replace(made, cose=replace(made.cose, signature=bytes(96)))), not_ours
        ),
        "COSE: a bit changed": Hostile(
            signed_by(lambda made: replace(made, cose=replace(made.cose, signature=b"\1" + made.cose.signature[1:]))),
            not_ours,
        ),
        "payload: another image": Hostile(
            of_parts(signature=over(bytes(48))),
            "signature: for an image with PCR0 0000000000000000..., this one's is …",
        ),
        "payload: another register": Hostile(
            of_parts(signature=with_payload({"register_index": 8, "register_value": [0] * 48})),
            "signature payload: register_index 8, expected 0",
        ),
        "payload: 47 bytes": Hostile(
            of_parts(signature=with_payload({"register_index": 0, "register_value": [0] * 47})),
            "signature payload: register_value of 47 bytes, expected 48",
        ),
        "payload: more than it should": Hostile(
            of_parts(signature=with_payload({"register_index": 0, "register_value": [0] * 48, "debug": True})),
            "signature payload: expected register_index and register_value, and nothing else",
        ),
        "certificate: none": Hostile(with_certificate(b"words"), "certificate: no certificate in PEM"),
        "certificate: damaged": Hostile(
            with_certificate(b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"),
            "certificate: damaged: …",
        ),
        "certificate: another's": Hostile(with_certificate(other.pem), not_ours),
        "certificate: another kind of key": Hostile(
            with_certificate(edwards), "certificate: a key of kind Ed25519, expected EC on P-256, P-384 or P-521"
        ),
        "certificate: another curve": Hostile(
            with_certificate(certificate_pem(key("K-256"))),
            "certificate: a key on secp256k1, expected secp256r1, secp384r1 or secp521r1",
        ),
        "certificate: expired": Hostile(
            with_certificate(old), "certificate: valid from 2023-12-14 to 2024-03-23, not on 2026-06-01"
        ),
        "certificate: not yet valid": Hostile(
            with_certificate(certificate_pem(key(), first=NOW + timedelta(days=1))),
            "certificate: valid from 2026-06-02 to 2029-02-26, not on 2026-06-01",
        ),
    }


def hostile_images() -> dict[str, Hostile]:
    """All of them."""
    return {**_structure(), **_metadata(), **_ramdisks(), **_signatures()}


def fits(refusal: str, message: str) -> bool:
    """Whether a message is the expected one."""
    parts: Sequence[str] = refusal.split("…")
    if len(parts) == 1:
        return message == refusal
    return message.startswith(parts[0]) and message.endswith(parts[1]) and len(message) > len(refusal) - 1
