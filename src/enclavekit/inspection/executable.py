# SPDX-License-Identifier: Apache-2.0
"""Whether a file of an image can be executed: what the kernel asks of it, and then the dynamic loader.

Source: linux fs/binfmt_elf.c, fs/binfmt_script.c, and libraries.py. Nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from enclavekit.codec.elf import MAGIC, Elf, ElfType, Machine
from enclavekit.eif import Arch
from enclavekit.errors import FormatError
from enclavekit.inspection.file_system import CoveredError, Node, PathError, kind_name, shown
from enclavekit.inspection.libraries import missing_libraries
from enclavekit.inspection.process import Problem, Process, look_up

SCRIPT_HEAD_SIZE = 256
"""The kernel looks for ``#!`` and the interpreter in so many bytes (BINPRM_BUF_SIZE)."""
MAX_SCRIPTS = 5
"""Interpreters that are scripts themselves."""

_MACHINES = {Arch.X86_64: Machine.X86_64, Arch.AARCH64: Machine.AARCH64}
_COMPATIBLE = {Arch.X86_64: Machine.I386, Arch.AARCH64: Machine.ARM}
"""32-bit programs, which most kernels run as well."""


def execute(process: Process, path: bytes) -> Iterator[Problem]:
    """All that is in the way of executing the file at ``path``; nothing where that cannot be known."""
    yield from _execute(process, path, path, 0)


def _execute(process: Process, path: bytes, named: bytes, depth: int) -> Iterator[Problem]:
    """``named`` is what all this is about, ``path`` what is looked at: the file itself, or an interpreter of it."""
    missing = "missing" if not depth else "interpreter"
    asked = "" if not depth else f", which {shown(named)} asks for"
    try:
        node = process.find(path)
    except CoveredError:
        return
    except PathError as error:
        yield Problem(missing, f"{shown(path)}{asked}: {error}")
        return
    if not node.is_file:
        yield Problem("not-executable", f"{shown(path)}{asked}: a {kind_name(node.mode)}, expected a regular file")
        return
    if not node.may_execute(process.uid, process.groups):
        yield Problem(
            "not-executable",
            f"{shown(path)}{asked}: mode {node.mode & 0o7777:04o}, not executable by user {process.uid}",
        )
        return
    head = node.read_at(0, SCRIPT_HEAD_SIZE)
    if head.startswith(MAGIC):
        yield from _execute_elf(process, node, path, asked)
    elif head.startswith(b"#!"):
        yield from _execute_script(process, head, path, named, depth)
    else:
        yield Problem("format", f"{shown(path)}{asked}: starts with {head[:4]!r}, expected an ELF program or #!")


def _execute_script(process: Process, head: bytes, path: bytes, named: bytes, depth: int) -> Iterator[Problem]:
    line, newline, _ = head[2:].partition(b"\n")
    # Only these two separate: a carriage return is part of a name, and that file does not exist.
    interpreter, *words = [word for word in re.split(rb"[ \t]+", line) if word] or [b""]
    if not interpreter or (not newline and len(head) == SCRIPT_HEAD_SIZE and not words):
        yield Problem("format", f"{shown(path)}: #! without an interpreter in the first {SCRIPT_HEAD_SIZE} bytes")
        return
    if depth == MAX_SCRIPTS:
        yield Problem("interpreter", f"{shown(named)}: more than {MAX_SCRIPTS} scripts that run one another")
        return
    if interpreter.endswith(b"\r"):
        yield Problem("interpreter", f"{shown(path)}: #! line ends with a carriage return, expected a newline alone")
        return
    yield from _execute(process, interpreter, path, depth + 1)
    program = next((word for word in words if not word.startswith(b"-") and b"=" not in word), None)
    if interpreter.rpartition(b"/")[2] == b"env" and program:
        # execvp uses the PATH that env got from its own caller.
        found = look_up(process, program, process.environment.get(b"PATH", b"/bin:/usr/bin"))
        if found is None:
            yield Problem("interpreter", f"{shown(program)}, which {shown(path)} asks env for: not in PATH")
        else:
            yield from _execute(process, found, path, depth + 1)


def _execute_elf(process: Process, node: Node, path: bytes, asked: str) -> Iterator[Problem]:
    try:
        elf = Elf.parse(node.read_at)
    except FormatError as error:
        yield Problem("format", f"{shown(path)}{asked}: {error.message}")
        return
    if elf.machine == _COMPATIBLE[process.arch]:
        return  # some kernels run these too
    if elf.machine != _MACHINES[process.arch]:
        yield Problem("architecture", f"{shown(path)}{asked}: for {elf.machine_name}, expected {process.arch}")
    elif elf.type not in (ElfType.EXEC, ElfType.DYN):
        yield Problem("format", f"{shown(path)}{asked}: ELF type {elf.type}, expected a program")
    elif elf.interpreter is not None:
        yield from _load(process, elf.interpreter, path, node, elf)


def _load(process: Process, interpreter: bytes, path: bytes, node: Node, elf: Elf) -> Iterator[Problem]:
    asked = f"{shown(interpreter)}, which {shown(path)} asks for"
    try:
        loader = Elf.parse(process.find(interpreter).read_at)
    except CoveredError:
        return
    except (PathError, FormatError) as error:
        yield Problem("interpreter", f"{asked}: {error}")
        return
    if loader.machine != elf.machine:
        yield Problem("architecture", f"{asked}: for {loader.machine_name}, expected {process.arch}")
        return
    yield from missing_libraries(process, interpreter, path, node, elf)
