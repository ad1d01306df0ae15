# SPDX-License-Identifier: Apache-2.0
"""Images of 1 GiB: writing one and comparing two, against what other programs need for the same bytes, in turns.

build         writing and measuring an image of two files   against copying them and then two ``openssl dgst -sha384``
                                                            at once, one for each half
diff          comparing without hashes                      against ``cmp``; the images differ in one file, near the end
diff, PCRs    comparing with measurements                   against measuring both images, one after the other

Each runs in a fresh process; medians are compared. Nothing is flushed to the disk by either side.

    python bench/eif.py [--rounds 5] [--size-mib 1024] [--directory DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from enclavekit.codec import cpio

MIB = 1 << 20
KERNEL_SIZE = 12 * MIB
SOURCE = Path(__file__).parent.parent / "src"

PRELUDE = """
import os, sys
from pathlib import Path
from enclavekit import eif
"""
REPORT = """
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0]))
"""
BUILD = """
def content(name, offset, size):
    return eif.FileContent(open(name, "rb"), offset, size, name)
platform, application, out, kernel = *sys.argv[1:4], int(sys.argv[4])
size = os.path.getsize(platform)
build = eif.BuildInfo("1970-01-01T00:00:00+00:00", "bench", "0", "Linux", "0")
kinds = eif.SectionType
with open(out, "w+b") as file:
    eif.write(file, [
        eif.Section(kinds.KERNEL, content(platform, 0, kernel)),
        eif.Section(kinds.CMDLINE, eif.BytesContent(b"quiet")),
        eif.Section(kinds.METADATA, eif.BytesContent(eif.Metadata("bench", "0", build).encode())),
        eif.Section(kinds.RAMDISK, content(platform, kernel, size - kernel)),
        eif.Section(kinds.RAMDISK, content(application, 0, os.path.getsize(application))),
    ], arch=eif.Arch.X86_64)
"""
DIFF = """
from enclavekit.inspection.diff import Opened, compare
with open(sys.argv[1], "rb") as one, open(sys.argv[2], "rb") as other:
    found = compare(Opened(one, eif.inspect(one), "one"), Opened(other, eif.inspect(other), "other"),
                    pcrs=sys.argv[3] == "pcrs")
(difference,) = found.differences
assert [file.changes for file in difference.files] == [("content",)], difference
"""
MEASURE = """
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        eif.measure(file, eif.inspect(file), name=name)
"""


def timed(program: str, *words: str | Path) -> tuple[float, int]:
    """Seconds, and KiB of memory of its own that a fresh process had at most."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program + REPORT, *words], env=environment, stdout=subprocess.PIPE, check=True
    )
    return time.perf_counter() - start, int(done.stdout)


def time_copy_and_openssl(halves: tuple[Path, Path], target: Path) -> float:
    start = time.perf_counter()
    with target.open("wb") as out:
        subprocess.run(["cat", *halves], stdout=out, check=True)
    hashing = [subprocess.Popen(["openssl", "dgst", "-sha384", path], stdout=subprocess.DEVNULL) for path in halves]
    assert [process.wait() for process in hashing] == [0, 0]
    return time.perf_counter() - start


def time_cmp(one: Path, other: Path) -> float:
    start = time.perf_counter()
    assert subprocess.run(["cmp", one, other], stdout=subprocess.DEVNULL, check=False).returncode == 1
    return time.perf_counter() - start


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // MIB):
        yield os.urandom(MIB)


def make_inputs(directory: Path, size: int) -> tuple[Path, Path]:
    """A file of random bytes, and an archive of 64 large files and 2000 small ones."""
    platform, application = directory / "platform", directory / "application"
    with platform.open("wb") as out:
        for chunk in chunks(size // 2):
            out.write(chunk)
    large = size // 2 // 64
    with application.open("wb") as out:
        items = [(cpio.Entry(b"large%d" % number, 0o100644, large, ino=number), chunks(large)) for number in range(64)]
        small = [(cpio.Entry(b"small%d" % number, 0o100644, 999), iter([os.urandom(999)])) for number in range(2000)]
        for chunk in cpio.archive([*small, *items]):
            out.write(chunk)
    return platform, application


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    ours: dict[str, list[float]] = {"build": [], "diff": [], "diff, PCRs": []}
    theirs: dict[str, list[float]] = {name: [] for name in ours}
    memory: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        halves = make_inputs(directory, options.size_mib * MIB)
        one, other, copy = directory / "one.eif", directory / "other.eif", directory / "copy"
        words = (*halves, one, str(KERNEL_SIZE))

        def ran(what: str, program: str, *arguments: str | Path) -> None:
            seconds, kib = timed(program, *arguments)
            ours[what].append(seconds)
            memory[what] = max(memory.get(what, 0), kib)

        timed(BUILD, *words)
        shutil.copy(one, other)
        with other.open("r+b") as file:  # one byte of the last large file
            file.seek(-MIB, os.SEEK_END)
            byte = file.read(1)
            file.seek(-MIB, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        for _ in range(options.rounds):
            theirs["build"].append(time_copy_and_openssl(halves, copy))
            copy.unlink()
            one.unlink()
            ran("build", BUILD, *words)
            theirs["diff"].append(time_cmp(one, other))
            ran("diff", DIFF, one, other, "no-pcrs")
            theirs["diff, PCRs"].append(timed(MEASURE, one, other)[0])
            ran("diff, PCRs", DIFF, one, other, "pcrs")
    ratios = {}
    for what, values in ours.items():
        ratios[what] = round(median(values) / median(theirs[what]), 3)
        print(
            f"{what:<12} {median(values):.3f} s against {median(theirs[what]):.3f} s, ratio {ratios[what]:.3f},"
            f" {memory[what] / 1024:.1f} MiB of its own"
        )
    print(json.dumps({"bench": "eif", "size_mib": options.size_mib, "ratio": ratios, "memory_kib": memory}))


if __name__ == "__main__":
    main()
