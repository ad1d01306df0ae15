# SPDX-License-Identifier: Apache-2.0
"""All requests to /dev/nsm.

Source: linux: include/uapi/linux/nsm.h (the ioctl), aws-nitro-enclaves-nsm-api (the requests, CBOR). A request has at
most 4096 bytes, so what goes into one document, or extends a PCR at once, has a little less in all.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from types import TracebackType
from typing import Any, Self, TypeVar

import cbor2

from enclavekit.errors import NsmError

DEVICE = "/dev/nsm"
MAX_REQUEST = 0x1000
MAX_RESPONSE = 0x3000

NSM_RAW = Struct(
    "="  #  the machine's byte order, no padding
    "Q"  # 0x00 request: address
    "Q"  # 0x08 its size, bytes
    "Q"  # 0x10 response: address
    "Q"  # 0x18 its capacity; on return the bytes written
)
NSM_IOCTL_RAW = 3 << 30 | NSM_RAW.size << 16 | 0x0A << 8 | 0
"""_IOWR(0x0A, 0, struct nsm_raw)."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Description:
    """What the module says of itself. ``locked_pcrs`` are the numbers of those that nobody can change any more."""

    module_id: str
    version: tuple[int, int, int]
    digest: str
    max_pcrs: int
    locked_pcrs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pcr:
    """A register: its value, 48 bytes, and whether it is locked."""

    data: bytes
    locked: bool


class Nsm:
    """The module. Errors: ``NsmError``, whose ``name`` is the module's own, or "" when it could not be asked.

    ``exchange`` takes a request's bytes and returns the response's: a test's stand-in for the device.
    """

    def __init__(self, device: str = DEVICE, *, exchange: Callable[[bytes], bytes] | None = None) -> None:
        self._fd = -1
        self._exchange = exchange or self._ioctl
        if exchange is None:
            try:
                self._fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                raise NsmError(
                    f"{device}: {(error.strerror or str(error)).lower()}",
                    hint="it is there inside an enclave whose kernel has the driver nsm",
                ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Twice does no harm."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def attest(
        self, *, nonce: bytes | None = None, user_data: bytes | None = None, public_key: bytes | None = None
    ) -> bytes:
        """An attestation document with these in it; verifiers take at most 1024 bytes of each."""
        options = {"user_data": user_data, "nonce": nonce, "public_key": public_key}
        return self._field(self._ask("Attestation", options), "Attestation", "document", bytes)

    def random(self, size: int) -> bytes:
        """``size`` random bytes of the module's, 256 at a time."""
        found = b""
        while len(found) < size:
            part = self._field(self._ask("GetRandom"), "GetRandom", "random", bytes)
            if not part:
                raise NsmError("GetRandom: no bytes in the response")
            found += part
        return found[:size]

    def describe(self) -> Description:
        """The module's id, and which PCRs are locked."""
        value = self._ask("DescribeNSM")
        locked = self._field(value, "DescribeNSM", "locked_pcrs", list)
        major, minor, patch = (self._field(value, "DescribeNSM", f"version_{part}", int) for part in _VERSION_PARTS)
        return Description(
            module_id=self._field(value, "DescribeNSM", "module_id", str),
            version=(major, minor, patch),
            digest=self._field(value, "DescribeNSM", "digest", str),
            max_pcrs=self._field(value, "DescribeNSM", "max_pcrs", int),
            locked_pcrs=tuple(locked),
        )

    def pcr(self, index: int) -> Pcr:
        """A register as it is now."""
        value = self._ask("DescribePCR", {"index": index})
        return Pcr(self._field(value, "DescribePCR", "data", bytes), self._field(value, "DescribePCR", "lock", bool))

    def extend_pcr(self, index: int, data: bytes) -> bytes:
        """The new value: SHA-384(old value ‖ data). Numbers from 16 to 31 are the application's."""
        return self._field(self._ask("ExtendPCR", {"index": index, "data": data}), "ExtendPCR", "data", bytes)

    def lock_pcr(self, index: int) -> None:
        """Nobody can extend it any more, and from now on documents show it."""
        self._done(self._ask("LockPCR", {"index": index}), "LockPCR")

    def lock_pcrs(self, end: int) -> None:
        """The same for all numbers below ``end``; those that are locked already stay so."""
        self._done(self._ask("LockPCRs", {"range": end}), "LockPCRs")

    def _ask(self, name: str, arguments: dict[str, Any] | None = None) -> object:
        request = cbor2.dumps(name if arguments is None else {name: arguments})
        if len(request) > MAX_REQUEST:
            said = f"{name}: request of {len(request)} bytes, expected at most {MAX_REQUEST}"
            raise NsmError(said, name="InputTooLarge")
        response = self._exchange(request)
        try:
            value: object = cbor2.loads(response)
        except (cbor2.CBORError, ValueError, TypeError) as error:
            raise NsmError(f"{name}: a response that is no CBOR") from error
        if isinstance(value, dict) and set(value) == {"Error"}:
            code = str(value["Error"])[:64]
            raise NsmError(f"{name}: the module answers {code}", name=code)
        return value

    def _ioctl(self, request: bytes) -> bytes:
        if self._fd < 0:
            raise ValueError("the module is closed")
        source = ctypes.create_string_buffer(request, len(request))
        room = ctypes.create_string_buffer(MAX_RESPONSE)
        raw = bytearray(NSM_RAW.pack(ctypes.addressof(source), len(request), ctypes.addressof(room), MAX_RESPONSE))
        try:
            fcntl.ioctl(self._fd, NSM_IOCTL_RAW, raw)
        except OSError as error:
            name = "InputTooLarge" if error.errno == errno.EMSGSIZE else ""
            raise NsmError(f"{DEVICE}: {(error.strerror or str(error)).lower()}", name=name) from error
        *_, written = NSM_RAW.unpack(raw)
        return room.raw[: min(written, MAX_RESPONSE)]

    @staticmethod
    def _field(value: object, name: str, field: str, kind: type[T]) -> T:
        inner = value.get(name) if isinstance(value, dict) else None
        found = inner.get(field) if isinstance(inner, dict) else None
        if not isinstance(found, kind):
            raise NsmError(f"{name}: a response without {field}")
        return found

    @staticmethod
    def _done(value: object, name: str) -> None:
        if value != name:
            raise NsmError(f"{name}: a response of another kind")


_VERSION_PARTS = ("major", "minor", "patch")
