# SPDX-License-Identifier: Apache-2.0
"""Who the application runs as: ``NAME|UID[:GROUP|GID]``, looked up in the image's own passwd and group files.

Numbers need no entry there. Without a group it is the user's own, and the supplementary groups are those that list
the user; with a group it is that one alone. The rules are those of docker.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass

from enclavekit.codec.init_config import MAX_ID
from enclavekit.errors import SourceError
from enclavekit.image.tree import Tree

PASSWD = b"etc/passwd"
GROUP = b"etc/group"
MAX_FILE_SIZE = 1 << 20
MAX_GROUPS = 64


@dataclass(frozen=True, slots=True)
class User:
    """Numbers for setuid, setgid and setgroups."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


def find_user(tree: Tree, text: str) -> User:
    """SourceError when a name is not in the image, or a number is out of range."""
    user, colon, group = text.partition(":")
    if not user or (colon and not group) or ":" in group:
        raise SourceError(f"user {text!r}: expected NAME or UID, and :GROUP or :GID if wanted")
    name, uid, gid = user, _number(user), 0
    for fields in _lines(tree, PASSWD, 4):
        if fields[0] == user or (uid is not None and _number(fields[2]) == uid):
            name, uid, gid = fields[0], _field(fields[2], PASSWD), _field(fields[3], PASSWD)
            break
    if uid is None:
        raise SourceError(
            f"user {user!r}: not in the image's /etc/passwd", hint="give a number, or add the user to the image"
        )
    if group:
        return User(uid, _find_group(tree, group))
    groups = {_field(fields[2], GROUP) for fields in _lines(tree, GROUP, 4) if name in fields[3].split(",")}
    if len(groups) > MAX_GROUPS:
        raise SourceError(f"user {user!r}: in {len(groups)} groups, expected at most {MAX_GROUPS}")
    return User(uid, gid, tuple(sorted(groups)))


def _find_group(tree: Tree, group: str) -> int:
    number = _number(group)
    if number is not None:
        return number
    for fields in _lines(tree, GROUP, 3):
        if fields[0] == group:
            return _field(fields[2], GROUP)
    raise SourceError(
        f"group {group!r}: not in the image's /etc/group", hint="give a number, or add the group to the image"
    )


def _lines(tree: Tree, path: bytes, fields: int) -> Iterator[list[str]]:
    """Lines that have the fields; others are skipped, as the C library does. A missing file is an empty one."""
    node = tree.get(path)
    if node is None:
        return
    if not stat.S_ISREG(node.mode) or node.content.size > MAX_FILE_SIZE:
        size = node.content.size
        raise SourceError(
            f"/{path.decode()}: a {node.kind} of {size} bytes, expected a file of at most {MAX_FILE_SIZE}"
        )
    for line in b"".join(node.content.chunks()).decode("utf-8", "surrogateescape").split("\n"):
        parts = line.split(":")
        if len(parts) >= fields:
            yield parts


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    if len(text) > 10 or int(text) > MAX_ID:
        raise SourceError(f"number {text[:20]}: expected a user or group from 0 to {MAX_ID}")
    return int(text)


def _field(text: str, path: bytes) -> int:
    number = _number(text)
    if number is None:
        raise SourceError(f"/{path.decode()}: number {text[:20]!r}, expected decimal digits")
    return number
