# SPDX-License-Identifier: Apache-2.0
"""nitro-cli's error codes, and in our words what each means and what helps. The number is the exit code.

Source: aws-nitro-enclaves-cli src/common/document_errors.rs for the codes.
"""

from __future__ import annotations

from enum import Enum
from typing import Self


class Code(Enum):
    """Number, meaning, what helps."""

    UNSPECIFIED = (0, "something that no other code is for failed", "look at the lines before it")
    MISSING_ARGUMENT = (1, "an argument that the command cannot do without is missing", "see its --help")
    CONFLICTING_ARGUMENT = (2, "two arguments were given of which only one can be", "leave one of them out")
    INVALID_ARGUMENT = (3, "an argument is not of the kind that is expected, a number for example", "see its --help")
    SOCKET_PAIR = (4, "the two processes of a command could not be connected", "check the limit of open files")
    PROCESS_SPAWN = (5, "the process of an enclave could not be started", "check the limit of processes")
    DAEMONIZE = (6, "the process of an enclave could not detach itself", "look at the system's log")
    READ_FROM_DISK = (
        7,
        "the directory with the sockets of running enclaves, /run/nitro_enclaves, cannot be read",
        "check that it exists and that you may read it",
    )
    UNUSABLE_CONNECTION = (8, "an enclave's process is not there any more", "list the enclaves again")
    SOCKET_CLOSE = (9, "a connection could not be closed", "nothing is lost by it")
    SOCKET_CONNECT_TIMEOUT = (10, "a connection's timeout could not be set", "check that the kernel has vsock")
    SOCKET = (11, "a connection failed, for example because no enclave has that id", "list the enclaves")
    EPOLL = (12, "an enclave's end could not be waited for", "check the limit of open files")
    INOTIFY = (13, "the directory with the sockets could not be watched", "check the limits of inotify")
    INVALID_COMMAND = (
        14,
        "an enclave's process did not understand a command",
        "both must be of the same version: end the enclave with the version that started it",
    )
    LOCK = (15, "a lock within the program could not be had", "try again")
    THREAD_JOIN = (16, "a thread within the program ended badly", "look at the lines before it")
    SERDE = (
        17,
        "JSON could not be read or written, for example a --config that is none, or custom metadata that are no object",
        "check the JSON",
    )
    FILE_PERMISSIONS = (18, "the log's mode cannot be changed by someone who does not own it", "run as its owner")
    FILE_OPERATION = (
        19,
        "a file cannot be opened, read or written",
        "check that it exists; for /dev/nitro_enclaves, that the instance has enclaves enabled",
    )
    INVALID_CPUS = (20, "a CPU was named twice", "name each CPU once")
    NO_SUCH_CPU = (21, "a CPU that was named is not in the pool of the enclaves' CPUs", "see the allocator's cpu_pool")
    INSUFFICIENT_CPUS = (22, "more CPUs were asked for than the pool has", "raise cpu_count of the allocator")
    MALFORMED_CPU_ID = (23, "the system's list of CPUs cannot be read", "look at lscpu")
    CPU_INTERVAL = (24, "an interval of CPUs is none", "write it as 0-3")
    NO_SUCH_HUGEPAGE_FLAG = (25, "huge pages of a size that the kernel does not have were asked for", "see hugepages")
    INSUFFICIENT_MEMORY_REQUESTED = (
        26,
        "the memory asked for is too little: it has to be four times the image's size",
        "ask for more memory, or make the image smaller",
    )
    INSUFFICIENT_MEMORY = (
        27,
        "there are not enough free huge pages",
        "raise memory_mib of the allocator, and start its service again",
    )
    INVALID_ENCLAVE_FD = (28, "the driver gave no enclave", "look at the kernel's log")
    IOCTL = (
        29,
        "the driver refused a command: no CPUs, an odd number of them, memory of another NUMA node, or an empty pool",
        "look at the kernel's log",
    )
    IOCTL_LOAD_INFO = (30, "the driver did not say where the image goes", "look at the kernel's log")
    IOCTL_MEMORY = (31, "the driver refused a region of memory", "look at the kernel's log")
    IOCTL_VCPU = (32, "the driver refused a CPU", "look at the kernel's log")
    IOCTL_START = (33, "the driver refused to start the enclave", "look at the kernel's log")
    MEMORY_OVERFLOW = (34, "the image does not fit into the memory that was set aside", "ask for more memory")
    EIF_PARSING = (
        35,
        "the image cannot be read: it is no EIF, it is damaged, its signature is not by the key of its certificate,"
        " or its metadata are not as they should be",
        "see what `enclave describe` says of it, and build it again",
    )
    ENCLAVE_BOOT = (
        36,
        "the enclave did not send its heartbeat: its kernel or init ended before, its certificate has expired,"
        " it has too little memory, or something else holds vsock port 9000",
        "find most of these with `enclave lint`",
    )
    ENCLAVE_EVENT_WAIT = (37, "an enclave's end could not be waited for", "look at the system's log")
    COMMAND_NOT_EXECUTED = (38, "at least one enclave could not do what it was told", "look at the lines before it")
    PROCESS_CONNECTION = (39, "at least one enclave's process gave no answer", "the error before this one says why")
    SOCKET_PATH = (40, "an enclave's socket has no path", "check the enclave's id")
    SEND_REPLY = (41, "an enclave's process could not answer", "list the enclaves again")
    MMAP = (42, "the enclave's memory could not be mapped", "check the free huge pages")
    MUNMAP = (43, "the enclave's memory could not be unmapped", "it is free when its process ends")
    CONSOLE_CONNECTION = (44, "there is no console: only enclaves in debug mode have one", "start it with --debug-mode")
    CONSOLE_READ = (45, "the console could not be read, most often because the enclave has ended", "list the enclaves")
    CONSOLE_WRITE = (46, "what the console said could not be written", "check where the output goes")
    INTEGER_PARSING = (47, "a CID is not a number of 32 bits", "check the CID")
    EIF_BUILDING = (48, "the image could not be built", "look at the lines before it")
    DOCKER_BUILD = (49, "the container image could not be built", "build it with docker alone first")
    DOCKER_PULL = (50, "the container image could not be fetched", "check its name, and that you are logged in")
    ARTIFACTS_PATH = (51, "there is no directory for what a build leaves", "set NITRO_CLI_ARTIFACTS or HOME")
    BLOBS_PATH = (52, "there is no directory with kernel and init", "set NITRO_CLI_BLOBS")
    CLOCK_SKEW = (53, "the clock went backwards while the console was read", "try again")
    SIGNAL_MASKING = (54, "signals could not be held back", "try again")
    SIGNAL_UNMASKING = (55, "signals could not be let through again", "try again")
    LOGGER = (56, "the log could not be opened", "check /var/log/nitro_enclaves")
    HASHER = (57, "a certificate or file could not be hashed", "check that the certificate is in PEM")
    NAMING = (58, "no enclave, or more than one, has that name", "use its id")
    SIGNATURE = (
        59,
        "the image's signature does not hold, or its certificate is not valid now",
        "see with `enclave describe --strict` which it is, and sign it anew",
    )
    SIGNING = (
        60,
        "the image could not be signed: certificate or key cannot be read, or do not belong together",
        "make a pair that does with `enclave keygen`",
    )

    @property
    def number(self) -> int:
        """The exit code."""
        number: int = self.value[0]
        return number

    @property
    def meaning(self) -> str:
        """Half a sentence."""
        meaning: str = self.value[1]
        return meaning

    @property
    def remedy(self) -> str:
        """Half a sentence."""
        remedy: str = self.value[2]
        return remedy

    def __str__(self) -> str:
        return f"E{self.number:02}"

    @classmethod
    def find(cls, text: str) -> Self | None:
        """By its name, as in E35."""
        return next((one for one in cls if str(one) == text), None)
