# SPDX-License-Identifier: Apache-2.0
"""The system's apt sources, read to learn which mirror of the distribution this machine uses.

Both formats: one-line (``*.list``) and deb822 (``*.sources``), of sources.list(5). Entries that say ``trusted`` lose
it: whatever is taken from a mirror is checked against a keyring.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)\s*(?P<components>[^#]*)")
SCHEMES = re.compile(r"(?:https?|mirror\S*|tor\+https?):")
"""What apt fetches; a cdrom or a directory has only what somebody once put there."""

DISABLED = frozenset({"no", "false", "without", "off", "disable"})


@dataclass(frozen=True, slots=True)
class Source:
    """One mirror in the system's configuration."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str | None
    """Path of a keyring, or a key itself: a deb822 value, continuation lines included."""


def read_sources(etc: Path) -> list[Source]:
    """All binary package sources below ``etc`` (/etc/apt), in apt's order; what cannot be read is passed over."""
    parts = etc / "sources.list.d"
    found: list[Source] = []
    for path in (etc / "sources.list", *sorted([*parts.glob("*.list"), *parts.glob("*.sources")])):
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        found += _deb822(text) if path.suffix == ".sources" else _one_line(text)
    return found


def choose_source(sources: list[Source], suites: Collection[str], keyring: Path) -> Source | None:
    """The distribution's own mirror: one with ``main`` of one of its ``suites``, signed with its own ``keyring``.

    Other vendors name their suites likewise, so an entry that names the keyring goes before one that names none, and
    both before one that names another (a mirror that signs for itself).
    """

    def rank(source: Source) -> int:
        if source.signed_by is None:
            return 1
        return 0 if keyring.stem.removesuffix("-keyring") in source.signed_by else 2

    fitting = [
        source
        for source in sources
        if SCHEMES.match(source.uri) and "main" in source.components and not set(suites).isdisjoint(source.suites)
    ]
    return min(fitting, key=rank, default=None)


def _one_line(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        match = ONE_LINE.match(line.strip())
        if match is None:
            continue
        options = dict(option.partition("=")[::2] for option in (match["options"] or "").split())
        keyring = options.get("signed-by")
        yield Source(match["uri"], (match["suite"],), tuple(match["components"].split()), keyring)


def _deb822(text: str) -> Iterator[Source]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t") and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in DISABLED:
            continue
        suites, components = tuple(fields.get("suites", "").split()), tuple(fields.get("components", "").split())
        for uri in fields.get("uris", "").split():
            yield Source(uri, suites, components, fields.get("signed-by") or None)
