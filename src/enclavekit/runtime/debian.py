# SPDX-License-Identifier: Apache-2.0
"""What the system's own apt configuration says: which mirror, and which keyring its signatures are checked with.

Source: sources.list(5), in both forms, one line and deb822. No host name stands in our code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from enclavekit.errors import MissingError

ONE_LINE = re.compile(r"^deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)$")
KEYRINGS = {"debian": "debian-archive-keyring.gpg", "ubuntu": "ubuntu-archive-keyring.gpg"}
BY_HAND = "install QEMU 10.2 or newer, and name it, a bzImage and its modules with --qemu, --kernel and --modules"
"""What to do where this mechanism does not work."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """A mirror of the system's distribution, and the keyring that its archive is signed by."""

    distribution: str
    uri: str
    keyring: Path


@dataclass(frozen=True, slots=True)
class Entry:
    """One line, or one deb822 paragraph, of binary packages."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str | None


def system_mirror(root: Path = Path("/")) -> Mirror:
    """The mirror that this system installs from. Errors: ``MissingError``."""
    release = _os_release(root)
    distribution = next(
        (name for name in [release.get("ID", ""), *release.get("ID_LIKE", "").split()] if name in KEYRINGS), None
    )
    if distribution is None:
        name = release.get("PRETTY_NAME", "this system")
        raise MissingError(
            f"the runtime is taken from Debian's or Ubuntu's packages, and {name} is neither", hint=BY_HAND
        )
    for entry in entries(root / "etc/apt"):
        if "main" in entry.components and any("security" not in suite for suite in entry.suites):
            uri = next((uri for uri in entry.uris if "security" not in uri), None)
            if uri is not None:
                return Mirror(distribution, uri, _keyring(root, distribution, entry.signed_by))
    raise MissingError("the system's apt configuration names no archive with a component main", hint=BY_HAND)


def _keyring(root: Path, distribution: str, signed_by: str | None) -> Path:
    keyrings = root / "usr/share/keyrings"
    candidates = [keyrings / KEYRINGS[distribution]]
    if signed_by and signed_by.startswith("/") and "\n" not in signed_by:
        candidates.insert(0, root / signed_by.lstrip("/"))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise MissingError(
        f"{candidates[-1]}: not there, so signatures cannot be checked",
        hint=f"install the package {candidates[-1].stem}",
    )


def entries(etc: Path) -> Iterator[Entry]:
    """All entries of sources.list and sources.list.d."""
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if path.suffix == ".sources":
            yield from _deb822(text)
        elif path.suffix == ".list":
            yield from _one_line(text)


def _one_line(text: str) -> Iterator[Entry]:
    for line in text.splitlines():
        match = ONE_LINE.match(line.split("#", 1)[0].strip())
        if match:
            options = dict(option.partition("=")[::2] for option in (match["options"] or "").split())
            suites, components = (match["suite"],), tuple(match["components"].split())
            yield Entry((match["uri"],), suites, components, options.get("signed-by"))


def _deb822(text: str) -> Iterator[Entry]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        for match in re.finditer(r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t].*)*)", paragraph, re.MULTILINE):
            fields[match[1].lower()] = match[2].strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() != "no":
            uris, suites, components = (tuple(fields.get(key, "").split()) for key in ("uris", "suites", "components"))
            yield Entry(uris, suites, components, fields.get("signed-by"))


def _os_release(root: Path) -> dict[str, str]:
    path = root / "etc/os-release"
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {key: value.strip("\"'") for key, _, value in (line.partition("=") for line in lines)}
