# SPDX-License-Identifier: Apache-2.0
"""How long describing a 1 GiB image takes, against what openssl needs for the same bytes on the same two CPUs.

Two bases, measured in turns with ours, medians compared:

halves   two ``openssl dgst -sha384`` at once, one for each half of the image
pcr      two at once, one for all that PCR0 covers, one for all that PCR2 covers

PCR0 is one SHA-384 over both halves, and SHA-384 is serial: no program can describe an image in the time of ``halves``;
twice that time is the least there is, on CPUs that do not slow each other down. ``pcr`` is the same work as ours, less
the CRC.

    python bench/measure.py [--rounds 5] [--size-mib 1024] [--directory DIR] [--section-digests]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from enclavekit.eif import Arch, BuildInfo, BytesContent, FileContent, Metadata, Section, SectionType, read, write

MIB = 1 << 20
KERNEL_SIZE = 12 * MIB
SOURCE = Path(__file__).parent.parent / "src"

DESCRIBE = """
import sys
from pathlib import Path
from enclavekit.eif import describe
made = describe(Path(sys.argv[1]), section_digests=sys.argv[2] == "True")
assert made["CheckCRC"]
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0], status["RssFile"].split()[0])
"""


@dataclass(frozen=True)
class Inputs:
    """Files: the image; its two halves; what PCR0 and PCR2 cover."""

    image: Path
    halves: tuple[Path, Path]
    covered: tuple[Path, Path]


def make_inputs(directory: Path, size: int) -> Inputs:
    """An image of about ``size`` bytes: kernel and boot ramdisk are one half of it, the application the other."""
    half = size // 2
    platform, application = directory / "platform", directory / "application"
    for path in (platform, application):
        with path.open("wb") as out:
            for _ in range(half // MIB):
                out.write(os.urandom(MIB))
    image, covered = directory / "image.eif", directory / "covered"
    build = BuildInfo("1970-01-01T00:00:00+00:00", "bench", "0", "Linux", "0")
    with platform.open("rb") as first, application.open("rb") as second, image.open("wb") as out:
        sections = [
            Section(SectionType.KERNEL, FileContent(first, 0, KERNEL_SIZE, "kernel")),
            Section(SectionType.CMDLINE, BytesContent(b"quiet")),
            Section(SectionType.METADATA, BytesContent(Metadata("bench", "0", build).encode())),
            Section(SectionType.RAMDISK, FileContent(first, KERNEL_SIZE, half - KERNEL_SIZE, "boot ramdisk")),
            Section(SectionType.RAMDISK, FileContent(second, 0, half, "application ramdisk")),
        ]
        write(out, sections, arch=Arch.X86_64)
    with covered.open("wb") as out:
        for path in (platform, application):
            with path.open("rb") as file:
                while chunk := file.read(MIB):
                    out.write(chunk)
    return Inputs(image, (platform, application), (covered, application))


def time_openssl(paths: Sequence[Path]) -> float:
    """Seconds until the last one is done."""
    start = time.perf_counter()
    running = [subprocess.Popen(["openssl", "dgst", "-sha384", str(path)], stdout=subprocess.DEVNULL) for path in paths]
    assert [process.wait() for process in running] == [0] * len(running)
    return time.perf_counter() - start


def run_describe(image: Path, section_digests: bool) -> tuple[float, int]:
    """Seconds of a fresh process, and the most memory of its own that it can have had, in KiB.

    The peak is of all resident memory; what is mapped from files (the interpreter) is taken off as it is at the end.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, str(image), str(section_digests)],
        env=dict(os.environ, PYTHONPATH=str(SOURCE)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - start
    peak, mapped = map(int, done.stdout.split())
    return seconds, peak - mapped


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--section-digests", action="store_true")
    options = parser.parse_args()
    times: dict[str, list[float]] = {"describe": [], "halves": [], "pcr": []}
    memory = 0
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        inputs = make_inputs(Path(name), options.size_mib * MIB)
        with inputs.image.open("rb") as file:
            size = read(file).size
        for path in (inputs.image, *inputs.halves, *inputs.covered):  # into the page cache
            time_openssl([path])
        for _ in range(options.rounds):
            times["halves"].append(time_openssl(inputs.halves))
            times["pcr"].append(time_openssl(inputs.covered))
            seconds, resident = run_describe(inputs.image, options.section_digests)
            times["describe"].append(seconds)
            memory = max(memory, resident)
    medians = {what: round(median(values), 3) for what, values in times.items()}
    ratios = {what: round(medians["describe"] / medians[what], 3) for what in ("halves", "pcr")}
    print(
        f"describe, image of {size / MIB:.0f} MiB      {medians['describe']:.3f} s, {memory / 1024:.1f} MiB of its own"
    )
    print(f"two openssl of the halves at once    {medians['halves']:.3f} s, ratio {ratios['halves']:.3f} (2 at best)")
    print(f"two openssl of PCR0 and PCR2 at once {medians['pcr']:.3f} s, ratio {ratios['pcr']:.3f}")
    print(json.dumps({"bench": "measure", "size": size, "seconds": medians, "ratio": ratios, "memory_kib": memory}))


if __name__ == "__main__":
    main()
