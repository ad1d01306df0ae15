# SPDX-License-Identifier: Apache-2.0
"""The records that init reads: these bytes are measured, and never change."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.codec.init_config import InitConfig
from enclavekit.errors import FormatError, TruncatedError


def test_the_bytes_of_all_keys() -> None:
    config = InitConfig(
        arguments=(b"/bin/app", b"", b"two\nlines"),
        environment=(b"A=b", b"EMPTY="),
        workdir=b"/srv",
        uid=1000,
        gid=100,
        groups=(5, 6),
        logs=True,
        stop_signal=2,
        launch=(b"KEY", b"tls.pem"),
        attest=True,
    )
    assert config.encode() == (
        b"version=1\0arg=/bin/app\0arg=\0arg=two\nlines\0env=A=b\0env=EMPTY=\0workdir=/srv\0uid=1000\0gid=100\0"
        b"group=5\0group=6\0logs=1\0stopsignal=2\0launch=KEY\0launch=tls.pem\0attest=1\0"
    )
    assert InitConfig.decode(config.encode()) == config


def test_the_bytes_of_the_defaults() -> None:
    config = InitConfig((b"app",))
    assert config.encode() == b"version=1\0arg=app\0workdir=/\0uid=0\0gid=0\0"
    assert InitConfig.decode(b"version=1\0arg=app\0") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arguments": ()}, "init configuration: no program to run, expected at least one argument"),
        ({"arguments": (b"", b"x")}, "init configuration: no program to run, expected at least one argument"),
        ({"arguments": (b"a\0",)}, "init configuration: NUL in 'a\\x00', expected any other byte"),
        ({"environment": (b"A",)}, "init configuration: environment 'A', expected NAME=VALUE"),
        ({"environment": (b"=b",)}, "init configuration: environment '=b', expected NAME=VALUE"),
        ({"workdir": b"srv"}, "init configuration: workdir 'srv', expected an absolute path"),
        ({"uid": -1}, "init configuration: user or group -1, expected 0 to 4294967294"),
        ({"groups": (1 << 32,)}, "init configuration: user or group 4294967296, expected 0 to 4294967294"),
        ({"stop_signal": 0}, "init configuration: stop signal 0, expected 1 to 64"),
        (
            {"launch": tuple(b"v%d" % number for number in range(65))},
            "init configuration: 65 launch values, expected at most 64",
        ),
        ({"launch": (b"a", b"a")}, "init configuration: launch value 'a' twice, expected once"),
        *(
            (
                {"launch": (name,)},
                f"init configuration: launch value {shown}, expected a name of letters, digits, _, - and .",
            )
            for name, shown in [
                (b"", "''"),
                (b"../a", "'../a'"),
                (b".", "'.'"),
                (b"1", "'1'"),
                (b"a" * 65, repr("a" * 64)),
            ]
        ),
        ({"arguments": (b"a" * (1 << 20),)}, "init configuration: 1048613 bytes, expected at most 1048576"),
    ],
)
def test_values_that_cannot_be_carried(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        InitConfig(**{"arguments": (b"app",), **values})
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "init configuration: the last record has no NUL at its end"),
        (b"version=1\0arg=a", "init configuration: the last record has no NUL at its end"),
        (b"arg=a\0", "init configuration: record 0 is 'arg', expected version first and once"),
        (b"version=1\0version=1\0", "init configuration: record 1 is 'version', expected version first and once"),
        (b"version=2\0arg=a\0", "init configuration: version '2', expected 1"),
        (b"version=1\0arg\0", "init configuration: record 'arg', expected key=value"),
        (b"version=1\0color=red\0", "init configuration: unknown key 'color'"),
        (b"version=1\0uid=1\0uid=1\0", "init configuration: key 'uid' twice, expected once"),
        (b"version=1\0arg=a\0uid=-1\0", "init configuration: number '-1', expected decimal digits"),
        (b"version=1\0arg=a\0uid=\0", "init configuration: number '', expected decimal digits"),
        (b"version=1\0arg=a\0gid=01\0", "init configuration: number '01', expected decimal digits"),
        (b"version=1\0arg=a\0logs=0\0", "init configuration: logs '0', expected 1"),
        (b"version=1\0", "init configuration: no program to run, expected at least one argument"),
        (bytes((1 << 20) + 1), "init configuration: 1048577 bytes, expected at most 1048576"),
    ],
)
def test_broken_records(data: bytes, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        InitConfig.decode(data)
    assert caught.value.message == message
    assert isinstance(caught.value, TruncatedError) == ("no NUL" in message)


values = st.binary(max_size=20).map(lambda value: value.replace(b"\0", b""))
ids = st.integers(0, 0xFFFFFFFE)


@given(
    st.builds(
        InitConfig,
        arguments=st.lists(values).map(lambda rest: (b"app", *rest)),
        environment=st.lists(values.map(lambda value: b"N=" + value)).map(tuple),
        workdir=values.map(lambda value: b"/" + value),
        uid=ids,
        gid=ids,
        groups=st.lists(ids).map(tuple),
        logs=st.booleans(),
        stop_signal=st.integers(1, 64),
        launch=st.lists(st.from_regex(rb"[a-z_][a-z0-9.-]{0,8}", fullmatch=True), unique=True).map(tuple),
    )
)
def test_round_trip(config: InitConfig) -> None:
    assert InitConfig.decode(config.encode()) == config


pieces = st.sampled_from([b"version=1\0", b"arg=", b"uid=", b"env=A=", b"\0", b"group=1\0", b"logs=1\0", b"9", b"\xff"])


@given(st.lists(pieces).map(b"".join))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    try:
        config = InitConfig.decode(data)
    except FormatError as error:
        assert error.message.startswith("init configuration: ")  # noqa: PT017  # either outcome is right
    else:
        assert InitConfig.decode(config.encode()) == config
