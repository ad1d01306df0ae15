# SPDX-License-Identifier: Apache-2.0
"""Every rule fires on an image that breaks it, with its full message, and stays silent on clean ones."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_cases
import program_cases
import pytest
import signing_keys
from eif_images import image, patched
from elf_files import elf_file
from lint_cases import (
    KEY,
    WITH_LOADER,
    Case,
    Change,
    apps,
    boots,
    both,
    cmdline,
    dynamic,
    holds,
    kernel,
    module,
    runs,
    sets,
)
from lint_images import APPLICATION, BOOT, DIRECTORY, FILE, NOW, PROGRAM, STATIC, Recipe, archive, linted
from signing_keys import certificate_pem, key

from enclavekit.codec import cbor
from enclavekit.eif import Measurements, SigningCertificate, measure_to_sign, sign, write_signed
from enclavekit.errors import EifError, FormatError
from enclavekit.image.kernel_features import Feature
from enclavekit.inspection import lint_leftovers
from enclavekit.inspection.findings import RULES, Finding, Level, found
from enclavekit.inspection.lint import lint
from enclavekit.inspection.lint_image import structure

CASES = [*kernel_cases.CASES, *program_cases.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code}: {case.message[:40]}")
def test_it_fires(case: Case, tmp_path: Path) -> None:
    recipe = Recipe.nitro() if case.nitro else Recipe()
    case.change(recipe)
    findings = linted(tmp_path, recipe, memory=case.memory, carrier=case.carrier)
    (finding,) = [
        one for one in findings if (one.code, one.where, _steady(one.message)) == (case.code, case.where, case.message)
    ] or pytest.fail(f"{findings}")
    assert finding.level is (case.level or RULES[case.code].level)


def _steady(message: str) -> str:
    """Without what depends on the size of the whole image."""
    message = re.sub(r"image of \d+ bytes", "image of SIZE bytes", message)
    return re.sub(r"^cpio entry at offset 0x\w+", "cpio entry at offset 0xNNN", message)


UNTESTED_HERE = {"structure", "structure-odd", "crc", "signature", "signature-odd", "certificate", "certificate-soon"}


def signed(directory: Path, certificate: SigningCertificate, *, of: bytes = b"", odd: bool = False) -> list[Finding]:
    """What is said of the signature of a clean image."""
    (directory / "image.eif").write_bytes(image())
    with (directory / "image.eif").open("rb") as file, (directory / "signed.eif").open("w+b") as out:
        found_image, measured = measure_to_sign(file, "x")

        def make(measurements: Measurements) -> bytes:
            made = sign(of or measurements.pcr0, certificate, key())
            return (
                b"\x81\xa2" + cbor.encode({"signature": bytes(made.cose), "signing_certificate": certificate.pem})[1:]
                if odd
                else bytes(made)
            )

        write_signed(out, file, found_image, measured, make, name="x")
        codes = ("signature", "signature-odd", "certificate", "certificate-soon")
        return [one for one in lint(out, name="x", now=signing_keys.NOW) if one.code in codes]


def test_signatures(tmp_path: Path) -> None:
    assert signed(tmp_path, signing_keys.certificate()) == []
    (other,) = signed(tmp_path, signing_keys.certificate(), of=bytes(48))
    assert (other.code, other.level) == ("signature", Level.ERROR)
    assert other.message.startswith("signature: for an image with PCR0 0000000000000000..., this one's is ")
    (odd,) = signed(tmp_path, signing_keys.certificate(), odd=True)
    assert (odd.code, odd.message) == ("signature-odd", "the section is not encoded as AWS's tools do")
    start = signing_keys.NOW - timedelta(days=100)
    (expired,) = signed(tmp_path, SigningCertificate(certificate_pem(key(), first=start, days=99)))
    assert (expired.code, expired.level) == ("certificate", Level.ERROR)
    assert expired.message == "certificate: valid from 2026-02-21 to 2026-05-31"
    (soon,) = signed(tmp_path, SigningCertificate(certificate_pem(key(), first=start, days=120)))
    assert (soon.code, soon.level) == ("certificate-soon", Level.WARNING)
    assert soon.message == "certificate: expires on 2026-06-21"


def test_every_rule_has_a_case() -> None:
    assert set(RULES) == {case.code for case in CASES} | UNTESTED_HERE


def test_clean_images_are_clean(tmp_path: Path) -> None:
    assert linted(tmp_path, Recipe()) == []
    assert linted(tmp_path, Recipe(), carrier="nitro") == []
    assert linted(tmp_path, Recipe(), carrier="qemu") == []
    assert {finding.code for finding in linted(tmp_path, Recipe.nitro())} == {"user-root"}


def clean(change: Change, tmp_path: Path, *, nitro: bool = False) -> list[Finding]:
    recipe = Recipe.nitro() if nitro else Recipe()
    change(recipe)
    return [finding for finding in linted(tmp_path, recipe) if finding.code != "user-root" or not nitro]


@pytest.mark.parametrize(
    "change",
    [
        runs(arguments=(b"app",)),
        runs(arguments=(b"./app",), workdir=b"/bin"),
        runs(arguments=(b"app",), environment=(b"PATH=relative:/bin", b"PATH=/none")),
        runs(workdir=b"/proc/self"),
        both(holds({**WITH_LOADER, "rootfs/lib64/libz.so.1": (FILE, elf_file(kind=3))}), apps(dynamic(b"libz.so.1"))),
        holds({"rootfs/cert.pem": (FILE, b"-----BEGIN CERTIFICATE-----\n"), "rootfs/core": (FILE, b"text")}),
        holds({"rootfs/.git": (FILE, b"gitdir"), "rootfs/.ssh": (DIRECTORY, b""), "rootfs/gdb": (FILE, b"")}),
        holds({"rootfs/run": (DIRECTORY, b""), "rootfs/run/a": (FILE, b"our init keeps it")}),
        holds({"rootfs/dev": (DIRECTORY, b""), "rootfs/dev/null": (FILE, b"")}),
        sets(ramdisks=[archive(BOOT) + bytes(208), gzip.compress(archive(APPLICATION))]),
        sets(ramdisks=[gzip.compress(archive(BOOT)), gzip.compress(archive(APPLICATION))]),
        sets(ramdisks=[archive(BOOT), archive(APPLICATION), archive({"dev": (DIRECTORY, b"")})]),
        cmdline("rdinit=/init", "loglevel=3", "init=/sbin/init", "mitigations=auto"),
        kernel(release="5.10.0"),
    ],
)
def test_it_stays_silent(change: Change, tmp_path: Path) -> None:
    assert clean(change, tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        holds({"cmd": (FILE, b"app\n")}),
        holds({"cmd": (FILE, b""), "rootfs/bin/sh": (PROGRAM, STATIC), "env": (FILE, b"")}),
        boots(**{"nsm.ko": (FILE, module())}),
    ],
)
def test_nitro_stays_silent(change: Change, tmp_path: Path) -> None:
    assert {finding.code for finding in clean(change, tmp_path, nitro=True)} <= {"cmd-empty"}


def test_modules_of_the_boot_ramdisk_count(tmp_path: Path) -> None:
    names = ("virtio_mmio", "vmw_vsock_virtio_transport", "nsm")
    files: dict[str, Any] = {"modules": (DIRECTORY, b"")}
    files |= {f"modules/{number:02}-{name}.ko": (FILE, module(name)) for number, name in enumerate(names)}
    lacking = kernel(Feature.VIRTIO_MMIO, Feature.VSOCK, Feature.NSM)
    assert clean(both(lacking, boots(**files)), tmp_path) == []
    # nitro-cli's init loads nothing but nsm.ko.
    found_codes = {finding.code for finding in clean(both(lacking, boots(**files)), tmp_path, nitro=True)}
    assert found_codes == {"kernel-virtio", "kernel-vsock", "kernel-nsm"}


def test_an_unknown_init_may_load_modules(tmp_path: Path) -> None:
    unknown = sets(ramdisks=[archive(BOOT), archive({"data": (FILE, b"x")})])
    changed = both(kernel(Feature.VIRTIO_MMIO, Feature.VSOCK, Feature.NSM, Feature.DEVTMPFS), unknown)
    assert [finding.code for finding in clean(changed, tmp_path)] == ["layout-unknown"]


def test_what_cannot_be_read_is_not_called_missing(tmp_path: Path) -> None:
    """A ramdisk that only this machine cannot unpack may hold anything."""
    findings = clean(sets(ramdisks=[b"\x89LZO....", archive(APPLICATION)]), tmp_path)
    assert {finding.code for finding in findings} == {"ramdisk-unread"}


def test_what_the_kernel_cannot_unpack_is_missing(tmp_path: Path) -> None:
    findings = clean(sets(ramdisks=[b"junk", archive(APPLICATION)]), tmp_path)
    assert [finding.code for finding in findings] == ["ramdisk", "init-missing", "ramdisk-unread", "layout-unknown"]


def test_a_configuration_tells_of_panics_and_random_numbers(tmp_path: Path) -> None:
    options = {option: "y" for feature in Feature for option in feature.value.options}
    options |= {"CONFIG_RANDOM_TRUST_CPU": "y", "CONFIG_PANIC_TIMEOUT": "-1"}
    text = "".join(f"{name}={value}\n" for name, value in options.items())
    change = both(kernel(configuration=text), sets(cmdline=b"console=ttyS0"))
    assert clean(change, tmp_path) == []


def test_hints_name_what_is_found_elsewhere(tmp_path: Path) -> None:
    (case,) = [case for case in CASES if case.nitro and case.message.startswith("in no directory")]
    recipe = Recipe.nitro()
    case.change(recipe)
    (finding,) = [one for one in linted(tmp_path, recipe) if one.code == "program-missing"]
    assert finding.hint == "it is /opt/app: init does not use the PATH of env; give the whole path"


def test_many_of_a_kind_are_counted(tmp_path: Path) -> None:
    files: dict[str, Any] = {f"rootfs/{number}.key": (FILE, KEY) for number in range(13)}
    files |= {f"gone{number}/file": (FILE, b"") for number in range(8)}
    libraries = [b"lib%d.so" % number for number in range(12)]
    findings = clean(both(holds({**files, **WITH_LOADER}), apps(dynamic(*libraries))), tmp_path)
    assert [one.message for one in findings if one.code == "leftover-key"][-1] == "3 more: a private key"
    assert [one.message for one in findings if one.code == "file-dropped"][-1] == "3 more files cannot be made"
    assert [one.message for one in findings if one.code == "program-library"][-1] == "2 more libraries are missing"
    replaced = {f"f{number}": (FILE, b"") for number in range(7)}
    findings = clean(sets(ramdisks=[archive({**BOOT, **replaced}), archive({**APPLICATION, **replaced})]), tmp_path)
    assert [one.message for one in findings][-1] == "2 more files are replaced"


def test_no_more_than_so_many_files_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint_leftovers, "MAX_READ", 2)
    assert len(clean(holds({f"rootfs/{number}.key": (FILE, KEY) for number in range(5)}), tmp_path)) == 2


def test_the_worst_come_first(tmp_path: Path) -> None:
    findings = clean(both(runs(uid=0), kernel(Feature.NSM, Feature.VSOCK)), tmp_path)
    assert [finding.level for finding in findings] == [Level.ERROR, Level.WARNING, Level.NOTE]


def test_a_wrong_crc(tmp_path: Path) -> None:
    data = bytearray(Recipe().made())
    right = int.from_bytes(data[544:548], "big")
    data[544:548] = bytes(4)
    (finding,) = linted(tmp_path, bytes(data))
    assert finding == Finding(
        "crc",
        Level.ERROR,
        f"CRC 0x00000000, expected 0x{right:08x}",
        "header",
        "the file was damaged or changed: build or fetch it again",
    )


def test_remarks_of_a_tolerant_reader() -> None:
    remarks = (
        SimpleNamespace(message="a gap", refused=False),
        SimpleNamespace(message="two kernels", refused=True),
    )
    image = SimpleNamespace(remarks=remarks, header=SimpleNamespace(version=4))
    subject: Any = SimpleNamespace(image=image, locally=True)
    assert list(structure(subject)) == [
        found("structure-odd", "file", "a gap"),
        found("structure", "file", "two kernels"),
    ]


def test_old_formats_are_fine_on_ec2(tmp_path: Path) -> None:
    assert linted(tmp_path, Recipe(version=3, metadata=None), carrier="nitro") == []


def test_what_is_no_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EifError):
        linted(tmp_path, b"not an image at all" * 100)


def mutations() -> Iterator[bytes]:
    """Damaged images: every part hit, with a CRC that is right again, so that no part hides behind another."""
    for recipe in (Recipe(), Recipe.nitro()):
        data = recipe.made()
        for offset in range(560, len(data) - 8, 29):
            for change in (b"\0" * 4, b"\xff" * 8, b"/../"):
                yield patched(data, (offset, change))


def test_damaged_images_are_linted_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.eif"
    linted_ones = 0
    for data in mutations():
        path.write_bytes(data)
        with path.open("rb") as file, suppress(FormatError):
            linted_ones += isinstance(lint(file, name="damaged.eif", now=NOW), tuple)
    assert linted_ones > 100
