# SPDX-License-Identifier: Apache-2.0
"""The metadata section."""

from __future__ import annotations

import json
from typing import Any

import pytest
from eif_images import METADATA
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.eif import BuildInfo, Discovery, KernelInfo, Metadata
from enclavekit.errors import EifError

PLAIN = Metadata("hello", "v1", BuildInfo("1970-01-01T00:00:00+00:00", "nitro-cli", "1.5.0", "Linux", "4.14.256"))
WITH_KERNEL = Metadata("é", "1", PLAIN.build, {"b": [1]}, {"a": None}, KernelInfo("6.12", "ab" * 48, Discovery.ACPI))


def test_upstream_bytes() -> None:
    assert Metadata.parse(METADATA) == PLAIN
    assert PLAIN.encode().rstrip(b" ") == METADATA


def test_kernel_and_free_json() -> None:
    data = WITH_KERNEL.encode()
    assert Metadata.parse(data) == WITH_KERNEL
    assert data.rstrip().endswith(
        b'"DockerInfo":{"b":[1]},"CustomMetadata":{"a":null},'
        b'"Kernel":{"Name":"6.12","SHA384":"' + b"ab" * 48 + b'","Discovery":"acpi"}}'
    )
    assert "é".encode() in data


@given(st.integers(0, 1 << 40))
def test_the_next_section_starts_on_a_page(offset: int) -> None:
    data = PLAIN.encode(offset)
    assert (offset + len(data) + 12) % 4096 == 0
    assert len(data) - len(data.rstrip()) < 4096


def changed(**values: Any) -> bytes:
    return json.dumps(json.loads(METADATA) | values).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "metadata: not JSON in UTF-8: expecting value"),
        (b"\xff", "metadata: not JSON in UTF-8: 'utf-8' codec can't decode byte 0xff in position 0"),
        (b"[" * 100_000, "metadata: not JSON in UTF-8: nested too deeply"),
        (b'{"a": NaN}', "metadata: not JSON in UTF-8: nan is no json number"),
        (b'{"a": 1e999}', "metadata: not JSON in UTF-8: out of range float values are not json compliant"),
        (b'"\\ud800"', "metadata: not JSON in UTF-8: 'utf-8' codec can't encode character '\\ud800' in position 1"),
        (b"null", "metadata: NoneType, expected an object"),
        (b"{}", "metadata BuildMetadata: NoneType, expected an object"),
        (changed(ImageName=1), "metadata: ImageName is int, expected a string"),
        (changed(BuildMetadata={}), "metadata: BuildTime is NoneType, expected a string"),
        (METADATA.replace(b'"DockerInfo":null,', b""), "metadata: no key DockerInfo"),
        (METADATA.replace(b',"CustomMetadata":null', b""), "metadata: no key CustomMetadata"),
        (changed(Kernel=[]), "metadata Kernel: list, expected an object"),
        (
            changed(Kernel={"Name": "", "SHA384": "", "Discovery": "pci"}),
            "metadata Kernel: discovery 'pci', expected acpi or cmdline",
        ),
    ],
)
def test_refused(data: bytes, message: str) -> None:
    with pytest.raises(EifError) as caught:
        Metadata.parse(data)
    assert caught.value.message == message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    with pytest.raises(EifError):  # by chance nothing makes all the keys
        Metadata.parse(data)


@given(json_values, json_values)
def test_round_trip(docker_info: Any, custom: Any) -> None:
    for_printing = json.dumps([docker_info, custom], ensure_ascii=False)
    if any(0xD800 <= ord(char) < 0xE000 for char in for_printing):
        return
    made = Metadata("n", "v", PLAIN.build, docker_info, custom)
    assert Metadata.parse(made.encode(99)) == made
