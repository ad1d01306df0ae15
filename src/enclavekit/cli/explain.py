# SPDX-License-Identifier: Apache-2.0
"""Where each PCR of a build comes from: the sections that it covers, and what those were made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from enclavekit.build.image import BuildResult
from enclavekit.build.inputs import PCRS, section_of
from enclavekit.eif import size_text

if TYPE_CHECKING:
    from rich.console import Console

CERTIFICATE = "signing certificate"


def explanation_object(result: BuildResult) -> dict[str, Any]:
    """PCRs with their sections, and sections with their inputs."""
    covers: dict[str, list[str]] = {name: list(PCRS.get(name, (CERTIFICATE,))) for name in result.lock.measurements}
    return {
        "Pcrs": [{"Name": name, "Value": value, "Covers": covers[name]} for name, value in _pcrs(result)],
        "Sections": [
            {
                "Name": name,
                "Size": size,
                "Inputs": [
                    {"Name": one.name, "What": one.what, "Digest": one.digest}
                    for one in result.lock.inputs
                    if section_of(one.name) == name
                ],
            }
            for name, size in result.sections
        ],
        "BuildTime": result.lock.epoch,
        "Toolkit": result.lock.toolkit,
    }


def explain_text(result: BuildResult, console: Console) -> None:
    """The same for people."""
    for name, value in _pcrs(result):
        console.print(f"{name}  {value}", markup=False)
        console.print(f"      {' + '.join(PCRS.get(name, (CERTIFICATE,)))}", markup=False)
    width = max(len(one.name) for one in result.lock.inputs)
    for name, size in result.sections:
        note = "" if any(name in covered for covered in PCRS.values()) else ", not measured"
        console.print(f"{name}: {size_text(size)}{note}", markup=False)
        for one in result.lock.inputs:
            if section_of(one.name) == name:
                what = f"  {one.what}" if one.what else ""
                console.print(f"  {one.name:<{width}} {one.digest[:23]}…{what}", markup=False)
        if name == "ramdisk-1" and not any(
            section_of(one.name) == name and one.name != "configuration" for one in result.lock.inputs
        ):
            console.print(f"  {'files':<{width}} of the source", markup=False)
    console.print(f"no file is newer than {result.lock.epoch} s after 1970", markup=False)


def _pcrs(result: BuildResult) -> list[tuple[str, str]]:
    return list(result.lock.measurements.items())
