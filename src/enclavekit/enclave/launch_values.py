# SPDX-License-Identifier: Apache-2.0
"""What may change from launch to launch without moving a PCR: values for names that the image's configuration declares.

They reach the application as files under /run/enclave. Nobody signs for them (docs/init.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from typing import BinaryIO

from enclavekit.codec.init_config import MAX_SIZE, InitConfig
from enclavekit.codec.init_frames import MAX_PAYLOAD, VALUE
from enclavekit.eif import Image
from enclavekit.errors import FormatError, LaunchError
from enclavekit.image.initramfs import RamdiskFile, open_ramdisk
from enclavekit.image.ramdisk import CONFIG_NAME


def check_values(file: BinaryIO, image: Image, values: Mapping[bytes, bytes]) -> None:
    """LaunchError unless the image declares all of these, and each can be carried."""
    if not values:
        return
    declared = [_text(name) for name in declared_values(file, image)]
    for name, value in values.items():
        text = _text(name)
        if text not in declared:
            near = get_close_matches(text, declared, 1)
            hint = f"did you mean {near[0]}?" if near else f"declare it when you build: --launch-value {text}"
            known = ", ".join(declared) or "none"
            raise LaunchError(f"launch value {text[:64]!r}: not one that the image declares ({known})", hint=hint)
        if VALUE.size + len(name) + len(value) > MAX_PAYLOAD:
            most = MAX_PAYLOAD - VALUE.size - len(name)
            raise LaunchError(f"launch value {text}: {len(value)} bytes, expected at most {most}")


def declared_values(file: BinaryIO, image: Image) -> tuple[bytes, ...]:
    """The names in the image's configuration; none where it has none of ours. EifError and the like as for any image.

    Source: docs/init.md. As with every file in ramdisks, the last one of that name is the one that counts.
    """
    with ExitStack() as opened:
        found: RamdiskFile | None = None
        for section in image.ramdisks:
            for member in opened.enter_context(open_ramdisk(file, section, name="image")).files:
                if member.entry.name.lstrip(b"./") == CONFIG_NAME:
                    found = member
        if found is None or found.entry.size > MAX_SIZE:
            return ()
        try:
            return InitConfig.decode(b"".join(found.content.chunks())).launch
        except FormatError as error:
            raise LaunchError(f"the image's configuration cannot be read: {error.message}") from error


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
