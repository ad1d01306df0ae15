# SPDX-License-Identifier: Apache-2.0
"""The one tree of errors. Hostile input, a hostile guest or a lacking machine raise nothing else.

A message is one line: where, what, got, expected; numbers in hex with their width; lower case, no full stop.
``code`` is stable: scripts match it and ``enclave explain`` knows it. ``hint`` says what to do next.
Mistakes of the caller's own code are ``TypeError`` and ``ValueError``, as everywhere in Python.
"""

from __future__ import annotations

import os
from typing import ClassVar, Self


class Error(Exception):
    """Base of everything that enclavekit raises on purpose."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(Error):
    """The words of a command do not fit together."""

    code = "usage"


class FileError(Error):
    """The system refused something with a file: unreadable, missing, disk full."""

    code = "file"

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike[str], what: str, *, hint: str | None = None) -> Self:
        """``what`` is the action that failed, as in ``cannot read a.eif: permission denied``."""
        reason = (error.strerror or str(error)).lower()
        return cls(f"cannot {what} {os.fspath(path)}: {reason}", hint=hint)


class FormatError(Error):
    """Bytes that are not what their format says."""

    code = "format"


class TruncatedError(FormatError):
    """The bytes end before their format does."""

    code = "truncated"


class EifError(FormatError):
    """Not an EIF, or one that breaks the format's rules."""

    code = "eif"


class SignatureError(Error):
    """A signature that does not hold: another key's, over other bytes, of another image."""

    code = "signature"


class CertificateError(SignatureError):
    """The certificate of a signature is not valid at that time, or not fit to sign with."""

    code = "certificate"


class SigningError(Error):
    """A key cannot be used, or a signature could not be made."""

    code = "signing"


class KernelError(FormatError):
    """Not a kernel that can boot here: no bzImage, another architecture, a broken module."""

    code = "kernel"


class SourceError(Error):
    """A directory, tar or image that no ramdisk can be made of."""

    code = "source"


class NoImageError(SourceError):
    """A docker daemon has no image of that name."""

    code = "no-image"


class BuildError(Error):
    """An image cannot be made of these inputs."""

    code = "build"


class ProjectError(FormatError):
    """An ``enclave.toml`` that is none, or has what no option is for."""

    code = "project"


class LockedError(BuildError):
    """``enclave.lock`` locks something else than what is here."""

    code = "locked"


class LaunchError(Error):
    """An enclave cannot be started as asked."""

    code = "launch"


class NotEnoughMemoryError(LaunchError):
    """The enclave's memory cannot hold its image and boot it."""

    code = "memory"


class ImageTooLargeError(LaunchError):
    """The image is larger than a local machine can boot."""

    code = "image-too-large"


class BootError(Error):
    """The enclave ended, or stayed silent, before its init said that it is alive."""

    code = "boot"


class HeartbeatError(BootError):
    """Nothing went wrong that can be seen, but the enclave's init never said that it is alive."""

    code = "heartbeat"


class GuestError(Error):
    """The enclave's init reported a failure, or ended without a word."""

    code = "guest"


class PanicError(GuestError):
    """The enclave's kernel gave up."""

    code = "panic"


class GuestMemoryError(GuestError):
    """The enclave had not enough memory to go on."""

    code = "guest-memory"


class NoEnclaveError(Error):
    """No enclave has that name or id, or it has ended."""

    code = "no-enclave"


class ControlError(Error):
    """The process of an enclave does not answer, or not as it should."""

    code = "control"


class CarrierError(Error):
    """What carries the enclave (QEMU, KVM, a driver) failed."""

    code = "carrier"


class ProtocolError(Error):
    """A peer (guest, QEMU, init) broke the protocol spoken with it."""

    code = "protocol"


class VirtqueueError(ProtocolError):
    """The guest's driver made a virtqueue that breaks the rules: the device is broken until reset."""

    code = "virtqueue"


class EnclaveConnectionError(Error):
    """A connection into the enclave was refused or timed out."""

    code = "connection"


class EnclaveRefusedError(EnclaveConnectionError):
    """Nobody in the enclave listens at that port."""

    code = "refused"


class RuntimeInstallError(Error):
    """The runtime could not be installed."""

    code = "runtime"


class MissingError(Error):
    """This machine lacks something; the hint says what and how to get it."""

    code = "missing"


class NoQemuError(MissingError):
    """No usable QEMU."""

    code = "no-qemu"


class NoDockerError(MissingError):
    """No docker daemon answers."""

    code = "no-docker"


class NoKernelError(MissingError):
    """No guest kernel, or not the modules that it needs."""

    code = "no-kernel"


class UnsupportedHostError(MissingError):
    """The runtime cannot be installed on a system like this one; the hint says what to install by hand."""

    code = "unsupported-host"


class OfflineError(RuntimeInstallError):
    """The package mirror cannot be reached."""

    code = "offline"
