# SPDX-License-Identifier: Apache-2.0
"""Images made to do harm: each is refused in the expected words, and nothing that reads one does anything else."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hostile_images import fits, good, hostile_images
from signing_keys import NOW

from enclavekit import eif
from enclavekit.cli.main import run_command
from enclavekit.errors import Error
from enclavekit.image.initramfs import open_ramdisk
from enclavekit.inspection.unpack import unpack

IMAGES = hostile_images()


def judge(path: Path) -> None:
    """All that can be wrong with an image before it boots; raises the first of it."""
    with path.open("rb") as file:
        examined = eif.examine(file, str(path), strict=True)
        if examined.metadata_error:
            raise examined.metadata_error
        if examined.signature:
            examined.signature.certificate.check_validity(NOW)
        for section in examined.image.ramdisks:
            with open_ramdisk(file, section, name=str(path)) as ramdisk, tempfile.TemporaryDirectory() as directory:
                if ramdisk.trouble:
                    raise ramdisk.trouble
                unpack(ramdisk, Path(directory))


def test_how_many() -> None:
    assert len(IMAGES) >= 50


def test_a_good_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "image.eif").write_bytes(good())
    judge(tmp_path / "image.eif")


@pytest.mark.parametrize("name", IMAGES)
def test_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "image.eif").write_bytes(IMAGES[name].data)
    with pytest.raises(Error) as caught:
        judge(tmp_path / "image.eif")
    assert fits(IMAGES[name].refusal, caught.value.message), caught.value.message


@pytest.mark.parametrize("name", IMAGES)
def test_no_command_does_anything_else(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit codes are ours, files are where they were said to be, and the image is as it was."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "canary").write_text("alive")
    Path("image.eif").write_bytes(IMAGES[name].data)
    Path("good.eif").write_bytes(good())
    for words in (
        ["describe", "image.eif"],
        ["describe", "image.eif", "--strict", "--json"],
        ["nitro-cli", "describe-eif", "--eif-path", "image.eif"],
        ["pcr", "image.eif"],
        ["diff", "image.eif", "good.eif"],
        ["diff", "good.eif", "image.eif", "--no-pcrs", "--json"],
        ["extract", "image.eif", "-C", "out", "--rootfs"],
    ):
        assert run_command(words) in (0, 1, 2, 3, 4, 17, 35), words
    assert Path("image.eif").read_bytes() == IMAGES[name].data
    assert sorted(os.listdir()) in (["good.eif", "image.eif"], ["good.eif", "image.eif", "out"])  # noqa: PTH208
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary", "work"]
    assert (tmp_path / "canary").read_text() == "alive"
