# SPDX-License-Identifier: Apache-2.0
"""``--platform nitro``: kernels that would find nothing are refused before anything is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from enclavekit.eif import Discovery
from enclavekit.enclave.nitro_platform import nitro_discovery
from enclavekit.errors import LaunchError
from enclavekit.image.kernel_features import Feature

EC2 = (Feature.CMDLINE_DEVICES, Feature.MP_TABLE)


def discovery(path: Path, kernel: bytes) -> Discovery:
    """Of a kernel at offset 16 of a file."""
    path.write_bytes(bytes(16) + kernel)
    image = SimpleNamespace(kernel=SimpleNamespace(offset=16, size=len(kernel)))
    with path.open("rb") as file:
        return nitro_discovery(file, image)  # type: ignore[arg-type]


def kernel(*features: Feature) -> bytes:
    """One that is not compressed, with the strings of ``features``."""
    return b"Linux version 6.1.0-test (a@b)\0" + b"".join(feature.value.string for feature in features)


def test_a_kernel_as_for_ec2_is_told_by_its_command_line(tmp_path: Path) -> None:
    assert discovery(tmp_path / "a", kernel(*EC2)) is Discovery.CMDLINE


@pytest.mark.parametrize(
    ("features", "reasons"),
    [
        ((), "no virtio-mmio devices from the command line and no MP table"),
        (EC2[:1], "no MP table"),
        (EC2[1:], "no virtio-mmio devices from the command line"),
    ],
)
def test_others_are_refused_with_the_reasons(tmp_path: Path, features: tuple[Feature, ...], reasons: str) -> None:
    with pytest.raises(LaunchError) as refused:
        discovery(tmp_path / "a", kernel(*features))
    assert str(refused.value) == (
        f"kernel 6.1.0-test: {reasons}, going by its strings: on EC2, and with --platform nitro, it finds no device "
        "and gives no sign of life"
    )


def test_a_kernel_that_cannot_be_read_gets_its_chance(tmp_path: Path) -> None:
    assert discovery(tmp_path / "a", b"\x7f" * 64) is Discovery.CMDLINE
