# SPDX-License-Identifier: Apache-2.0
"""Rules about the program that init runs: whether it is told one, finds it, and can run it where it then is.

Source: docs/init.md for enclavekit's init; aws-nitro-enclaves-sdk-bootstrap init/init.c for nitro-cli's.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass

from enclavekit.codec.init_config import MAX_SIZE, InitConfig
from enclavekit.errors import FormatError
from enclavekit.inspection.executable import execute
from enclavekit.inspection.file_system import CoveredError, FileSystem, Node, PathError, find, kind_name, shown
from enclavekit.inspection.findings import Finding, found
from enclavekit.inspection.layout import Layout
from enclavekit.inspection.process import Process, look_up
from enclavekit.inspection.subject import Subject

NITRO_PATH = b"/sbin:/usr/sbin:/bin:/usr/bin"
"""Where nitro-cli's init looks, whatever PATH the image sets."""
DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_ENV_LINES = 1 << 16
MAX_LIBRARIES_NAMED = 10

_MOUNTED = {
    # whose init: what it mounts file systems of the kernel on, and on what empty ones
    Layout.ENCLAVEKIT: ((b"dev", b"proc", b"sys"), ()),
    Layout.NITRO_CLI: ((b"dev", b"proc", b"sys"), (b"run", b"tmp")),
}


@dataclass(frozen=True, slots=True)
class _Program:
    """What init would run."""

    name: bytes
    path: bytes
    """The directories that it is looked for in."""
    environment: dict[bytes, bytes]
    workdir: bytes = b"/"
    uid: int = 0
    groups: frozenset[int] = frozenset((0,))


def program_rules(subject: Subject, layout: Layout) -> Iterator[Finding]:
    """All of them; nothing where ramdisks could not be read to their end, and so anything may be missing."""
    if not subject.complete:
        return
    if layout is Layout.UNKNOWN:
        yield found("layout-unknown", "/", "neither config nor cmd and env: the program is not checked")
        return
    findings: list[Finding] = []
    files = subject.files
    program = _configured(files, findings) if layout is Layout.ENCLAVEKIT else _nitro(files, findings)
    yield from findings
    try:
        root = find(files.root, b"rootfs")
        if not root.is_directory:
            raise PathError(f"a {kind_name(root.mode)}")
    except PathError as error:
        yield found("rootfs-missing", "/rootfs", f"no root file system: {error}")
        return
    yield from _hidden(root, layout)
    if program:
        yield from _program(subject, layout, root, program)


def _configured(files: FileSystem, findings: list[Finding]) -> _Program | None:
    try:
        node = find(files.root, b"config")
    except PathError as error:
        findings.append(found("config-missing", "/config", f"no configuration: {error}"))
        return None
    try:
        config = InitConfig.decode(node.read_at(0, MAX_SIZE + 1))
    except FormatError as error:
        findings.append(found("config-invalid", "/config", error.message))
        return None
    if config.uid == 0:
        findings.append(found("user-root", "/config", "the program runs as root", hint="enclave build --user USER"))
    environment = {b"PATH": DEFAULT_PATH} | _variables(config.environment)
    groups = frozenset((config.gid, *config.groups))
    path = environment[b"PATH"]
    return _Program(config.arguments[0], path, environment, config.workdir, config.uid, groups)


def _nitro(files: FileSystem, findings: list[Finding]) -> _Program | None:
    texts: dict[bytes, list[bytes]] = {}
    for name in (b"cmd", b"env"):
        try:
            texts[name] = find(files.root, name).read_at(0, MAX_SIZE).splitlines()[:MAX_ENV_LINES]
        except PathError as error:
            findings.append(found(f"{name.decode()}-missing", f"/{name.decode()}", f"{error}: init crashes"))
    if len(texts) < 2:
        return None
    findings.append(found("user-root", "/cmd", "the program runs as root: nitro-cli's init ignores USER"))
    for line in texts[b"env"]:
        name, equals, _ = line.partition(b"=")
        if not equals or not name:
            hint = "a value with a newline in it is cut there"
            findings.append(found("env-line", "/env", f"{shown(line)!r}, expected NAME=VALUE", hint=hint))
            break
    if not texts[b"cmd"]:
        findings.append(found("cmd-empty", "/cmd", "no program: init runs sh instead"))
    program = texts[b"cmd"][0] if texts[b"cmd"] else b"sh"
    # With no variable at all, the program gets the PATH of init.
    environment = _variables(texts[b"env"]) if texts[b"env"] else {b"PATH": NITRO_PATH}
    return _Program(program, NITRO_PATH, environment)


def _variables(items: list[bytes] | tuple[bytes, ...]) -> dict[bytes, bytes]:
    # As getenv does: the first of a name counts.
    return {name: value for name, _, value in (item.partition(b"=") for item in reversed(items))}


def _hidden(root: Node, layout: Layout) -> Iterator[Finding]:
    """Files below what init mounts; and empties it, as it will be when the program runs."""
    kernels, empty = _MOUNTED[layout]
    for name in (*kernels, *empty):
        directory = (root.children or {}).get(name)
        if directory is None or not directory.is_directory:
            continue
        files = [path for path, node in FileSystem().walk(directory) if node.is_file and node.size]
        if files:
            some = f"/{shown(name)}/{shown(files[0])}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
            hint = "put them elsewhere, or have the program make them"
            message = f"{some}: hidden, for init mounts something on /{shown(name)}"
            yield found("files-hidden", f"/rootfs/{shown(name)}", message, hint=hint)
        if name in empty:
            root.put(name, Node(stat.S_IFDIR | 0o1777, root))


def _program(subject: Subject, layout: Layout, root: Node, program: _Program) -> Iterator[Finding]:
    covered = frozenset(_MOUNTED[layout][0])
    start, problem = _workdir(root, program, covered)
    if problem:
        yield problem
        if problem.code == "workdir":
            return
    process = Process(
        root,
        subject.image.arch,
        start=start,
        covered=covered,
        environment=program.environment,
        uid=program.uid,
        groups=program.groups,
    )
    where = f"/rootfs: {shown(program.name)}"
    if layout is Layout.NITRO_CLI and b"/" in program.name and not program.name.startswith(b"/"):
        yield found("program-relative", where, "a relative path: it starts at /, for init ignores WORKDIR")
    path = look_up(process, program.name, program.path)
    if path is None:
        path = look_up(process, program.name, program.environment.get(b"PATH", b""))
        hint = None
        if path:
            hint = f"it is {shown(path)}: init does not use the PATH of env; give the whole path"
        yield found("program-missing", where, f"in no directory of {shown(program.path)}", hint=hint)
        return
    libraries = 0
    for one in execute(process, path):
        libraries += one.kind == "library"
        if libraries <= MAX_LIBRARIES_NAMED:
            yield found(f"program-{one.kind}", where, one.message)
    if libraries > MAX_LIBRARIES_NAMED:
        yield found("program-library", where, f"{libraries - MAX_LIBRARIES_NAMED} more libraries are missing")


def _workdir(root: Node, program: _Program, covered: frozenset[bytes]) -> tuple[Node, Finding | None]:
    where = f"/rootfs{shown(program.workdir)}"
    try:
        node = find(root, program.workdir, covered=covered)
    except CoveredError:
        return root, None
    except PathError as error:
        user = "root's" if program.uid == 0 else f"root's, and the program runs as user {program.uid}"
        finding = found("workdir-missing", where, f"{error}: init makes it, as {user}")
        return Node(stat.S_IFDIR | 0o755, root), finding
    if not node.is_directory:
        return root, found("workdir", where, f"a {kind_name(node.mode)}, expected a directory")
    return node, None
