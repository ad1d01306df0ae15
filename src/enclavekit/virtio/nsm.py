# SPDX-License-Identifier: Apache-2.0
"""The Nitro security module: PCRs, random bytes and attestation documents, and the virtio device that carries them.

Source: aws-nitro-enclaves-nsm-api (requests, errors), linux: drivers/misc/nsm.c (queue, buffers). A request is one CBOR
item: a text, ``"DescribeNSM"`` and ``"GetRandom"``, or a map of one name to its arguments. So is the response, or
``{"Error": name}``. One virtqueue; Linux's driver makes two chains available for each call, the request and then room
for the response, and waits for one interrupt after both came back in that order.

``Nsm`` knows no queue and ``NsmDevice`` no CBOR; neither knows keys: who signs is given by ``Attest``. The guest is not
trusted: a request has at most 4096 bytes, is copied before it is read, and whatever is in it gets an answer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from hashlib import sha384
from typing import Protocol

from enclavekit.codec import cbor
from enclavekit.errors import Error, FormatError, VirtqueueError
from enclavekit.virtio.queue import VIRTIO_F_INDIRECT_DESC, Chain, Virtqueue

VIRTIO_ID_NSM = 33
VIRTIO_F_VERSION_1 = 1 << 32

MAX_REQUEST = 0x1000
MAX_RESPONSE = 0x3000
QUEUE_SIZE = 16
BATCH = 16
"""Calls that are answered before others get their turn."""

MAX_PCRS = 32
PCR_SIZE = 48
BOOT_PCRS = 16
"""Those below are locked when the enclave starts; the others are the application's."""
ROLE_PCR, INSTANCE_PCR = 3, 4
RANDOM_SIZE = 256
VERSION = (1, 0, 0)
MAX_DEPTH = 3


class NsmErrorCode(StrEnum):
    """What is wrong with a request, as the response has it."""

    INVALID_ARGUMENT = "InvalidArgument"
    INVALID_INDEX = "InvalidIndex"
    READ_ONLY_INDEX = "ReadOnlyIndex"
    INVALID_OPERATION = "InvalidOperation"
    BUFFER_TOO_SMALL = "BufferTooSmall"
    INPUT_TOO_LARGE = "InputTooLarge"
    INTERNAL_ERROR = "InternalError"


class Attest(Protocol):
    """Makes attestation documents: the locked PCRs and what the enclave wants in it, signed. Errors: ``Error``."""

    def __call__(
        self,
        pcrs: Mapping[int, bytes],
        *,
        public_key: bytes | None,
        user_data: bytes | None,
        nonce: bytes | None,
    ) -> bytes: ...


def text_pcr(text: str) -> bytes:
    """PCR3 of a role's ARN, PCR4 of an instance's id: SHA-384(48 zero bytes ‖ text)."""
    return sha384(bytes(PCR_SIZE) + text.encode()).digest()


class _RequestError(Exception):
    def __init__(self, code: NsmErrorCode) -> None:
        super().__init__(code)
        self.code = code


class Nsm:
    """One enclave's module. ``pcrs`` are those that are not zero at the start, 48 bytes each, all below 16."""

    def __init__(self, module_id: str, pcrs: Mapping[int, bytes], attest: Attest) -> None:
        for index, value in pcrs.items():
            if not 0 <= index < BOOT_PCRS or len(value) != PCR_SIZE:
                raise ValueError(f"PCR{index} of {len(value)} bytes, expected 0 to {BOOT_PCRS - 1} and {PCR_SIZE}")
        self.module_id = module_id
        self.error: Error | None = None
        """Why the last document could not be made; the guest was told InternalError."""
        self._attest = attest
        self._initial = [pcrs.get(index, bytes(PCR_SIZE)) for index in range(MAX_PCRS)]
        self.reset()

    def reset(self) -> None:
        """As it is when the enclave starts."""
        self._pcrs = list(self._initial)
        self._locked = [index < BOOT_PCRS for index in range(MAX_PCRS)]

    def answer(self, request: bytes) -> bytes:
        """The response to a request, whatever is in it; at most ``MAX_RESPONSE`` bytes."""
        try:
            response = cbor.encode(self._answer(request))
        except _RequestError as error:
            return failure(error.code)
        return response if len(response) <= MAX_RESPONSE else failure(NsmErrorCode.BUFFER_TOO_SMALL)

    def _answer(self, request: bytes) -> object:
        if len(request) > MAX_REQUEST:
            raise _RequestError(NsmErrorCode.INPUT_TOO_LARGE)
        try:
            value = cbor.decode(request, "NSM request", max_depth=MAX_DEPTH)
        except FormatError as error:
            raise _RequestError(NsmErrorCode.INVALID_OPERATION) from error
        match value:
            case "DescribeNSM":
                return {"DescribeNSM": self._describe()}
            case "GetRandom":
                return {"GetRandom": {"random": os.urandom(RANDOM_SIZE)}}
            case dict() if len(value) == 1:
                ((name, arguments),) = value.items()
                if isinstance(arguments, dict):
                    return self._command(name, arguments)
        raise _RequestError(NsmErrorCode.INVALID_OPERATION)

    def _command(self, name: object, arguments: dict[object, object]) -> object:
        match name:
            case "DescribePCR":
                index = _index(arguments)
                return {name: {"lock": self._locked[index], "data": self._pcrs[index]}}
            case "ExtendPCR":
                index, data = _index(arguments), _data(arguments, "data")
                if data is None:
                    raise _RequestError(NsmErrorCode.INVALID_OPERATION)
                self._need_unlocked(index)
                self._pcrs[index] = sha384(self._pcrs[index] + data).digest()
                return {name: {"data": self._pcrs[index]}}
            case "LockPCR":
                index = _index(arguments)
                self._need_unlocked(index)
                self._locked[index] = True
                return name
            case "LockPCRs":
                end = _number(arguments, "range")
                if end > MAX_PCRS:
                    raise _RequestError(NsmErrorCode.INVALID_INDEX)
                self._locked[:end] = [True] * end
                return name
            case "Attestation":
                return {name: {"document": self._document(arguments)}}
        raise _RequestError(NsmErrorCode.INVALID_OPERATION)

    def _describe(self) -> dict[str, object]:
        major, minor, patch = VERSION
        return {
            "version_major": major,
            "version_minor": minor,
            "version_patch": patch,
            "module_id": self.module_id,
            "max_pcrs": MAX_PCRS,
            "locked_pcrs": [index for index in range(MAX_PCRS) if self._locked[index]],
            "digest": "SHA384",
        }

    def _document(self, arguments: dict[object, object]) -> bytes:
        locked = {index: self._pcrs[index] for index in range(MAX_PCRS) if self._locked[index]}
        options = {name: _data(arguments, name) for name in ("public_key", "user_data", "nonce")}
        try:
            return self._attest(locked, **options)
        except Error as error:
            self.error = error
            raise _RequestError(NsmErrorCode.INTERNAL_ERROR) from error

    def _need_unlocked(self, index: int) -> None:
        if self._locked[index]:
            raise _RequestError(NsmErrorCode.READ_ONLY_INDEX)


def failure(code: NsmErrorCode) -> bytes:
    """The response that says so."""
    return cbor.encode({"Error": str(code)})


def _number(arguments: dict[object, object], name: str) -> int:
    value = arguments.get(name)
    if type(value) is not int or not 0 <= value <= 0xFFFF:
        raise _RequestError(NsmErrorCode.INVALID_OPERATION)
    return value


def _index(arguments: dict[object, object]) -> int:
    value = _number(arguments, "index")
    if value >= MAX_PCRS:
        raise _RequestError(NsmErrorCode.INVALID_INDEX)
    return value


def _data(arguments: dict[object, object], name: str) -> bytes | None:
    """Bytes, or text, which stands for its UTF-8; None for null and for nothing."""
    value = arguments.get(name)
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise _RequestError(NsmErrorCode.INVALID_OPERATION)
    return value.encode()


class NsmDevice:
    """The device over one queue; any transport may drive it (``start``, ``process`` after each kick, ``stop``)."""

    features = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC
    queue_count = 1
    queue_names = ("nsm",)
    config = b""

    def __init__(self, nsm: Nsm) -> None:
        self.error: VirtqueueError | None = None
        """Why the device is broken, until its queue is started anew."""
        self._nsm = nsm
        self._queue: Virtqueue | None = None
        self._request: Chain | None = None

    def start(self, index: int, queue: Virtqueue) -> None:
        """The queue runs from now on."""
        del index
        self.error = None
        self._queue = queue

    def stop(self, index: int) -> None:
        """The queue's last moment: a request that waits for its response's room is available again."""
        del index
        if self._queue is not None and self._request is not None:
            self._queue.put_back(1)
        self._queue = self._request = None

    def process(self) -> bool:
        """Answer what is there, in bounded portions; True when there may be more."""
        if self._queue is None:
            return False
        try:
            for _ in range(BATCH):
                chain = self._queue.pop()
                if chain is None:
                    return False
                self._take(self._queue, chain)
        except VirtqueueError as error:
            self.error = error
            self._queue = self._request = None
            return False
        return True

    def _take(self, queue: Virtqueue, chain: Chain) -> None:
        """A request, room for its response, or both in one."""
        if chain.readable:
            if self._request is not None:
                raise VirtqueueError("nsm queue: a second request before the first one's response has room")
            self._request = chain
        if not chain.writable:
            return
        request, self._request = self._request, None
        if request is None:
            raise VirtqueueError("nsm queue: room for a response without a request")
        written = _write(chain.writable, self._response(request.readable))
        if request is not chain:
            queue.push(request.head, 0)
        queue.push(chain.head, written)
        queue.signal()

    def _response(self, parts: list[memoryview]) -> bytes:
        if sum(map(len, parts)) > MAX_REQUEST:
            return failure(NsmErrorCode.INPUT_TOO_LARGE)
        return self._nsm.answer(b"".join(parts))


def _write(parts: list[memoryview], response: bytes) -> int:
    """As much as an error has, where the response has no room; nothing where that has none either."""
    room = sum(map(len, parts))
    if len(response) > room:
        response = failure(NsmErrorCode.BUFFER_TOO_SMALL)
        if len(response) > room:
            return 0
    position = 0
    for part in parts:
        piece = response[position : position + len(part)]
        part[: len(piece)] = piece
        position += len(piece)
    return position
