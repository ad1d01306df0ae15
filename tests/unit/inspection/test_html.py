# SPDX-License-Identifier: Apache-2.0
"""Images drawn as pages: whole, harmless, and the same each time."""

from __future__ import annotations

import gzip
import io
import json
import re
import stat
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from eif_images import APPLICATION, BOOT, METADATA, PCR0, PCR1, PCR2, PCR2_OF_NOTHING, image, patched
from hostile_images import entry, good, hostile_images
from signing_keys import NOW, certificate

from enclavekit.cli.main import run_command
from enclavekit.codec import cpio
from enclavekit.eif import Arch, BytesContent, Section, SectionType, examine, write
from enclavekit.errors import Error
from enclavekit.inspection import file_tree as file_tree_module
from enclavekit.inspection.html import render

VOID = {"meta", "br", "rect", "line"}


class Checker(HTMLParser):
    """Every element is closed, in order; nothing is loaded or linked."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "a", "img", "link", "iframe", "object", "form")
        assert not {name for name, _ in attrs} & {"src", "href", "srcset", "action", "style"}
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(data: bytes, *, late: bool = False) -> str:
    """Of an image in memory."""
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        examined = examine(file, "dir/image.eif", section_digests=True)
        at = NOW + timedelta(days=5000) if late else NOW
        made = "".join(render(file, examined, "dir/image.eif", at))
    checker = Checker()
    checker.feed(made)
    assert checker.open == []
    assert "http:" not in made
    assert "https:" not in made
    assert "url(" not in made
    return made


def with_ramdisk(data: bytes, metadata: bytes = METADATA) -> bytes:
    out = io.BytesIO()
    parts = {
        SectionType.KERNEL: b"kernel",
        SectionType.CMDLINE: b"quiet <b>&\x1b[31m",
        SectionType.METADATA: metadata,
        SectionType.RAMDISK: data,
    }
    write(out, [Section(kind, BytesContent(content)) for kind, content in parts.items()], arch=Arch.X86_64)
    return out.getvalue()


def test_what_is_on_it() -> None:
    made = page(good())
    assert "<title>hello v1</title>" in made
    for value in (PCR1, PCR2_OF_NOTHING, certificate().pcr8.hex()):
        assert f'<code class="digest">{value}</code>' in made
    assert "There is no second ramdisk" in made
    assert "holds: ES384 by CN=test, valid 2026-02-21 to 2028-11-17" in made
    assert "SHA-384(48 zero bytes ‖ SHA-384(kernel ‖ cmdline ‖ ramdisk-0))" in made
    made = page(image())
    for value in (PCR0, PCR1, PCR2):
        assert value in made
    assert "SHA-384(48 zero bytes ‖ SHA-384(kernel ‖ cmdline ‖ ramdisk-0 ‖ ramdisk-1))" in made
    assert "SHA-384(48 zero bytes ‖ SHA-384(ramdisk-1))" in made
    assert len(re.findall(r"<td><code class=\"digest\">[0-9a-f]{96}</code></td>", made)) == 5
    assert "hello.sh" in made
    assert "hi → hello.sh" in made
    assert "Hypervisors refuse" not in made


def test_the_same_each_time() -> None:
    for data in (image(), good()):
        assert page(data) == page(data)


def test_hostile_words_are_words() -> None:
    evil = b"<script>alert(1)</script>\"'&\x1b\xe2\x80\xae"
    metadata = json.loads(METADATA)
    metadata["ImageName"] = "<img src=x onerror=y>\u202e"
    metadata["CustomMetadata"] = {"<b>": "</pre><script>"}
    archive = b"".join(cpio.archive([entry(evil), entry(b"link", stat.S_IFLNK | 0o777, evil)]))
    made = page(with_ramdisk(archive, json.dumps(metadata).encode()))
    assert "<script" not in made
    assert "<img" not in made
    assert "\x1b" not in made
    assert "\u202e" not in made
    assert "&lt;script&gt;alert(1)&lt;" in made
    assert "quiet &lt;b&gt;&amp;\\u001b[31m" in made


def test_odd_images() -> None:
    assert "Hypervisors refuse this image." in page(image()[:-100])
    made = page(patched(image() + b"tail", (6, b"\x02\0")))
    assert "trailing: 4 bytes at offset 0xdc7" in made
    assert "unknown header flags 0x0200" in made
    assert "9 files, gzip" not in made
    assert "13 files, gzip" in page(with_ramdisk(gzip.compress(APPLICATION, mtime=0)))
    assert "cpio header at offset" in page(with_ramdisk(BOOT[:200]))
    assert "the enclave will not start" in page(good(), late=True)


@pytest.mark.parametrize("name", hostile_images())
def test_hostile_images_are_drawn_or_refused(name: str) -> None:
    try:
        made = page(hostile_images_data()[name])
    except Error as error:
        assert error.message  # noqa: PT017 - either outcome is right
    else:
        assert made.endswith("</html>\n")


_DATA: dict[str, bytes] = {}


def hostile_images_data() -> dict[str, bytes]:
    if not _DATA:
        _DATA.update({name: hostile.data for name, hostile in hostile_images().items()})
    return _DATA


def test_very_many_files_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enclavekit.inspection.html.MAX_SHOWN_FILES", 3)
    archive = b"".join(cpio.archive([entry(b"d/f%d" % number, data=b"x") for number in range(10)]))
    made = page(with_ramdisk(archive))
    assert "10 files, not compressed" in made
    assert "f2</span>" in made
    assert "f3</span>" not in made
    assert "and 7 files more" in made


def test_very_deep_files() -> None:
    archive = b"".join(cpio.archive([entry(b"d/" * 2000 + b"x")]))
    made = page(with_ramdisk(archive))
    assert made.count("<details") == file_tree_module.MAX_LEVELS - 1


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.eif").write_bytes(image())
    assert run_command(["describe", "a.eif", "--html", "a.html"]) == 0
    assert Path("a.html").read_text().startswith("<!doctype html>\n")
    assert run_command(["describe", "a.eif", "--html", "none/a.html"]) == 1
    assert "cannot write none/a.html: no such file or directory" in capsys.readouterr().err
    Path("bad.eif").write_bytes(b"junk")
    assert run_command(["describe", "bad.eif", "--html", "b.html"]) == 1
    assert sorted(path.name for path in Path().iterdir()) == ["a.eif", "a.html", "bad.eif"]
