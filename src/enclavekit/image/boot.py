# SPDX-License-Identifier: Apache-2.0
"""The boot ramdisk: what is the same for every application. It is measured in PCR1.

``dev`` and ``dev/console`` for the kernel's first open, ``init``, and the kernel's modules as ``modules/NN-name.ko``,
which init loads in the order of their names. All owned by root, all from 1970.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from importlib import resources

from enclavekit.eif import Arch, BytesContent
from enclavekit.errors import MissingError
from enclavekit.image.modules import Module
from enclavekit.image.ramdisk import Ramdisk
from enclavekit.image.tree import Node

CONSOLE = (5, 1)
MAX_MODULES = 100


def boot_ramdisk(init: bytes, modules: Sequence[Module]) -> Ramdisk:
    """From the init program and the modules in load order, at most 100."""
    if len(modules) > MAX_MODULES:
        raise ValueError(f"{len(modules)} modules, expected at most {MAX_MODULES}")
    directory = stat.S_IFDIR | 0o755
    nodes = [
        (b"dev", Node(directory)),
        (b"dev/console", Node(stat.S_IFCHR | 0o600, rdev=CONSOLE)),
        (b"init", Node(stat.S_IFREG | 0o755, content=BytesContent(init))),
        (b"modules", Node(directory)),
    ]
    for number, module in enumerate(modules):
        name = b"modules/%02d-%s.ko" % (number, module.name.encode())
        nodes.append((name, Node(stat.S_IFREG | 0o644, content=BytesContent(module.data))))
    return Ramdisk(nodes)


def init_program(arch: Arch) -> bytes:
    """The init that came with this package for that architecture."""
    try:
        return resources.files("enclavekit.image").joinpath(f"init.{arch}").read_bytes()
    except FileNotFoundError as error:
        raise MissingError(
            f"init for {arch}: not in this installation of enclavekit",
            hint="run python hatch_build.py in the checkout, or install the package again",
        ) from error
