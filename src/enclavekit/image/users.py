# SPDX-License-Identifier: Apache-2.0
"""Users and groups by the image's own /etc/passwd and /etc/group, as ``docker run --user`` has it."""

from __future__ import annotations

from dataclasses import dataclass

from enclavekit.codec.init_config import MAX_ID
from enclavekit.errors import SourceError
from enclavekit.image.tree import Tree

MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class User:
    """Who the application runs as."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    """Supplementary groups."""


def look_up(tree: Tree, text: str) -> User:
    """``USER[:GROUP]``, each a name or a number. Errors: ``SourceError``."""
    name, colon, group = text.partition(":")
    passwd, groups = _records(tree, b"passwd"), _records(tree, b"group")
    if not name or (colon and not group):
        raise SourceError(f"user {text!r}: expected USER or USER:GROUP")
    record = next((fields for fields in passwd if name in (fields[0], fields[2])), None)
    if record is None and not _is_number(name):
        raise SourceError(f"user {name!r}: not in the image's /etc/passwd", hint="give its number")
    uid = _number(record[2] if record else name, "user")
    gid = _number(record[3], "group") if record else 0
    members: tuple[int, ...] = ()
    if colon:
        found = next((fields for fields in groups if group in (fields[0], fields[2])), None)
        if found is None and not _is_number(group):
            raise SourceError(f"group {group!r}: not in the image's /etc/group", hint="give its number")
        gid = _number(found[2] if found else group, "group")
    elif record:
        named = {_number(fields[2], "group") for fields in groups if record[0] in fields[3].split(",")}
        members = tuple(sorted(named - {gid}))
    return User(uid, gid, members)


def _records(tree: Tree, name: bytes) -> list[list[str]]:
    """Lines of at least four fields."""
    node = tree.resolve((b"etc", name))
    if node is None or not node.is_file or node.content.size > MAX_FILE:
        return []
    text = b"".join(bytes(chunk) for chunk in node.content.chunks()).decode(errors="replace")
    return [fields for line in text.splitlines() if len(fields := line.split(":")) >= 4]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX_ID


def _number(text: str, what: str) -> int:
    if not _is_number(text):
        raise SourceError(f"{what} {text!r}: expected a number from 0 to {MAX_ID}")
    return int(text)
