# SPDX-License-Identifier: Apache-2.0
"""An ioctl's number from what it is (linux: include/uapi/asm-generic/ioctl.h, the same on x86_64 and arm64)."""

from __future__ import annotations

import ctypes

_WRITE, _READ = 1, 2
Argument = ctypes.Structure | ctypes.c_uint32 | ctypes.c_uint64


def _ioc(direction: int, kind: int, number: int, argument: type[Argument]) -> int:
    return direction << 30 | ctypes.sizeof(argument) << 16 | kind << 8 | number


def ior(kind: int, number: int, argument: type[Argument]) -> int:
    """The kernel writes the argument."""
    return _ioc(_READ, kind, number, argument)


def iow(kind: int, number: int, argument: type[Argument]) -> int:
    """The kernel reads the argument."""
    return _ioc(_WRITE, kind, number, argument)


def iowr(kind: int, number: int, argument: type[Argument]) -> int:
    """The kernel reads and writes it."""
    return _ioc(_READ | _WRITE, kind, number, argument)
