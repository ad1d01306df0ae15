# SPDX-License-Identifier: Apache-2.0
"""Users and groups, looked up in the image."""

from __future__ import annotations

import stat

import pytest

from enclavekit.eif import BytesContent
from enclavekit.errors import SourceError
from enclavekit.image.tree import Node, Tree
from enclavekit.image.users import User, find_user

PASSWD = b"root:x:0:0:root:/root:/bin/sh\n\nbroken\napp:x:1000:100:App:/:/bin/sh\n7:x:77:78::/:\nodd:x:x:1::/:\n"
GROUP = b"root:x:0:\nusers:x:100:app\ndisk:x:6:other,app\nshort:x:9\nbad:x:y:odd2\n"


def tree(passwd: bytes | None = PASSWD, group: bytes | None = GROUP) -> Tree:
    made = Tree()
    for path, data in ((b"etc/passwd", passwd), (b"etc/group", group)):
        if data is not None:
            made.add(path, Node(stat.S_IFREG | 0o644, content=BytesContent(data)))
    return made


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("root", User(0, 0)),
        ("app", User(1000, 100, (6, 100))),
        ("1000", User(1000, 100, (6, 100))),
        ("app:disk", User(1000, 6)),
        ("app:short", User(1000, 9)),
        ("app:5", User(1000, 5)),
        ("4000", User(4000, 0)),
        ("4000:4001", User(4000, 4001)),
        ("7", User(77, 78)),  # a name that looks like a number is a name first, as for docker
    ],
)
def test_found(text: str, user: User) -> None:
    assert find_user(tree(), text) == user


def test_numbers_need_no_files() -> None:
    assert find_user(tree(None, None), "5:6") == User(5, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "user '': expected NAME or UID, and :GROUP or :GID if wanted"),
        ("app:", "user 'app:': expected NAME or UID, and :GROUP or :GID if wanted"),
        ("a:b:c", "user 'a:b:c': expected NAME or UID, and :GROUP or :GID if wanted"),
        ("nobody", "user 'nobody': not in the image's /etc/passwd"),
        ("app:nobody", "group 'nobody': not in the image's /etc/group"),
        ("4294967295", "number 4294967295: expected a user or group from 0 to 4294967294"),
        ("99999999999", "number 99999999999: expected a user or group from 0 to 4294967294"),
        ("odd", "/etc/passwd: number 'x', expected decimal digits"),
    ],
)
def test_not_found(text: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        find_user(tree(), text)
    assert caught.value.message == message


def test_hints() -> None:
    for text, hint in (
        ("nobody", "give a number, or add the user to the image"),
        ("app:nobody", "give a number, or add the group to the image"),
    ):
        with pytest.raises(SourceError) as caught:
            find_user(tree(), text)
        assert caught.value.hint == hint


def test_odd_files() -> None:
    made = tree(None)
    made.add(b"etc/passwd", Node(stat.S_IFLNK | 0o777, content=BytesContent(b"../x")))
    with pytest.raises(SourceError) as caught:
        find_user(made, "app")
    assert caught.value.message == "/etc/passwd: a symlink of 4 bytes, expected a file of at most 1048576"
    with pytest.raises(SourceError) as caught:
        find_user(tree(bytes((1 << 20) + 1)), "app")
    assert caught.value.message == "/etc/passwd: a file of 1048577 bytes, expected a file of at most 1048576"


def test_too_many_groups() -> None:
    group = b"".join(b"g%d:x:%d:app\n" % (number, number) for number in range(65))
    with pytest.raises(SourceError) as caught:
        find_user(tree(group=group), "app")
    assert caught.value.message == "user 'app': in 65 groups, expected at most 64"
