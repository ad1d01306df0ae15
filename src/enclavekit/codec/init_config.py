# SPDX-License-Identifier: Apache-2.0
"""The image's configuration for init: NUL-terminated ``key=value`` records (docs/init.md).

It is measured with the application, so the format never breaks: keys may be added, old ones never change. Values hold
any byte but NUL. ``version`` stands first; encoding keeps one order, so equal configurations are equal bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from enclavekit.errors import FormatError, TruncatedError

VERSION = b"1"
MAX_SIZE = 1 << 20
MAX_ID = 0xFFFFFFFE
"""The largest uid or gid; one more means "no change" to the kernel."""
DEFAULT_STOP_SIGNAL = 15
MAX_SIGNAL = 64

MAX_LAUNCH_VALUES = 64
LAUNCH_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
"""A value's that is given at launch; it becomes a file's."""

_SINGLE_KEYS = (b"version", b"workdir", b"uid", b"gid", b"logs", b"stopsignal", b"attest")


@dataclass(frozen=True, slots=True)
class InitConfig:
    """What init runs, and as whom. Making one checks it: FormatError when a value cannot be carried.

    ``launch`` names the values that the host may give at launch, which are not measured.
    ``attest`` lets the host ask for attestation documents.
    """

    arguments: tuple[bytes, ...]
    environment: tuple[bytes, ...] = ()
    workdir: bytes = b"/"
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    logs: bool = False
    stop_signal: int = DEFAULT_STOP_SIGNAL
    launch: tuple[bytes, ...] = ()
    attest: bool = False

    def __post_init__(self) -> None:
        if not self.arguments or not self.arguments[0]:
            raise FormatError("init configuration: no program to run, expected at least one argument")
        for item in self.environment:
            name, equals, _ = item.partition(b"=")
            if not name or not equals:
                raise FormatError(f"init configuration: environment {_text(item)}, expected NAME=VALUE")
        if not self.workdir.startswith(b"/"):
            raise FormatError(f"init configuration: workdir {_text(self.workdir)}, expected an absolute path")
        for value in (*self.arguments, *self.environment, self.workdir):
            if b"\0" in value:
                raise FormatError(f"init configuration: NUL in {_text(value)}, expected any other byte")
        for number in (self.uid, self.gid, *self.groups):
            if not 0 <= number <= MAX_ID:
                raise FormatError(f"init configuration: user or group {number}, expected 0 to {MAX_ID}")
        if not 1 <= self.stop_signal <= MAX_SIGNAL:
            raise FormatError(f"init configuration: stop signal {self.stop_signal}, expected 1 to {MAX_SIGNAL}")
        self._check_launch()
        if len(self.encode()) > MAX_SIZE:
            raise FormatError(f"init configuration: {len(self.encode())} bytes, expected at most {MAX_SIZE}")

    def _check_launch(self) -> None:
        if len(self.launch) > MAX_LAUNCH_VALUES:
            raise FormatError(
                f"init configuration: {len(self.launch)} launch values, expected at most {MAX_LAUNCH_VALUES}"
            )
        for name in self.launch:
            if not LAUNCH_NAME.fullmatch(name):
                raise FormatError(
                    f"init configuration: launch value {_text(name)}, expected a name of letters, digits, _, - and ."
                )
            if self.launch.count(name) > 1:
                raise FormatError(f"init configuration: launch value {_text(name)} twice, expected once")

    def encode(self) -> bytes:
        """The records."""
        records = [b"version=" + VERSION]
        records += [b"arg=" + argument for argument in self.arguments]
        records += [b"env=" + item for item in self.environment]
        records += [b"workdir=" + self.workdir, b"uid=%d" % self.uid, b"gid=%d" % self.gid]
        records += [b"group=%d" % group for group in self.groups]
        if self.logs:
            records.append(b"logs=1")
        if self.stop_signal != DEFAULT_STOP_SIGNAL:
            records.append(b"stopsignal=%d" % self.stop_signal)
        records += [b"launch=" + name for name in self.launch]
        if self.attest:
            records.append(b"attest=1")
        return b"".join(record + b"\0" for record in records)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The inverse of encode. Unknown, repeated or malformed records are a FormatError."""
        if len(data) > MAX_SIZE:
            raise FormatError(f"init configuration: {len(data)} bytes, expected at most {MAX_SIZE}")
        if not data.endswith(b"\0"):
            raise TruncatedError("init configuration: the last record has no NUL at its end")
        lists: dict[bytes, list[bytes]] = {b"arg": [], b"env": [], b"group": [], b"launch": []}
        single: dict[bytes, bytes] = {}
        for index, record in enumerate(data[:-1].split(b"\0")):
            key, equals, value = record.partition(b"=")
            if not equals:
                raise FormatError(f"init configuration: record {_text(record)}, expected key=value")
            if (index == 0) != (key == b"version"):
                raise FormatError(
                    f"init configuration: record {index} is {_text(key)}, expected version first and once"
                )
            if key in lists:
                lists[key].append(value)
            elif key not in _SINGLE_KEYS:
                raise FormatError(f"init configuration: unknown key {_text(key)}")
            elif key in single:
                raise FormatError(f"init configuration: key {_text(key)} twice, expected once")
            else:
                single[key] = value
        if single[b"version"] != VERSION:
            raise FormatError(f"init configuration: version {_text(single[b'version'])}, expected 1")
        for key in (b"logs", b"attest"):
            if single.get(key, b"1") != b"1":
                raise FormatError(f"init configuration: {key.decode()} {_text(single[key])}, expected 1")
        return cls(
            arguments=tuple(lists[b"arg"]),
            environment=tuple(lists[b"env"]),
            workdir=single.get(b"workdir", b"/"),
            uid=_number(single.get(b"uid", b"0")),
            gid=_number(single.get(b"gid", b"0")),
            groups=tuple(_number(group) for group in lists[b"group"]),
            logs=b"logs" in single,
            stop_signal=_number(single.get(b"stopsignal", b"%d" % DEFAULT_STOP_SIGNAL)),
            launch=tuple(lists[b"launch"]),
            attest=b"attest" in single,
        )


def _number(digits: bytes) -> int:
    # No sign, no space, no leading zero: one number has one spelling.
    if not digits.isdigit() or len(digits) > 10 or (digits[0] == ord("0") and len(digits) > 1):
        raise FormatError(f"init configuration: number {_text(digits)}, expected decimal digits")
    return int(digits)


def _text(value: bytes) -> str:
    return repr(value[:64].decode("utf-8", "backslashreplace"))
