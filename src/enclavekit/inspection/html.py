# SPDX-License-Identifier: Apache-2.0
"""An image as one HTML page that needs nothing else: its layout, how each PCR comes about, the files with their sizes.

No script, no link, nothing loaded (a content security policy says so); light and dark as the reader's system is. All
that comes from the image is text, escaped, its control characters made visible. The same image gives the same page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from datetime import datetime
from importlib.resources import files
from typing import BinaryIO

from enclavekit.eif import (
    Examined,
    ImageSection,
    Measurements,
    SectionType,
    digest,
    extend,
    read_section,
    size_text,
    warnings,
)
from enclavekit.eif.layout import HEADER_SIZE
from enclavekit.errors import CertificateError, FormatError
from enclavekit.image.initramfs import open_ramdisk
from enclavekit.inspection.file_tree import MAX_SHOWN_FILES, file_tree
from enclavekit.inspection.layout_picture import Part, layout_picture

PCR2_OF_NOTHING = extend(digest(b""))
MAX_TEXT = 1 << 16

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(file: BinaryIO, examined: Examined, name: str, at: datetime | None) -> Iterator[str]:
    """The page in pieces. ``examined`` is of this open file, with the digests of its sections.

    ``at`` is when the certificate ought to be valid.
    """
    metadata = examined.metadata
    title = f"{metadata.image_name} {metadata.image_version}" if metadata else name.rpartition("/")[2]
    yield (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(title)}</title>\n'
        f"<style>\n{files(__package__).joinpath('html.css').read_text()}</style>\n</head>\n<body>\n<main>\n"
    )
    yield f"<h1>{_text(title)}</h1>\n"
    arch = examined.image.arch
    yield f'<p class="lead">Enclave image for {arch}, {size_text(examined.image.size)}, {_text(name)}</p>\n'
    yield from _facts(examined)
    if examined.image.refusals or not examined.crc_holds or examined.signature_error:
        yield '<p class="refused">Hypervisors refuse this image.</p>\n'
    found = warnings(examined, at)
    if found:
        yield '<ul class="warnings">\n' + "".join(f"<li>{_text(one)}</li>\n" for one in found) + "</ul>\n"
    parts = _parts(examined)
    yield "<h2>Layout</h2>\n"
    yield f'<div class="box">{layout_picture(parts, _bands(examined))}</div>\n'
    yield from _sections(examined)
    yield from _measurements(examined)
    yield from _command_line(file, examined)
    yield from _ramdisks(file, examined, name)
    yield from _metadata(examined)
    yield "</main>\n</body>\n</html>\n"


def section_name(examined: Examined, section: ImageSection) -> str:
    """kernel, ramdisk-0 and the like."""
    if section.type is SectionType.RAMDISK:
        return f"ramdisk-{examined.image.ramdisks.index(section)}"
    return section.kind


def _facts(examined: Examined) -> Iterator[str]:
    facts = [("Format", f"EIF version {examined.image.header.version}")]
    if examined.metadata:
        build = examined.metadata.build
        facts.append(("Built", f"{build.time} by {build.tool} {build.tool_version}"))
        facts.append(("Kernel", f"{build.operating_system} {build.kernel_version}"))
        if examined.metadata.container:
            facts.append(("Container image", examined.metadata.container))
    facts.append(("Signature", _signature(examined)))
    yield "<dl>\n" + "".join(f"<dt>{one}</dt><dd>{_text(what)}</dd>\n" for one, what in facts) + "</dl>\n"


def _signature(examined: Examined) -> str:
    if not examined.image.signature:
        return "none"
    if not examined.signature:
        return "cannot be read"
    try:
        certificate = examined.signature.certificate
        first, last = certificate.validity
        subject = certificate.x509.subject.rfc4514_string()
        algorithm = certificate.algorithm.name
    except (CertificateError, ValueError, TypeError):
        return "with a certificate that cannot be read"
    state = "does not hold" if examined.signature_error else "holds"
    return f"{state}: {algorithm} by {subject}, valid {first:%Y-%m-%d} to {last:%Y-%m-%d}"


def _parts(examined: Examined) -> list[Part]:
    """All bytes of the file, in order."""
    parts = [Part("header", 0, HEADER_SIZE, "header")]
    end = HEADER_SIZE
    for section in examined.image.sections:
        if section.header_offset > end:
            parts.append(Part("gap", end, section.header_offset - end, "gap"))
        name = section_name(examined, section)
        look = name if name == "ramdisk-0" else section.kind if isinstance(section.type, SectionType) else "other"
        parts.append(Part(name, section.offset, section.size, look))
        end = section.end
    if examined.image.size > end:
        parts.append(Part("trailing", end, examined.image.size - end, "gap"))
    return parts


def _bands(examined: Examined) -> list[tuple[str, set[str]]]:
    """Which parts each PCR covers, by name."""
    names = [(section, section_name(examined, section)) for section in examined.image.sections]
    platform = {name for section, name in names if section.type in (SectionType.KERNEL, SectionType.CMDLINE)}
    ramdisks = {name for section, name in names if section.type is SectionType.RAMDISK}
    bands = [
        ("PCR0", platform | ramdisks),
        ("PCR1", platform | (ramdisks & {"ramdisk-0"})),
        ("PCR2", ramdisks - {"ramdisk-0"}),
    ]
    if examined.image.signature:
        bands.append(("PCR8", {"signature"}))
    return [(name, covered) for name, covered in bands if covered]


def _sections(examined: Examined) -> Iterator[str]:
    yield (
        '<table>\n<tr><th>section</th><th class="n">offset</th><th class="n">bytes</th><th class="n"></th>'
        "<th>SHA-384 of its data</th></tr>\n"
    )
    digests = examined.measured.section_digests or (b"",) * len(examined.image.sections)
    for section, one in zip(examined.image.sections, digests, strict=True):
        yield (
            f'<tr><td class="s">{section_name(examined, section)}</td><td class="n">0x{section.offset:x}</td>'
            f'<td class="n">{section.size}</td><td class="n">{size_text(section.size)}</td>'
            f'<td><code class="digest">{one.hex()}</code></td></tr>\n'
        )
    yield "</table>\n"


def _measurements(examined: Examined) -> Iterator[str]:
    yield "<h2>Measurements</h2>\n"
    yield (
        "<p>What the security module of an enclave in production mode attests. Each is SHA-384 of 48 zero bytes and the"
        " SHA-384 of the parts named, one after another. The header, the metadata and the sizes of the parts are not"
        " measured.</p>\n"
    )
    measurements: Measurements = examined.measured.measurements
    values = {"PCR0": measurements.pcr0, "PCR1": measurements.pcr1, "PCR2": measurements.pcr2}
    covers = dict(_bands(examined))
    for pcr, value in values.items():
        wanted = covers.get(pcr, set())
        names = [section_name(examined, one) for one in examined.image.sections]
        inner = " ‖ ".join(name for name in names if name in wanted) or "nothing"
        yield from _pcr(pcr, inner, value.hex())
        if value == PCR2_OF_NOTHING:
            yield '<p class="lead">There is no second ramdisk: this value is the same in every such image.</p>\n'
    pcr8 = examined.measurements.get("PCR8")
    if pcr8:
        yield from _pcr("PCR8", "signing certificate in DER", pcr8)


def _pcr(name: str, inner: str, value: str) -> Iterator[str]:
    formula = f"SHA-384(48 zero bytes ‖ SHA-384({inner}))"
    yield (
        f'<h3>{name}</h3>\n<div class="box"><code>{_text(formula)}</code><br>'
        f'<code class="digest">{value}</code></div>\n'
    )


def _command_line(file: BinaryIO, examined: Examined) -> Iterator[str]:
    for section in examined.image.sections:
        if section.type is SectionType.CMDLINE:
            try:
                text = read_section(file, section).decode("utf-8", "backslashreplace")
            except FormatError as error:
                text = error.message
            yield f"<h2>Kernel command line</h2>\n<pre>{_text(text)}</pre>\n"


def _ramdisks(file: BinaryIO, examined: Examined, name: str) -> Iterator[str]:
    room = MAX_SHOWN_FILES
    for number, section in enumerate(examined.image.ramdisks):
        yield f"<h2>Files of ramdisk-{number}</h2>\n"
        with open_ramdisk(file, section, name=name) as ramdisk:
            kinds = sorted({archive.compression or "not compressed" for archive in ramdisk.archives})
            count = sum(len(archive.files) for archive in ramdisk.archives)
            yield f'<p class="lead">{count} files, {_text(", ".join(kinds) or "no archive")}</p>\n'
            if ramdisk.trouble:
                yield f'<ul class="warnings"><li>{_text(ramdisk.trouble.message)}</li></ul>\n'
            yield from file_tree(ramdisk, room)
            room = max(0, room - count)


def _metadata(examined: Examined) -> Iterator[str]:
    metadata = examined.metadata
    if metadata is None:
        return
    for title, value in (("Container", metadata.docker_info), ("Custom metadata", metadata.custom)):
        if value is not None:
            text = json.dumps(value, indent=2, ensure_ascii=False)
            yield f"<h2>{title}</h2>\n<pre>{_text(text[:MAX_TEXT])}{'…' if len(text) > MAX_TEXT else ''}</pre>\n"


def _text(text: str) -> str:
    """Escaped; what is not printable becomes visible, but for line ends."""
    shown = "".join(
        char if char.isprintable() or char == "\n" else f"\\u{ord(char):04x}" for char in text[: MAX_TEXT + 1]
    )
    return html.escape(shown)
