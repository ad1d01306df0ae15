# SPDX-License-Identifier: Apache-2.0
"""Images that measure as nitro-cli's do."""

from __future__ import annotations

import io
import stat
import tarfile
from pathlib import Path

import pytest
from eif_images import BOOT, linuxkit_archive
from kernel_files import bzimage
from oci_layouts import directory, layout, member, symlink

from enclavekit.build import Access, Application, BuildOptions, KernelChoice, build
from enclavekit.build.nitro_cli import Blobs, command_of
from enclavekit.eif import Image, read
from enclavekit.errors import BuildError, FileError, NoKernelError, UsageError
from enclavekit.image.layer_cache import LayerCache
from enclavekit.image.linuxkit import MADE
from enclavekit.image.oci import ImageConfig

CMDLINE = "reboot=k panic=30 console=ttyS0"
IMAGE = ImageConfig("linux", "amd64", (), entrypoint=("/entry",), command=("/cmd", "x"), environment=("A=1",))


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    made = tmp_path / "blobs"
    made.mkdir()
    (made / "bzImage").write_bytes(bzimage(b"payload"))
    (made / "cmdline").write_text(CMDLINE + "\n")
    (made / "init").write_bytes(b"#!init\n")
    (made / "nsm.ko").write_bytes(b"\x7fELF-nsm")
    return made


def options(tmp_path: Path, blobs: Path, source: str, application: Application) -> BuildOptions:
    return BuildOptions(
        source=source,
        output=tmp_path / "out.eif",
        kernel=KernelChoice(blobs, None, ""),
        application=application,
        access=Access(LayerCache(tmp_path / "cache")),
        blobs=Blobs(blobs),
    )


def parts(path: Path) -> tuple[Image, bytes]:
    data = path.read_bytes()
    return read(io.BytesIO(data)), data


def expected_application() -> bytes:
    """Written down by hand from the rules."""
    link, folder, file = stat.S_IFLNK, stat.S_IFDIR | 0o755, stat.S_IFREG
    hosts = (
        b"127.0.0.1       localhost\n::1     localhost ip6-localhost ip6-loopback\nfe00::0 ip6-localnet\n"
        b"ff00::0 ip6-mcastprefix\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n"
    )
    made = [
        (b"rootfs", folder, MADE, b""),
        (b"rootfs/app/", folder, 1_600_000_000, b""),
        (b"rootfs/app/run", file | 0o755, 1_600_000_000, b"#!/bin/sh\n"),
        (b"rootfs/app/sh", link | 0o777, 1_600_000_000, b"run"),
        (b"rootfs/dev/", folder, MADE, b""),
        (b"rootfs/dev/pts/", folder, MADE, b""),
        (b"rootfs/dev/shm/", folder, MADE, b""),
        (b"rootfs/etc/", folder, MADE, b""),
        (b"rootfs/etc/hosts", file | 0o755, MADE, hosts),
        (b"rootfs/etc/mtab", link | 0o777, MADE, b"/proc/mounts"),
        (b"rootfs/etc/resolv.conf", link | 0o755, MADE, b"/run/resolvconf/resolv.conf"),
        (b"rootfs/proc/", folder, MADE, b""),
        (b"rootfs/sys/", folder, MADE, b""),
    ]
    again = (b"", b"/dev", b"/run", b"/sys", b"/var", b"/proc", b"/tmp")
    made += [(b"rootfs" + name, folder, MADE, b"") for name in again]
    made += [(b"cmd", file | 0o644, MADE, b"/app/run\n-v\n"), (b"env", file | 0o644, MADE, b"PATH=/bin\nB=2\n")]
    return linuxkit_archive([(name, mode, time, data) for name, mode, time, data in made])


ENTRIES = [
    directory("app", mtime=1_600_000_000),
    member("app/run", b"#!/bin/sh\n", mode=0o755, mtime=1_600_000_000),
]


def test_all_that_is_measured(blobs: Path, tmp_path: Path) -> None:
    link, data = symlink("app/sh", "run")
    link.mtime = 1_600_000_000
    run = {"Cmd": ["/app/run", "-v"], "Entrypoint": ["/ignored"], "Env": ["PATH=/bin"], "User": "nobody"}
    path = layout(tmp_path / "layout", [*ENTRIES, (link, data)], run=run, created="2020-01-01T00:00:00Z")
    result = build(options(tmp_path, blobs, f"oci:{path}", Application(environment=["B=2"])))
    image, data = parts(result.path)
    assert data[image.kernel.offset : image.kernel.end] == (blobs / "bzImage").read_bytes()
    assert data[image.cmdline.offset : image.cmdline.end] == CMDLINE.encode()
    first, second = (data[one.offset : one.end] for one in image.ramdisks)
    assert first == BOOT
    assert second == expected_application()


def test_an_exported_tar_is_the_same(blobs: Path, tmp_path: Path) -> None:
    """docker export has put in already what is put into other sources."""
    link, _ = symlink("app/sh", "run")
    link.mtime = 1_600_000_000
    exported = [
        member(".dockerenv", mode=0o755),
        *ENTRIES,
        (link, b""),
        directory("dev"),
        member("dev/console", mode=0o755),
        directory("dev/pts"),
        directory("dev/shm"),
        directory("etc"),
        member("etc/hostname", mode=0o755),
        member("etc/hosts", mode=0o755),
        symlink("etc/mtab", "/proc/mounts"),
        member("etc/resolv.conf", mode=0o755),
        directory("proc"),
        directory("sys"),
    ]
    with tarfile.open(tmp_path / "root.tar", "w") as out:
        for info, data in exported:
            out.addfile(info, io.BytesIO(data))
    application = Application(["/app/run", "-v"], environment=["PATH=/bin", "B=2"])
    image, data = parts(build(options(tmp_path, blobs, f"tar:{tmp_path}/root.tar", application)).path)
    second = image.ramdisks[1]
    assert data[second.offset : second.end] == expected_application()


def test_command_or_entrypoint_never_both() -> None:
    assert command_of(Application(), IMAGE) == (b"/cmd", b"x")
    assert command_of(Application(), ImageConfig("linux", "amd64", (), entrypoint=("/entry",))) == (b"/entry",)
    assert command_of(Application(["/mine"]), IMAGE) == (b"/mine",)
    with pytest.raises(UsageError) as caught:
        command_of(Application(), None)
    assert caught.value.message == "no command: the image would have nothing to run"
    with pytest.raises(BuildError) as broken:
        command_of(Application(["a\nb"]), None)
    assert broken.value.message == "'a\\nb': a line end, which nitro-cli's init takes for the end of the word"


@pytest.mark.parametrize(
    ("application", "option"),
    [
        (Application(["x"], workdir="/srv"), "workdir"),
        (Application(["x"], user="app"), "user"),
        (Application(["x"], stop_signal="9"), "stop-signal"),
        (Application(["x"], logs=True), "logs"),
    ],
)
def test_what_its_init_cannot_do(application: Application, option: str) -> None:
    with pytest.raises(UsageError) as caught:
        command_of(application, None)
    assert caught.value.message == f"--{option}: nitro-cli's init does not know it"


def test_blobs_that_are_not_there(blobs: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    made = options(tmp_path, blobs, f"dir:{tmp_path}/root", Application(["/x"]))
    (blobs / "init").unlink()
    with pytest.raises(FileError) as caught:
        build(made)
    assert caught.value.message == f"cannot read {blobs}/init: no such file or directory"
    (blobs / "bzImage").unlink()
    with pytest.raises(NoKernelError) as missing:
        build(made)
    assert missing.value.message == f"{blobs}: 0 kernels, expected bzImage or Image"
    assert not made.output.exists()
