# SPDX-License-Identifier: Apache-2.0
"""The whole way from a source to an image."""

from __future__ import annotations

import io
import os
import resource
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from oci_layouts import layout, member
from scripted_registry import Script, serving

from enclavekit.build import Access, Application, BuildOptions, BuildResult, KernelChoice, build
from enclavekit.build import image as image_module
from enclavekit.codec import cpio
from enclavekit.codec.init_config import InitConfig
from enclavekit.eif import Arch, Metadata, describe, read, read_section
from enclavekit.errors import BuildError, Error, FileError, KernelError, LockedError, SourceError, UsageError
from enclavekit.image.layer_cache import LayerCache
from enclavekit.image.modules import Modules

BANNER = "6.12.1-test (x@y) #1 SMP Debian"


def bzimage() -> bytes:
    made = bytearray(0x1003)
    for offset, data in (
        (0x1F1, b"\x04"),
        (0x1FE, b"\x55\xaa"),
        (0x202, b"HdrS\x0f\x02"),
        (0x20E, b"\x00\x01"),
        (0x211, b"\x01"),
        (0x230, (0x200000).to_bytes(4, "little")),
        (0x236, b"\x01"),
        (0x300, BANNER.encode()),
    ):
        made[offset : offset + len(data)] = data
    return bytes(made)


ARM64 = bytes(0x38) + b"ARM\x64" + bytes(100)


def make_options(directory: Path) -> BuildOptions:
    """A root file system, a kernel and a place for the image, all under the directory."""
    root = directory / "root"
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()
    (root / "bin/app").write_bytes(b"#!/bin/sh\n")
    (root / "bin/app").chmod(0o755)
    (root / "etc/passwd").write_text("app:x:1000:100::/:/bin/sh\n")
    for path in (root, root / "bin", root / "etc"):
        path.chmod(0o755)
    (root / "etc/passwd").chmod(0o644)
    kernel = directory / "vmlinuz-6.12.1-test"
    kernel.write_bytes(bzimage())
    return BuildOptions(
        source=f"dir:{root}",
        output=directory / "out.eif",
        kernel=KernelChoice(kernel, None, "6.12.1-test"),
        application=Application(["/bin/app", "argument"]),
        access=Access(LayerCache(directory / "cache")),
        init=b"\x7fELF init",
    )


@pytest.fixture
def options(tmp_path: Path) -> BuildOptions:
    return make_options(tmp_path)


def metadata_of(result: BuildResult) -> Metadata:
    with result.path.open("rb") as file:
        section = read(file).metadata
        assert section is not None
        return Metadata.parse(read_section(file, section))


def members(result: BuildResult, ramdisk: int) -> dict[bytes, tuple[cpio.Entry, bytes]]:
    data = result.path.read_bytes()
    section = read(io.BytesIO(data)).ramdisks[ramdisk]
    archive = data[section.offset : section.end]
    found = cpio.read(io.BytesIO(archive))
    return {one.entry.name: (one.entry, archive[one.data_offset :][: one.entry.size]) for one in found}


def test_image(options: BuildOptions) -> None:
    result = build(options)
    made = describe(result.path)
    assert made["Measurements"]["PCR0"] == result.measurements.pcr0.hex()
    assert made["Measurements"]["PCR1"] == result.measurements.pcr1.hex()
    assert made["Measurements"]["PCR2"] == result.measurements.pcr2.hex()
    assert made["CheckCRC"] is True
    assert made["Warnings"] == []
    assert [section["Type"] for section in made["Sections"]] == ["kernel", "cmdline", "metadata", "ramdisk", "ramdisk"]
    assert made["Sections"][3]["Offset"] % 4096 == 0
    assert result.size == result.path.stat().st_size
    assert result.arch is Arch.X86_64
    assert result.warnings == ()


def test_contents(options: BuildOptions) -> None:
    result = build(
        replace(
            options,
            application=replace(
                options.application, environment=["A=1", "B=2", "A=3"], workdir="/srv", user="app", logs=True
            ),
        )
    )
    config = InitConfig.decode(members(result, 1)[b"config"][1])
    assert config == InitConfig(
        arguments=(b"/bin/app", b"argument"),
        environment=(b"A=3", b"B=2"),
        workdir=b"/srv",
        uid=1000,
        gid=100,
        logs=True,
    )
    assert list(members(result, 1)) == [
        *(b"config", b"rootfs", b"rootfs/bin", b"rootfs/bin/app", b"rootfs/etc", b"rootfs/etc/passwd"),
    ]
    assert members(result, 0)[b"init"][1] == b"\x7fELF init"
    assert {entry.mtime for entry, _ in members(result, 1).values()} == {0}


def test_metadata(options: BuildOptions) -> None:
    made = metadata_of(build(replace(options, application=Application(["/bin/app"]))))
    assert made.image_name == "app"
    assert made.image_version == "1.0"
    assert made.build.time == "1970-01-01T00:00:00+00:00"
    assert made.build.kernel_version == "6.12.1-test"
    assert made.kernel is not None
    assert made.kernel.discovery.value == "acpi"
    named = metadata_of(build(replace(options, name="n", version="2")))
    assert (named.image_name, named.image_version) == ("n", "2")
    assert metadata_of(build(replace(options, application=Application(["/bin/\udcff"])))).image_name == "\\xff"


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    made = []
    for directory, mask, mode in (("one", 0o022, 0o644), ("another", 0o077, 0o600)):
        (tmp_path / directory).mkdir()
        before = os.umask(mask)
        try:
            options = make_options(tmp_path / directory)
            result = build(options)
        finally:
            os.umask(before)
        assert stat.S_IMODE(result.path.stat().st_mode) == mode
        made.append(result.path.read_bytes())
    assert made[0] == made[1]


def test_epoch(options: BuildOptions, tmp_path: Path) -> None:
    os.utime(tmp_path / "root/bin/app", (50, 50))
    result = build(replace(options, epoch=100))
    assert metadata_of(result).build.time == "1970-01-01T00:01:40+00:00"
    times = {name: entry.mtime for name, (entry, _) in members(result, 1).items()}
    assert times[b"rootfs/bin/app"] == 50
    assert times[b"rootfs/bin"] == 100


@pytest.mark.parametrize(("epoch", "app", "built"), [(None, 70, "01:10"), (60, 60, "01:00")])
def test_tar(options: BuildOptions, tmp_path: Path, epoch: int | None, app: int, built: str) -> None:
    with tarfile.open(tmp_path / "root.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("bin/app")
        info.mtime, info.uid, info.size = 70, 12, 3
        tar.addfile(info, io.BytesIO(b"app"))
    result = build(replace(options, source=f"tar:{tmp_path}/root.tar.gz", epoch=epoch))
    entry, data = members(result, 1)[b"rootfs/bin/app"]
    assert (entry.mtime, entry.uid, data) == (app, 12, b"app")
    assert metadata_of(result).build.time == f"1970-01-01T00:{built}+00:00"


def test_aarch64(options: BuildOptions, tmp_path: Path) -> None:
    (tmp_path / "Image").write_bytes(ARM64)
    kernel = KernelChoice(tmp_path / "Image", None, "mine")
    result = build(replace(options, kernel=kernel, arch=Arch.AARCH64))
    assert result.arch is Arch.AARCH64
    assert describe(result.path)["Architecture"] == "aarch64"
    assert metadata_of(result).build.kernel_version == "mine"
    assert b"i8042" not in result.path.read_bytes()
    with pytest.raises(KernelError) as caught:
        build(replace(options, kernel=kernel, arch=Arch.X86_64))
    assert caught.value.message == f"{tmp_path}/Image: a kernel for aarch64, expected one for x86_64"


def test_warnings(options: BuildOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enclavekit.build.image.resolve", lambda *_, **__: Modules(missing=("nsm",)))
    assert build(options).warnings == ("the kernel has no module nsm: the enclave cannot attest itself",)


REFUSED: list[tuple[dict[str, object], type[Error], str, str | None]] = [
    (
        {"source": "root"},
        UsageError,
        "source 'root': expected one of dir:DIRECTORY, tar:FILE, oci:DIRECTORY[:TAG], oci-archive:FILE[:TAG],"
        " docker-archive:FILE[:NAME:TAG], docker-daemon:NAME[:TAG], docker://[REGISTRY/]NAME[:TAG][@DIGEST]",
        "for example dir:./root, oci:./layout:latest",
    ),
    (
        {"command": []},
        UsageError,
        "no command: the image would have nothing to run",
        "put it last: ... -- /bin/app argument",
    ),
    ({"environment": ["A"]}, BuildError, "init configuration: environment 'A', expected NAME=VALUE", None),
    ({"workdir": "srv"}, BuildError, "init configuration: workdir 'srv', expected an absolute path", None),
    ({"stop_signal": "SIGNONE"}, BuildError, "stop signal 'SIGNONE': expected a name as SIGTERM, or a number", None),
    ({"epoch": -1}, UsageError, "epoch -1: expected seconds since 1970, at most 4294967295", None),
    ({"cmdline": ""}, BuildError, "command line: 0 bytes, expected 1 to 1792", None),
    ({"cmdline": "a\nb"}, BuildError, "command line 'a\\nb': expected printable ASCII", None),
    ({"cmdline": "a" * 1793}, BuildError, "command line: 1793 bytes, expected 1 to 1792", None),
    ({"name": "\udc80"}, BuildError, "metadata: '\\udc80' is not text in UTF-8", None),
    (
        {"user": "none"},
        SourceError,
        "user 'none': not in the image's /etc/passwd",
        "give a number, or add the user to the image",
    ),
    ({"output": Path("/dev/null")}, BuildError, "/dev/null: not a regular file, expected one or none", None),
]


@pytest.mark.parametrize(("values", "error", "message", "hint"), REFUSED)
def test_refused(
    options: BuildOptions, values: dict[str, object], error: type[Error], message: str, hint: str | None
) -> None:
    own = {name: value for name, value in values.items() if name in Application.__slots__}
    others = {name: value for name, value in values.items() if name not in own}
    application = replace(options.application, **own)  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        build(replace(options, application=application, **others))  # type: ignore[arg-type]
    assert caught.value.message == message
    assert caught.value.hint == hint
    assert not options.output.exists()


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_file())


def test_missing_files(options: BuildOptions, tmp_path: Path) -> None:
    kernel = KernelChoice(tmp_path / "none", None, "")
    for values, message in (
        ({"kernel": kernel}, f"cannot read {tmp_path}/none: no such file or directory"),
        ({"source": f"dir:{tmp_path}/none"}, f"cannot read {tmp_path}/none: no such file or directory"),
        ({"output": tmp_path / "none/out.eif"}, f"cannot write {tmp_path}/none/out.eif: no such file or directory"),
    ):
        with pytest.raises(FileError) as caught:
            build(replace(options, **values))
        assert caught.value.message == message


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can grow beyond 64 KiB: as good as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_what_was_there(options: BuildOptions, tmp_path: Path, small_files: None) -> None:
    options.output.write_bytes(b"old")
    before = files(tmp_path)
    with pytest.raises(FileError) as caught:
        build(replace(options, init=bytes(1 << 17)))
    assert caught.value.message == f"cannot write {tmp_path}/out.eif: file too large"
    assert files(tmp_path) == before
    assert options.output.read_bytes() == b"old"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SourceError("changed")])
def test_interrupted_build_leaves_nothing(
    options: BuildOptions, tmp_path: Path, interruption: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        assert any(name.startswith(".enclavekit-") for name in files(tmp_path))
        raise interruption

    monkeypatch.setattr(image_module, "write", interrupted)
    before = files(tmp_path)
    with pytest.raises(type(interruption)):
        build(options)
    assert files(tmp_path) == before


def test_symlinked_output_is_followed(options: BuildOptions, tmp_path: Path) -> None:
    (tmp_path / "link.eif").symlink_to("real.eif")
    build(replace(options, output=tmp_path / "link.eif"))
    assert (tmp_path / "link.eif").is_symlink()
    assert describe(tmp_path / "real.eif")["CheckCRC"] is True


def test_a_locked_image_comes_from_the_registry_whatever_its_tag_means_now(options: BuildOptions) -> None:
    def serve(name: str, content: bytes) -> None:
        script.load(layout(options.output.parent / name, [member("app", content, mode=0o755)], run={"Cmd": ["/app"]}))

    script = Script()
    serve("old", b"old")
    with serving(script):
        wanted = replace(options, source=f"docker://{script.host}/team/app", application=Application())
        first = build(wanted)
        before = first.path.read_bytes()
        serve("new", b"new")
        assert build(wanted).path.read_bytes() != before
        assert build(replace(wanted, locked=first.lock)).path.read_bytes() == before
        manifest = first.lock.find("image")
        assert manifest is not None
        del script.blobs[manifest.digest]
        with pytest.raises(SourceError) as caught:
            build(replace(wanted, locked=first.lock))
        assert "404" in caught.value.message


def test_a_locked_image_of_a_layout_may_not_have_moved(options: BuildOptions, tmp_path: Path) -> None:
    wanted = replace(options, source=f"oci:{tmp_path / 'layout'}", application=Application(["/app"]))
    layout(tmp_path / "layout", [member("app", b"old")])
    first = build(wanted)
    assert build(replace(wanted, locked=first.lock)).lock == first.lock
    layout(tmp_path / "layout", [member("app", b"new")])
    with pytest.raises(LockedError) as caught:
        build(replace(wanted, locked=first.lock))
    assert caught.value.message.startswith("enclave.lock: image: locked oci (sha256:")
    assert "; container: locked sha256:" in caught.value.message
