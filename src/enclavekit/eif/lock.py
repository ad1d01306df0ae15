# SPDX-License-Identifier: Apache-2.0
"""``enclave.lock``: what an image was made of, by digest, and what it measured. JSON, one file an image.

    {"schema": 1, "toolkit": "0.1.0", "epoch": 1700000000,
     "inputs": [{"name": "kernel", "what": "6.12.1", "digest": "sha384:…"}, …],
     "measurements": {"PCR0": "…", "PCR1": "…", "PCR2": "…", "PCR8": "…"}}

``epoch`` is the build time, seconds since 1970. PCR8 is there when the image was signed. Nothing in it is secret, and
nothing in it is signed: whoever may change the file decides what is locked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from enclavekit.errors import FormatError

SCHEMA = 1
MAX_SIZE = 1 << 20
MAX_INPUTS = 1024
MAX_TEXT = 4096
IMAGE = "image"
KERNEL = "kernel"
CONTAINER_ID = "container"

_DIGEST = re.compile(r"sha(256:[0-9a-f]{64}|384:[0-9a-f]{96}|512:[0-9a-f]{128})")
_PCR = re.compile(r"[0-9a-f]{96}")
_PCRS = ("PCR0", "PCR1", "PCR2", "PCR8")
_SHOWN_WORDS = 64
_SHOWN = 23  # of a digest, in a sentence


@dataclass(frozen=True, slots=True)
class Input:
    """One thing that an image was made of. ``what`` says in words which; ``digest`` is ``ALGORITHM:HEX``."""

    name: str
    what: str
    digest: str

    def __str__(self) -> str:
        what = self.what if len(self.what) <= _SHOWN_WORDS else f"{self.what[:_SHOWN_WORDS]}…"
        return f"{what} ({self.digest[:_SHOWN]}…)" if self.what else f"{self.digest[:_SHOWN]}…"


@dataclass(frozen=True, slots=True)
class Lock:
    """``toolkit`` is the version that built it; ``measurements`` are hexadecimal, by ``PCR0`` and so on."""

    toolkit: str
    epoch: int
    inputs: tuple[Input, ...]
    measurements: Mapping[str, str]

    def find(self, name: str) -> Input | None:
        """The input of that name."""
        return next((one for one in self.inputs if one.name == name), None)

    def encode(self) -> str:
        """The file, the same for the same values."""
        value = {
            "schema": SCHEMA,
            "toolkit": self.toolkit,
            "epoch": self.epoch,
            "inputs": [{"name": one.name, "what": one.what, "digest": one.digest} for one in self.inputs],
            "measurements": {name: self.measurements[name] for name in _PCRS if name in self.measurements},
        }
        return json.dumps(value, indent=2, ensure_ascii=True) + "\n"

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """FormatError for anything but what ``encode`` makes, other spacing and unknown keys excepted."""
        if len(data) > MAX_SIZE:
            raise FormatError(f"lock: more than {MAX_SIZE} bytes")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise FormatError("lock: no JSON") from error
        schema = value.get("schema") if isinstance(value, dict) else None
        if schema != SCHEMA:
            raise FormatError(f"lock: schema {str(schema)[:32]}, expected {SCHEMA}")
        inputs = _typed(value, "inputs", list)
        if len(inputs) > MAX_INPUTS:
            raise FormatError(f"lock: {len(inputs)} inputs, expected at most {MAX_INPUTS}")
        measurements = _typed(value, "measurements", dict)
        for name, pcr in measurements.items():
            if name not in _PCRS or not isinstance(pcr, str) or not _PCR.fullmatch(pcr):
                raise FormatError(f"lock: measurement {name[:32]!r}: expected {', '.join(_PCRS)}, in hexadecimal")
        epoch = _typed(value, "epoch", int)
        if not 0 <= epoch <= 0xFFFF_FFFF:
            raise FormatError(f"lock: epoch {str(epoch)[:32]}, expected seconds from 0 to {0xFFFF_FFFF}")
        return cls(_text(value, "toolkit"), epoch, tuple(_input(one) for one in inputs), measurements)

    def moved(self, now: Lock) -> list[str]:
        """A sentence for each input that is not now what it was, in the order of the lock."""
        found = []
        if now.toolkit != self.toolkit:
            found.append(f"enclavekit: locked {self.toolkit}, now {now.toolkit}")
        if now.epoch != self.epoch:
            found.append(f"build time: locked {self.epoch}, now {now.epoch}")
        for name in dict.fromkeys(one.name for one in (*self.inputs, *now.inputs)):
            before, after = self.find(name), now.find(name)
            if before is None or after is None or before.digest != after.digest:
                found.append(f"{name}: locked {before or 'none'}, now {after or 'none'}")
        return found

    def moved_measurements(self, now: Mapping[str, str]) -> list[str]:
        """The same for the PCRs that both have: an image may be built again by someone who cannot sign it."""
        return [
            f"{name}: locked {self.measurements[name][:16]}…, now {now[name][:16]}…"
            for name in _PCRS
            if name in now and name in self.measurements and now[name] != self.measurements[name]
        ]


def _input(value: Any) -> Input:  # noqa: ANN401 - any JSON
    if not isinstance(value, dict):
        raise FormatError(f"lock: an input that is {type(value).__name__}, expected an object")
    digest = _text(value, "digest")
    if not _DIGEST.fullmatch(digest):
        raise FormatError(f"lock: digest {digest[:32]!r}, expected sha256: or sha384: and hexadecimal digits")
    return Input(_text(value, "name"), _text(value, "what"), digest)


def _typed(value: Mapping[str, Any], key: str, kind: type) -> Any:  # noqa: ANN401 - of that type
    found = value.get(key)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise FormatError(f"lock: {key} is {type(found).__name__}, expected {kind.__name__}")
    return found


def _text(value: Mapping[str, Any], key: str) -> str:
    text: str = _typed(value, key, str)
    if len(text) > MAX_TEXT or not text.isprintable():
        raise FormatError(f"lock: {key} {text[:32]!r}: expected one line of at most {MAX_TEXT} characters")
    return text
