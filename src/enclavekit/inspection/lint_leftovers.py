# SPDX-License-Identifier: Apache-2.0
"""Rules about what should not be in an image: debugging tools, keys, histories, memory of crashed processes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from enclavekit.codec.elf import MAGIC, ElfType
from enclavekit.inspection.file_system import Node, shown
from enclavekit.inspection.findings import Finding, found
from enclavekit.inspection.subject import Subject

MAX_KEY_SIZE = 1 << 16
MAX_READ = 4096
"""Files that are looked into."""
MAX_NAMED = 10
"""Of each kind."""

TOOLS = frozenset(b"sshd dropbear telnetd gdb gdbserver lldb strace ltrace perf bpftrace tcpdump nmap".split())
_BINARIES = frozenset(b"bin sbin".split())
_KEY_NAMES = (b".pem", b".key", b".p8", b".pk8")
_KEY_FILES = frozenset(b"id_rsa id_dsa id_ecdsa id_ed25519".split())
_KEY = re.compile(rb"^-----BEGIN [A-Z0-9 ]{0,32}PRIVATE KEY-----", re.MULTILINE)
_CORE = re.compile(rb"core(\.[0-9]+)?")


def leftover_rules(subject: Subject) -> Iterator[Finding]:
    """All of them."""
    read = 0
    counts: dict[str, int] = {}
    for path, node in subject.files.walk():
        directory, _, name = path.rpartition(b"/")
        looks_like = _by_name(directory.rpartition(b"/")[2], name, node)
        if looks_like in ("leftover-key", "leftover-core"):
            read += 1
            if read > MAX_READ or not _holds(looks_like, node):
                continue
        if looks_like is None:
            continue
        counts[looks_like] = counts.get(looks_like, 0) + 1
        if counts[looks_like] <= MAX_NAMED:
            yield found(looks_like, "/" + shown(path), _MESSAGES[looks_like])
    for code, count in counts.items():
        if count > MAX_NAMED:
            yield found(code, "/", f"{count - MAX_NAMED} more: {_MESSAGES[code]}")


_MESSAGES = {
    "leftover-tool": "a program for debugging or logging in",
    "leftover-key": "a private key",
    "leftover-ssh": "files of a user's SSH",
    "leftover-git": "a git repository",
    "leftover-core": "a core file",
}


def _by_name(folder: bytes, name: bytes, node: Node) -> str | None:
    if node.is_directory and node.children:
        return {b".git": "leftover-git", b".ssh": "leftover-ssh"}.get(name)
    if folder in _BINARIES and name in TOOLS and not node.is_directory:
        return "leftover-tool"
    if node.is_file and (name.endswith(_KEY_NAMES) or name in _KEY_FILES):
        return "leftover-key"
    return "leftover-core" if node.is_file and _CORE.fullmatch(name) else None


def _holds(code: str, node: Node) -> bool:
    """Whether a file's content is what its name says."""
    if code == "leftover-key":
        return _KEY.search(node.read_at(0, MAX_KEY_SIZE)) is not None
    head = node.read_at(0, 18)
    return head.startswith(MAGIC) and head[16:17] == bytes([ElfType.CORE])
