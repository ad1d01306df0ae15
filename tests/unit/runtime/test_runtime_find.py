# SPDX-License-Identifier: Apache-2.0
"""Which QEMU and kernel are used, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from enclavekit.errors import FileError, FormatError, NoKernelError, NoQemuError
from enclavekit.runtime import find
from enclavekit.runtime.find import Kernel, Qemu, find_kernel, find_qemu
from enclavekit.runtime.manifest import Component, Package, read_manifest, write_manifest

KERNEL = "6.12.117+deb13-cloud-amd64"


def component(name: str, version: str) -> Component:
    packages = (Package("a", "1:2-3", 4, "ab" * 32),)
    return Component(name, version, f"{name}-{version}", "trixie", "2026-01-02T03:04:05+00:00", packages)


def program(directory: Path, text: str, name: str = "qemu-system-x86_64") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def install(root: Path) -> None:
    """A runtime whose QEMU must never be run to be found."""
    program(root / "qemu-11.1.3/usr/bin", "exit 1")
    program(root / "qemu-11.1.3/usr/lib/x86_64-linux-gnu", "exit 1", "ld-linux-x86-64.so.2")
    (root / f"kernel-{KERNEL}/usr/lib/modules/{KERNEL}").mkdir(parents=True)
    (root / f"kernel-{KERNEL}/boot").mkdir()
    (root / f"kernel-{KERNEL}/boot/vmlinuz-{KERNEL}").write_text("")
    write_manifest(root, {"qemu": component("qemu", "11.1.3"), "kernel": component("kernel", KERNEL)})


def test_manifest_round_trip(tmp_path: Path) -> None:
    components = {"qemu": component("qemu", "11.1.3"), "busybox-static": component("busybox-static", "1")}
    write_manifest(tmp_path, components)
    assert read_manifest(tmp_path) == components
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "components": {"a": {}}}', "[" * 99999]
)
def test_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(FormatError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == f"{tmp_path}/manifest.json: damaged"
    assert caught.value.hint == "enclave runtime remove, then enclave runtime install"


@pytest.mark.parametrize("directory", ["", ".", "..", "../up", "/etc"])
def test_manifest_names_only_directories_of_the_root(tmp_path: Path, directory: str) -> None:
    write_manifest(tmp_path, {"qemu": Component("qemu", "11.1.3", directory, "trixie", "", ())})
    with pytest.raises(FormatError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == f"{tmp_path}/manifest.json: damaged"


def test_manifest_of_another_schema(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": 2}')
    with pytest.raises(FormatError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == f"{tmp_path}/manifest.json: schema 2, expected 1"


def test_manifest_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(FileError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == f"cannot read {tmp_path}/manifest.json: is a directory"


def test_installed_qemu_is_found_without_being_run(tmp_path: Path) -> None:
    install(tmp_path)
    program(tmp_path / "bin", "echo QEMU emulator version 12.0.0")
    base = tmp_path / "qemu-11.1.3/usr"
    libraries = f"{base}/lib/x86_64-linux-gnu"
    assert find_qemu(tmp_path, path=f"{tmp_path}/bin") == Qemu(
        (
            f"{libraries}/ld-linux-x86-64.so.2",
            "--inhibit-cache",
            "--library-path",
            libraries,
            f"{base}/bin/qemu-system-x86_64",
            "-L",
            f"{base}/share/qemu",
            "-L",
            f"{base}/share/seabios",
        ),
        (11, 1, 3),
        {"QEMU_MODULE_DIR": f"{libraries}/qemu"},
    )


def test_new_qemu_on_path(tmp_path: Path) -> None:
    path = program(tmp_path / "bin", "echo 'QEMU emulator version 10.2.0 (made here)'")
    assert find_qemu(tmp_path, path=f"/nowhere:{path.parent}") == Qemu((str(path),), (10, 2, 0))


def test_old_qemu_on_path(tmp_path: Path) -> None:
    path = program(tmp_path / "bin", "echo QEMU emulator version 10.1.9")
    with pytest.raises(NoQemuError) as caught:
        find_qemu(tmp_path, path=str(path.parent))
    assert str(caught.value) == (f"{path}: QEMU 10.1.9, expected 10.2 or newer, and none is installed by enclave")
    assert caught.value.hint == "enclave runtime install"


def test_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(NoQemuError) as caught:
        find_qemu(tmp_path)
    assert str(caught.value) == "no QEMU: none is installed by enclave, and PATH has none"
    assert caught.value.hint == "enclave runtime install"


def test_qemu_whose_files_have_gone(tmp_path: Path) -> None:
    install(tmp_path)
    (tmp_path / "qemu-11.1.3/usr/bin/qemu-system-x86_64").unlink()
    with pytest.raises(NoQemuError):
        find_qemu(tmp_path)


def test_named_qemu_goes_first_whatever_its_version(tmp_path: Path) -> None:
    install(tmp_path)
    path = program(tmp_path / "bin", "echo QEMU emulator version 7.2.22", "mine")
    expected = Qemu((str(path),), (7, 2, 22))
    assert find_qemu(tmp_path, str(path)) == expected
    assert find_qemu(tmp_path, "mine", str(path.parent)) == expected


def test_named_qemu_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(NoQemuError) as caught:
        find_qemu(tmp_path, "/nowhere/qemu")
    assert str(caught.value) == "/nowhere/qemu: no such program"
    assert caught.value.hint == "name a qemu-system-x86_64"


def test_named_program_is_not_qemu(tmp_path: Path) -> None:
    path = program(tmp_path, "echo 'true (GNU coreutils) 9.1'; echo more")
    with pytest.raises(NoQemuError) as caught:
        find_qemu(tmp_path, str(path))
    assert str(caught.value) == (f"{path}: --version says 'true (GNU coreutils) 9.1', expected QEMU emulator version")


def test_named_program_says_nothing(tmp_path: Path) -> None:
    path = program(tmp_path, "exit 0")
    with pytest.raises(NoQemuError) as caught:
        find_qemu(tmp_path, str(path))
    assert str(caught.value) == f"{path}: --version says 'nothing', expected QEMU emulator version"


def test_named_program_cannot_be_run(tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.write_bytes(b"\x7fELF, but no further")
    path.chmod(0o755)
    with pytest.raises(NoQemuError) as caught:
        find_qemu(tmp_path, str(path))
    assert str(caught.value) == f"{path}: cannot be run: exec format error"


def test_named_program_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "VERSION_TIMEOUT_S", 0.05)
    path = program(tmp_path, "kill -STOP $$")
    with pytest.raises(NoQemuError) as caught:
        find_qemu(tmp_path, str(path))
    assert str(caught.value) == f"{path}: no answer to --version within 0 s"


def test_installed_kernel(tmp_path: Path) -> None:
    install(tmp_path)
    base = tmp_path / f"kernel-{KERNEL}"
    found = Kernel(KERNEL, base / f"boot/vmlinuz-{KERNEL}", base / f"usr/lib/modules/{KERNEL}")
    assert find_kernel(tmp_path) == found
    other = tmp_path / "other"
    other.mkdir()
    assert find_kernel(tmp_path, modules=str(other)) == Kernel(KERNEL, found.path, other)


def test_named_kernel(tmp_path: Path) -> None:
    install(tmp_path)
    (tmp_path / "bzImage").write_text("")
    assert find_kernel(tmp_path, f"{tmp_path}/bzImage") == Kernel("bzImage", tmp_path / "bzImage", None)
    assert find_kernel(tmp_path, f"{tmp_path}/bzImage", str(tmp_path)).modules == tmp_path


def test_no_kernel(tmp_path: Path) -> None:
    with pytest.raises(NoKernelError) as caught:
        find_kernel(tmp_path)
    assert str(caught.value) == "no guest kernel: none is installed by enclave, and none is named"
    assert caught.value.hint == "enclave runtime install"


@pytest.mark.parametrize("gone", ["boot", "usr"])
def test_kernel_whose_files_have_gone(tmp_path: Path, gone: str) -> None:
    install(tmp_path)
    (tmp_path / f"kernel-{KERNEL}" / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(NoKernelError):
        find_kernel(tmp_path)


def test_named_kernel_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(NoKernelError) as caught:
        find_kernel(tmp_path, "/nowhere/bzImage")
    assert (str(caught.value), caught.value.hint) == ("/nowhere/bzImage: no such file", "name a bzImage")


def test_named_modules_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(NoKernelError) as caught:
        find_kernel(tmp_path, None, "/nowhere/modules")
    assert str(caught.value) == "/nowhere/modules: no such directory"
    assert caught.value.hint == "name the lib/modules/VERSION of the kernel"
