# SPDX-License-Identifier: Apache-2.0
"""The system's apt sources, in both formats, and whose mirror is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from enclavekit.errors import UnsupportedHostError
from enclavekit.runtime.distribution import OsRelease, distribution_of
from enclavekit.runtime.sources import Source, choose_source, read_sources

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITES = ("stable", "bookworm", "trixie")


def write(etc: Path, **files: str) -> Path:
    """``list`` is sources.list; others are named NAME_SUFFIX below sources.list.d."""
    (etc / "sources.list.d").mkdir(parents=True)
    for name, text in files.items():
        path = etc / "sources.list" if name == "list" else etc / "sources.list.d" / name.replace("_", ".")
        path.write_text(text)
    return etc


def test_one_line_format(tmp_path: Path) -> None:
    text = (
        "# deb http://old.example.org/debian bookworm main\n"
        "deb-src http://a.example.org/debian bookworm main\n"
        "deb http://a.example.org/debian bookworm main contrib # and more\n"
        "deb [ arch=amd64 signed-by=/k/a.gpg trusted=yes ] https://b.example.org/debian trixie main\n"
        "deb http://flat.example.org/ ./\n"
        "nonsense\n"
    )
    assert read_sources(write(tmp_path, list=text)) == [
        Source("http://a.example.org/debian", ("bookworm",), ("main", "contrib"), None),
        Source("https://b.example.org/debian", ("trixie",), ("main",), "/k/a.gpg"),
        Source("http://flat.example.org/", ("./",), (), None),
    ]


def test_deb822_format(tmp_path: Path) -> None:
    text = (
        "# a comment\n"
        "Types: deb deb-src\n"
        "# another\n"
        "URIs: http://a.example.org/debian\n http://b.example.org/debian\n"
        "suites: bookworm bookworm-updates\n"
        "Components: main\n"
        "Signed-By: /k/a.gpg\n"
        "\n \n"
        "Types: deb\nEnabled: no\nURIs: http://off.example.org/\nSuites: bookworm\nComponents: main\n"
        "\n"
        "Types: deb-src\nURIs: http://src.example.org/\nSuites: bookworm\nComponents: main\n"
        "\n"
        "Types: deb\nURIs: http://key.example.org/\nSuites: bookworm\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"
    )
    suites = ("bookworm", "bookworm-updates")
    assert read_sources(write(tmp_path, a_sources=text)) == [
        Source("http://a.example.org/debian", suites, ("main",), "/k/a.gpg"),
        Source("http://b.example.org/debian", suites, ("main",), "/k/a.gpg"),
        Source(
            "http://key.example.org/", ("bookworm",), ("main",), "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc"
        ),
    ]


def test_files_are_read_in_order_and_others_passed_over(tmp_path: Path) -> None:
    line = "deb http://{}.example.org/ bookworm main\n"
    etc = write(
        tmp_path,
        list=line.format("first"),
        b_list=line.format("second"),
        c_save=line.format("saved"),
        a_sources="Types: deb\nURIs: http://third.example.org/\nSuites: x\nComponents: main\n",
    )
    (etc / "sources.list.d/directory.list").mkdir()
    names = [source.uri.split("/")[2].split(".")[0] for source in read_sources(etc)]
    assert names == ["first", "third", "second"]


def test_no_configuration(tmp_path: Path) -> None:
    assert read_sources(tmp_path / "nothing") == []


def source(name: str, suites: tuple[str, ...] = ("bookworm",), signed_by: str | None = None) -> Source:
    return Source(f"http://{name}.example.org/debian", suites, ("main",), signed_by)


def test_the_distributions_own_keyring_goes_first() -> None:
    vendor = source("vendor", signed_by="/usr/share/keyrings/vendor.gpg")
    plain = source("plain")
    own = source("own", signed_by="/usr/share/keyrings/debian-archive-keyring.gpg")
    again = source("again", signed_by="/usr/share/keyrings/debian-archive-bookworm-stable.gpg")
    assert choose_source([vendor, plain, own, again], SUITES, KEYRING) == own
    assert choose_source([vendor, plain], SUITES, KEYRING) == plain
    assert choose_source([vendor], SUITES, KEYRING) == vendor


def test_only_mirrors_of_the_distribution_fit() -> None:
    unfit = [
        source("security", ("bookworm-security",)),
        source("vendor", ("cloud-sdk",)),
        Source("http://contrib.example.org/", ("bookworm",), ("contrib",), None),
        Source("cdrom:[Debian]/", ("bookworm",), ("main",), None),
        Source("file:/srv/mirror", ("bookworm",), ("main",), None),
    ]
    assert choose_source(unfit, SUITES, KEYRING) is None
    listed = Source("mirror+file:/etc/apt/mirrors/debian.list", ("bookworm",), ("main",), None)
    assert choose_source([*unfit, listed], SUITES, KEYRING) == listed


def test_os_release(tmp_path: Path) -> None:
    path = tmp_path / "os-release"
    path.write_text('PRETTY_NAME="Debian GNU/Linux 12"\nID=debian\nVERSION_CODENAME=bookworm\n# comment\n')
    release = OsRelease.read(path)
    assert release == OsRelease("Debian GNU/Linux 12", "debian", "bookworm")
    assert "bookworm" in release.suites
    assert distribution_of(release).qemu_suite == "trixie-backports"
    path.write_text("ID='ubuntu'\n")
    assert distribution_of(OsRelease.read(path)).keyring.name == "ubuntu-archive-keyring.gpg"


def test_no_os_release(tmp_path: Path) -> None:
    release = OsRelease.read(tmp_path / "nothing")
    with pytest.raises(UnsupportedHostError) as caught:
        distribution_of(release)
    assert str(caught.value) == ("the runtime cannot be installed on an unknown system: expected Debian or Ubuntu")
