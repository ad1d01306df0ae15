# SPDX-License-Identifier: Apache-2.0
"""Values at launch: only for names that the image itself declares."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import BinaryIO

import pytest

from enclavekit import eif
from enclavekit.codec.init_config import InitConfig
from enclavekit.eif import Arch, BytesContent, Section, SectionType
from enclavekit.enclave.launch_values import check_values, declared_values
from enclavekit.errors import LaunchError
from enclavekit.image.ramdisk import Ramdisk, application_ramdisk
from enclavekit.image.tree import Node, Tree

OPENED = ExitStack()


@pytest.fixture(autouse=True)
def _files() -> Iterator[None]:
    with OPENED:
        yield


def made(ramdisks: list[Ramdisk]) -> BinaryIO:
    file = OPENED.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    sections = [
        Section(SectionType.KERNEL, BytesContent(b"kernel")),
        Section(SectionType.CMDLINE, BytesContent(b"quiet")),
        Section(SectionType.METADATA, BytesContent(b"{}")),
        *(Section(SectionType.RAMDISK, ramdisk) for ramdisk in ramdisks),
    ]
    eif.write(file, sections, arch=Arch.X86_64)
    return file


def config(*names: bytes) -> bytes:
    return InitConfig((b"app",), launch=names).encode()


def image(*configs: bytes) -> BinaryIO:
    return made([application_ramdisk(Tree(), each) for each in configs] or [Ramdisk([])])


def declared(file: BinaryIO) -> tuple[bytes, ...]:
    return declared_values(file, eif.read(file))


def check(file: BinaryIO, values: Mapping[bytes, bytes]) -> None:
    check_values(file, eif.read(file), values)


def test_the_image_says_which_there_are() -> None:
    assert declared(image(config(b"KEY", b"tls.pem"))) == (b"KEY", b"tls.pem")
    assert declared(image(config())) == ()
    assert declared(image()) == ()


def test_the_last_configuration_counts_as_it_does_in_the_enclave() -> None:
    assert declared(image(config(b"A"), config(b"B"))) == (b"B",)


def test_a_name_may_be_written_otherwise() -> None:
    nodes = [(b"./config", Node(stat.S_IFREG | 0o600, content=BytesContent(config(b"A"))))]
    assert declared(made([Ramdisk(nodes)])) == (b"A",)


def test_declared_values_of_every_size_that_a_frame_holds() -> None:
    check(image(config(b"A")), {b"A": bytes(65536 - 2)})
    check(image(config(b"A", b"B")), {b"B": b""})
    check(image(b"not one of ours"), {})


@pytest.mark.parametrize(
    ("names", "values", "message", "hint"),
    [
        (
            (b"GREETING",),
            {b"GREETNG": b""},
            "launch value 'GREETNG': not one that the image declares (GREETING)",
            "did you mean GREETING?",
        ),
        (
            (),
            {b"A": b""},
            "launch value 'A': not one that the image declares (none)",
            "declare it when you build: --launch-value A",
        ),
        ((b"A",), {b"A": bytes(65535)}, "launch value A: 65535 bytes, expected at most 65534", None),
    ],
)
def test_what_cannot_be_given(
    names: tuple[bytes, ...], values: dict[bytes, bytes], message: str, hint: str | None
) -> None:
    with pytest.raises(LaunchError) as caught:
        check(image(config(*names)), values)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_broken_configuration_is_not_guessed_at() -> None:
    with pytest.raises(LaunchError) as caught:
        check(image(b"color=red\0"), {b"A": b""})
    assert caught.value.message == (
        "the image's configuration cannot be read: init configuration: record 0 is 'color', expected version first and"
        " once"
    )
