# SPDX-License-Identifier: Apache-2.0
"""What runs in the enclave: the builder's words over the container image's, as docker takes them together."""

from __future__ import annotations

import stat
from collections.abc import Sequence

import pytest

from enclavekit.build.application import Application, init_config, signal_number
from enclavekit.codec.init_config import InitConfig
from enclavekit.eif import BytesContent
from enclavekit.errors import BuildError, SourceError, UsageError
from enclavekit.image.oci import ImageConfig
from enclavekit.image.tree import Node, Tree

IMAGE = ImageConfig(
    os="linux",
    architecture="amd64",
    diff_ids=(),
    entrypoint=("/entry", "-v"),
    command=("serve", "80"),
    environment=("PATH=/bin", "A=1", "B=2"),
    workdir="/srv",
    user="app:staff",
    stop_signal="SIGINT",
)


@pytest.fixture
def tree() -> Tree:
    made = Tree()
    for path, text in (
        (b"etc/passwd", b"root:x:0:0::/:/bin/sh\napp:x:1000:100::/:/bin/sh\n"),
        (b"etc/group", b"root:x:0:\nstaff:x:50:app\nmore:x:60:app\n"),
    ):
        made.add(path, Node(stat.S_IFREG | 0o644, content=BytesContent(text)))
    return made


def test_the_image_alone(tree: Tree) -> None:
    assert init_config(Application(), IMAGE, tree) == InitConfig(
        arguments=(b"/entry", b"-v", b"serve", b"80"),
        environment=(b"PATH=/bin", b"A=1", b"B=2"),
        workdir=b"/srv",
        uid=1000,
        gid=50,
        stop_signal=2,
    )


@pytest.mark.parametrize(
    ("application", "arguments"),
    [
        (Application(["other"]), ["/entry", "-v", "other"]),
        (Application(entrypoint=["/new"]), ["/new"]),
        (Application(["x"], entrypoint=["/new"]), ["/new", "x"]),
        (Application(["/only"], entrypoint=[]), ["/only"]),
    ],
)
def test_arguments(application: Application, arguments: Sequence[str], tree: Tree) -> None:
    assert init_config(application, IMAGE, tree).arguments == tuple(one.encode() for one in arguments)


def test_the_builder_over_the_image(tree: Tree) -> None:
    application = Application(environment=["B=3", "C=4"], workdir="/", user="app", stop_signal="9", logs=True)
    made = init_config(application, IMAGE, tree)
    assert made.environment == (b"PATH=/bin", b"A=1", b"B=3", b"C=4")
    assert (made.workdir, made.uid, made.gid, made.groups) == (b"/", 1000, 100, (50, 60))
    assert (made.stop_signal, made.logs) == (9, True)


def test_an_image_that_says_nothing(tree: Tree) -> None:
    with pytest.raises(UsageError) as caught:
        init_config(Application(), ImageConfig("linux", "amd64", ()), tree)
    assert caught.value.message == "no command: the image would have nothing to run"
    made = init_config(Application(["/x"]), ImageConfig("linux", "amd64", (), workdir="srv"), tree)
    assert (made.arguments, made.workdir, made.uid, made.stop_signal) == ((b"/x",), b"/srv", 0, 15)


def test_users_that_are_not_there(tree: Tree) -> None:
    with pytest.raises(SourceError) as caught:
        init_config(Application(user="none"), IMAGE, tree)
    assert caught.value.message == "user 'none': not in the image's /etc/passwd"


@pytest.mark.parametrize(
    ("text", "number"), [("", 15), ("SIGTERM", 15), ("term", 15), ("9", 9), ("SIGRTMIN+3", 37), ("RTMIN+1", 35)]
)
def test_signals(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize("text", ["SIGNONE", "SIGRTMIN+99", "1234", "-1", "SIGRTMIN+x"])
def test_signals_that_are_none(text: str) -> None:
    with pytest.raises(BuildError) as caught:
        signal_number(text)
    assert caught.value.message == f"stop signal {text!r}: expected a name as SIGTERM, or a number"
