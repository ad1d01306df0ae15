# SPDX-License-Identifier: Apache-2.0
"""The init program that goes into every image, as the build hook made it from guest/init."""

from __future__ import annotations

from importlib.resources import files

from enclavekit.codec.bzimage import Arch
from enclavekit.errors import MissingError


def init_program(arch: Arch) -> bytes:
    """A static ELF program."""
    try:
        return files("enclavekit.image").joinpath(f"init.{arch.value}").read_bytes()
    except OSError as error:
        raise MissingError(
            f"this installation of enclavekit has no init for {arch.value}", hint="install it again, with pip"
        ) from error
