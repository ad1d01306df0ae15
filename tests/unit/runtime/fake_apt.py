# SPDX-License-Identifier: Apache-2.0
"""Stands for apt-get, apt-cache, apt-helper and dpkg-deb, by the name it is called by.

world.json beside it is the mirror. A package's bytes are a JSON object of its files. Every call is a line of ``calls``.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

HERE = Path(sys.argv[0]).parent
NAME = Path(sys.argv[0]).name
WORLD = json.loads((HERE / "world.json").read_text())
MIRROR = "http://mirror.example.org/debian"


def content(name: str) -> bytes:
    return json.dumps(WORLD["packages"][name]["files"]).encode()


def unpack(archive: Path, target: Path) -> None:
    for name, (mode, text) in json.loads(archive.read_bytes()).items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)


def closure(names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        if name in WORLD["packages"] and name not in found:
            found.append(name)
            found += [other for other in closure(WORLD["packages"][name].get("depends", [])) if other not in found]
    return found


def apt(words: list[str]) -> None:
    status_fd = int(words[4].partition("=")[2])
    words = words[5:]
    command = " ".join([NAME, *words[:1]])
    os.write(status_fd, b"dlstatus:1:50.0000:Retrieving file 1 of 2\nnoise\ndlstatus:2:100.0000:Retrieving")
    os.write(status_fd, b" file 2 of 2\n")
    if command == WORLD.get("hangs"):
        (HERE / "pid").write_text(str(os.getpid()))
        os.write(status_fd, b"dlstatus:2:100.0000:now\n")
        signal.pause()
    if words[0] == "--print-uris":
        names = words[2:] if words[1] == "download" else closure(words[4:])
        for name in names:
            if name in WORLD["packages"]:
                version = WORLD["packages"][name]["version"]
                digest = hashlib.sha256(content(name)).hexdigest()
                file = f"{name}_{version.replace(':', '%3a')}_amd64.deb"
                sys.stdout.write(f"'{MIRROR}/pool/{file}' {file} {len(content(name))} SHA256:{digest}\n")
    elif words[0] == "show":
        package = WORLD["packages"][words[2]]
        depends = ", ".join(f"{name} (= 1) | other" for name in package["depends"])
        sys.stdout.write(f"Package: {words[2]}\nDepends: {depends}\n")
    elif words[0] == "download-file":
        for at in range(1, len(words), 3):
            name = words[at].rpartition("/")[2].partition("_")[0]
            Path(words[at + 1]).write_bytes(b"{}" if name in WORLD.get("corrupt", ()) else content(name))


def main() -> None:
    words = sys.argv[1:]
    shown = words if NAME == "dpkg-deb" else words[5:]
    with (HERE / "calls").open("a") as calls:
        calls.write(" ".join([NAME, *shown]) + "\n")
    for call, message in WORLD.get("failures", {}).items():
        if " ".join([NAME, *shown]).startswith(call):
            sys.stderr.write(message)
            sys.exit(100)
    if NAME == "dpkg-deb":
        unpack(Path(words[1]), Path(words[2]))
    else:
        apt(words)


main()
