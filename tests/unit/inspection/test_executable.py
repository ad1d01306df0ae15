# SPDX-License-Identifier: Apache-2.0
"""What stands in the way of executing a file: permissions, formats, interpreters, libraries of two loaders."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from elf_files import elf_file
from lint_images import DIRECTORY, FILE, PROGRAM, STATIC, SYMLINK, archive, unpacked

from enclavekit.eif import Arch
from enclavekit.inspection import libraries
from enclavekit.inspection.executable import execute
from enclavekit.inspection.file_system import FileSystem, find
from enclavekit.inspection.process import Problem, Process, look_up

GLIBC = b"/lib64/ld-linux-x86-64.so.2"
MUSL = b"/lib/ld-musl-x86_64.so.1"
LIBRARY = elf_file(kind=3)

Check = Callable[..., list[tuple[str, str]]]
Made = Callable[..., Process]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """A process whose root holds these files; their directories are made as well."""
    with ExitStack() as opened:

        def made(files: dict[str, bytes | tuple[int, bytes]], **options: object) -> Process:
            entries: dict[str, tuple[int, bytes]] = {}
            for path, one in files.items():
                parts = path.split("/")
                for depth in range(1, len(parts)):
                    entries.setdefault("/".join(parts[:depth]), (DIRECTORY, b""))
                entries[path] = one if isinstance(one, tuple) else (PROGRAM, one)
            tree = FileSystem()
            tree.merge(0, opened.enter_context(unpacked(tmp_path, archive(entries))))
            assert tree.dropped == []
            return Process(tree.root, Arch.X86_64, **options)  # type: ignore[arg-type]

        yield made


@pytest.fixture
def check(made: Made) -> Check:
    """Kinds and messages of what stands in the way of executing /app."""

    def check(files: dict[str, bytes | tuple[int, bytes]], path: bytes = b"/app", **options: object) -> object:
        return [(problem.kind, problem.message) for problem in execute(made(files, **options), path)]

    return check  # type: ignore[return-value]


def dynamic(
    *needed: bytes, interpreter: bytes | None = GLIBC, rpath: bytes | None = None, runpath: bytes | None = None
) -> bytes:
    return elf_file(kind=3, interpreter=interpreter, needed=needed, rpath=rpath, runpath=runpath)


def library(*needed: bytes) -> bytes:
    return dynamic(*needed, interpreter=None)


def needs(name: str, by: str = "/app") -> tuple[str, str]:
    return ("library", f"{name}, which {by} needs: in no directory")


def test_a_static_program_needs_nothing(check: Check) -> None:
    assert check({"app": STATIC}) == []


def test_a_32_bit_program_is_left_to_the_kernel(check: Check) -> None:
    assert check({"app": elf_file(bits=32, machine=3, interpreter=b"/lib/ld-linux.so.2")}) == []


@pytest.mark.parametrize(
    ("one", "problem"),
    [
        ((DIRECTORY, b""), ("not-executable", "/app: a directory, expected a regular file")),
        ((FILE, STATIC), ("not-executable", "/app: mode 0644, not executable by user 0")),
        ((SYMLINK, b"gone"), ("missing", "/app: no gone")),
        ((PROGRAM, b"text"), ("format", "/app: starts with b'text', expected an ELF program or #!")),
        ((PROGRAM, b""), ("format", "/app: starts with b'', expected an ELF program or #!")),
        ((PROGRAM, STATIC[:30]), ("format", "/app: ELF header at offset 0x10: need 48 bytes, have 14")),
        ((PROGRAM, elf_file(kind=4)), ("format", "/app: ELF type 4, expected a program")),
        ((PROGRAM, elf_file(machine=183)), ("architecture", "/app: for aarch64, expected x86_64")),
        ((PROGRAM, b"#!\n"), ("format", "/app: #! without an interpreter in the first 256 bytes")),
        ((PROGRAM, b"#!" + b"/" * 400), ("format", "/app: #! without an interpreter in the first 256 bytes")),
        ((PROGRAM, b"#!/bin/sh"), ("interpreter", "/bin/sh, which /app asks for: no bin")),
        ((PROGRAM, b"#!/app\n"), ("interpreter", "/app: more than 5 scripts that run one another")),
        ((PROGRAM, dynamic()), ("interpreter", "/lib64/ld-linux-x86-64.so.2, which /app asks for: no lib64")),
    ],
)
def test_a_file_alone(check: Check, one: tuple[int, bytes], problem: tuple[str, str]) -> None:
    assert check({"app": one}) == [problem]


def test_nothing_there(check: Check) -> None:
    assert check({"other": b""}) == [("missing", "/app: no app")]


def test_another_user(check: Check) -> None:
    files: dict[str, bytes | tuple[int, bytes]] = {"app": (stat.S_IFREG | 0o750, STATIC)}
    assert check(files, uid=0) == []
    assert check(files, uid=5, groups=frozenset((0,))) == []
    assert check(files, uid=5) == [("not-executable", "/app: mode 0750, not executable by user 5")]


def test_scripts(check: Check) -> None:
    sh: dict[str, bytes | tuple[int, bytes]] = {"bin/sh": STATIC, "bin/env": STATIC}
    assert check({"app": b"#!/bin/sh -e\n", **sh}) == []
    assert check({"app": b"#! \t/bin/sh", **sh}) == []
    assert check({"app": b"#!/bin/sh\r\n", **sh}) == [
        ("interpreter", "/app: #! line ends with a carriage return, expected a newline alone")
    ]
    assert check({"app": b"#!/bin/sh\n", "bin/sh": (FILE, STATIC)}) == [
        ("not-executable", "/bin/sh, which /app asks for: mode 0644, not executable by user 0")
    ]
    assert check({"app": b"#!/bin/sh\n", "bin/sh": elf_file(machine=183)}) == [
        ("architecture", "/bin/sh, which /app asks for: for aarch64, expected x86_64")
    ]
    assert check({"app": b"#!sh\n", **sh}, path=b"app") == [("interpreter", "sh, which app asks for: no sh")]


def test_env_looks_in_the_path_of_the_environment(check: Check) -> None:
    files: dict[str, bytes | tuple[int, bytes]] = {"bin/env": STATIC, "opt/python3": STATIC}
    for line in (b"#!/bin/env python3\n", b"#!/bin/env -S A=b python3 -u\n"):
        assert check({"app": line, **files}, environment={b"PATH": b"/none::/opt"}) == []
        assert check({"app": line, **files}) == [
            ("interpreter", "python3, which /app asks env for: not in PATH"),
        ]
    assert check({"app": b"#!/bin/env\n", **files}) == []


def test_what_init_mounts_over_is_not_known(check: Check) -> None:
    covered = frozenset((b"proc",))
    assert check({"app": (SYMLINK, b"/proc/self/exe")}, covered=covered) == []
    assert check({"app": dynamic(interpreter=b"/proc/ld.so")}, covered=covered) == []
    files: dict[str, bytes | tuple[int, bytes]] = {
        "app": dynamic(b"a.so", runpath=b"/proc/lib"),
        GLIBC.decode()[1:]: LIBRARY,
    }
    assert check(files, covered=covered) == []
    assert check(files) == [needs("a.so")]


def test_a_loader_for_another_machine(check: Check) -> None:
    files: dict[str, bytes | tuple[int, bytes]] = {"app": dynamic(), "lib64/ld-linux-x86-64.so.2": elf_file(machine=40)}
    assert check(files) == [
        ("architecture", "/lib64/ld-linux-x86-64.so.2, which /app asks for: for arm, expected x86_64")
    ]


@pytest.mark.parametrize(
    "place", ["lib", "usr/lib", "lib64", "usr/lib64", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"]
)
def test_glibc_default_directories(check: Check, place: str) -> None:
    loader = GLIBC.decode()[1:]
    assert check({"app": dynamic(b"a.so"), loader: LIBRARY, f"{place}/a.so": LIBRARY}) == []
    assert check({"app": dynamic(b"a.so"), loader: LIBRARY, f"{place}/a.so": STATIC[:20]}) == [needs("a.so")]
    wrong = elf_file(kind=3, machine=183)
    assert check({"app": dynamic(b"a.so"), loader: LIBRARY, f"{place}/a.so": wrong}) == [needs("a.so")]


def test_libraries_of_libraries_are_needed_once_each(check: Check) -> None:
    files: dict[str, bytes | tuple[int, bytes]] = {
        "app": dynamic(b"a.so", b"b.so", b"ld-linux-x86-64.so.2"),
        "lib64/ld-linux-x86-64.so.2": LIBRARY,
        "lib/a.so": library(b"b.so", b"gone.so"),
        "lib/b.so": library(b"a.so", b"gone.so"),
    }
    assert check(files) == [needs("gone.so", "/lib/a.so")]


@pytest.mark.parametrize(
    ("paths", "missing"),
    [
        ({"runpath": b"$ORIGIN/../own"}, ["c.so"]),  # of the program alone
        ({"rpath": b"${ORIGIN}/../own"}, []),  # of what it loads too
        ({"rpath": b"/own", "runpath": b"/elsewhere"}, ["a.so"]),  # RPATH does not count beside RUNPATH
        ({"rpath": b"/first:/own"}, []),
        ({"rpath": b"/$LIB/../own"}, []),
        ({}, ["a.so"]),
    ],
)
def test_glibc_rpath_and_runpath(check: Check, paths: dict[str, bytes], missing: list[str]) -> None:
    files: dict[str, bytes | tuple[int, bytes]] = {
        "bin/app": dynamic(b"a.so", **paths),
        "lib64/ld-linux-x86-64.so.2": LIBRARY,
        "own/a.so": library(b"c.so"),
        "own/c.so": LIBRARY,
    }
    assert [message.partition(",")[0] for _, message in check(files, path=b"/bin/app")] == missing


def test_origin_is_where_a_symlink_leads(check: Check) -> None:
    files: dict[str, bytes | tuple[int, bytes]] = {
        "app": (SYMLINK, b"opt/bin/app"),
        "opt/bin/app": dynamic(b"a.so", runpath=b"$ORIGIN/../lib"),
        "opt/lib/a.so": LIBRARY,
        "lib64/ld-linux-x86-64.so.2": LIBRARY,
    }
    assert check(files) == []


def test_ld_library_path(check: Check) -> None:
    files: dict[str, bytes | tuple[int, bytes]] = {
        "app": dynamic(b"a.so"),
        "lib64/ld-linux-x86-64.so.2": LIBRARY,
        "own/a.so": LIBRARY,
    }
    assert check(files, environment={b"LD_LIBRARY_PATH": b"/none;/own"}) == []
    assert check(files, environment={b"LD_LIBRARY_PATH": b""}) == [needs("a.so")]


def test_ld_so_conf(check: Check) -> None:
    files: dict[str, bytes | tuple[int, bytes]] = {
        "app": dynamic(b"a.so", b"b.so"),
        "lib64/ld-linux-x86-64.so.2": LIBRARY,
        "etc/ld.so.conf": b"# comment\n/none\ninclude ld.so.conf.d/*.conf\ninclude /etc/more\n",
        "etc/ld.so.conf.d/own.conf": b"/own # here\n",
        "etc/ld.so.conf.d/own.off": b"/off\n",
        "etc/more": b"/more\ninclude /etc/ld.so.conf\n",
        "own/a.so": LIBRARY,
        "off/b.so": LIBRARY,
    }
    assert check(files) == [needs("b.so")]
    assert check({**files, "more/b.so": LIBRARY}) == []


def test_a_library_with_a_slash_is_a_path(check: Check) -> None:
    loader = GLIBC.decode()[1:]
    files: dict[str, bytes | tuple[int, bytes]] = {"opt/app": dynamic(b"/lib/a.so", b"$ORIGIN/b.so"), loader: LIBRARY}
    assert check(files, path=b"/opt/app") == [needs("/lib/a.so", "/opt/app"), needs("$ORIGIN/b.so", "/opt/app")]
    assert check({**files, "lib/a.so": LIBRARY, "opt/b.so": LIBRARY}, path=b"/opt/app") == []


def test_musl(check: Check) -> None:
    files: dict[str, bytes | tuple[int, bytes]] = {
        "app": dynamic(b"libc.musl-x86_64.so.1", b"libc.so", b"a.so", interpreter=MUSL),
        MUSL.decode()[1:]: LIBRARY,
        "lib/libc.musl-x86_64.so.1": (SYMLINK, b"ld-musl-x86_64.so.1"),
    }
    assert check(files) == [needs("a.so")]
    for place in ("lib", "usr/local/lib", "usr/lib"):
        assert check({**files, f"{place}/a.so": LIBRARY}) == []
    for place in ("lib64", "lib/x86_64-linux-gnu", "own"):
        assert check({**files, f"{place}/a.so": LIBRARY}) == [needs("a.so")]
    own = {**files, "own/a.so": LIBRARY}
    assert check({**own, "etc/ld-musl-x86_64.path": b"/lib\n/own\n"}) == []
    assert check(own, environment={b"LD_LIBRARY_PATH": b"/own"}) == []


def test_musl_takes_runpath_for_what_a_program_loads(check: Check) -> None:
    files: dict[str, bytes | tuple[int, bytes]] = {
        "app": dynamic(b"a.so", interpreter=MUSL, runpath=b"/own"),
        MUSL.decode()[1:]: LIBRARY,
        "own/a.so": library(b"b.so"),
        "own/b.so": LIBRARY,
    }
    assert check(files) == []


def test_lookups_are_bounded(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "MAX_LOOKUPS", 100)
    many = b":".join(b"/%d" % number for number in range(90))
    files: dict[str, bytes | tuple[int, bytes]] = {
        "app": dynamic(*(b"%d.so" % number for number in range(50)), runpath=many),
        "lib64/ld-linux-x86-64.so.2": LIBRARY,
    }
    assert check(files) == [needs("0.so")]


@pytest.mark.parametrize(
    ("name", "path", "found"),
    [
        (b"sh", b"/none:/sbin:/bin", b"/bin/sh"),  # the one in /sbin cannot be executed
        (b"sh", b"/sbin", None),
        (b"sh", b"bin:", b"bin/sh"),
        (b"./sh", b"/bin", b"./sh"),
        (b"gone", b"/bin", None),
    ],
)
def test_look_up(made: Made, name: bytes, path: bytes, found: bytes | None) -> None:
    process = made({"bin/sh": STATIC, "sbin/sh": (FILE, STATIC)})
    assert look_up(process, name, path) == found


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="no /bin/sh")
def test_a_real_program_of_this_machine(made: Made, check: Check) -> None:
    """A real shell with its libraries: whatever is taken away is missed, and nothing else."""
    program = Path("/bin/sh").resolve().read_bytes()
    process = made({"app": program})
    problems = list(execute(process, b"/app"))
    if not problems:
        pytest.skip("the shell is static")
    loader = problems[0].message.partition(",")[0]
    assert problems == [Problem("interpreter", f"{loader}, which /app asks for: no {loader.split('/')[1]}")]
    files: dict[str, bytes | tuple[int, bytes]] = {"app": program, loader[1:]: Path(loader).read_bytes()}
    missing = [message.partition(",")[0] for _, message in check(files)]
    assert missing
    for name in missing:
        place = next(
            (
                Path(folder, name)
                for folder in ("/lib/x86_64-linux-gnu", "/lib64", "/usr/lib")
                if Path(folder, name).exists()
            ),
            None,
        )
        if place is None:
            pytest.skip(f"{name} is in a place of its own")
        files["lib/" + name] = place.read_bytes()
    assert check(files) == []
    assert find(made(files).root, b"app").size == len(program)
