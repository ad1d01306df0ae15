# SPDX-License-Identifier: Apache-2.0
"""Finds what in an image will not boot, or will surprise, without running anything. docs/lint.md lists all rules."""

from __future__ import annotations

from datetime import datetime
from typing import BinaryIO

from enclavekit.inspection.findings import Finding, Level
from enclavekit.inspection.layout import layout_of
from enclavekit.inspection.lint_image import image_rules
from enclavekit.inspection.lint_kernel import cmdline_rules, kernel_rules
from enclavekit.inspection.lint_leftovers import leftover_rules
from enclavekit.inspection.lint_program import program_rules
from enclavekit.inspection.lint_ramdisks import init_rules, ramdisk_rules
from enclavekit.inspection.subject import open_subject

_ORDER = list(Level)


def lint(
    file: BinaryIO, *, name: str, now: datetime, memory: int | None = None, carrier: str | None = None
) -> tuple[Finding, ...]:
    """All findings about the image in an open file, the worst first; none is good.

    ``name`` is the file's, for messages. ``memory`` in bytes is what the enclave will get. ``carrier`` is one of
    ``subject.CARRIERS``; without one, whatever might carry it is asked. Errors: EifError and TruncatedError when it is
    no image, FileError when it cannot be read.
    """
    with open_subject(file, name=name, memory=memory, now=now, carrier=carrier) as subject:
        layout = layout_of(subject.files)
        findings = [
            *image_rules(subject),
            *kernel_rules(subject, layout),
            *cmdline_rules(subject),
            *ramdisk_rules(subject),
            *init_rules(subject),
            *leftover_rules(subject),
            *program_rules(subject, layout),  # last: it changes the file system, as init does
        ]
    return tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.level)))
