# SPDX-License-Identifier: Apache-2.0
"""Building from a container image of 1 GiB in 20,000 files, against skopeo and umoci, in turns.

cold    the layer cache is empty    against ``skopeo copy`` to a directory and ``umoci unpack --rootless``
warm    the layers are cached       against the same

Both sides read the same layout, of four gzip layers. Ours also measures and writes the enclave image.

    python bench/image.py [--kernel BZIMAGE] [--rounds 3] [--size-mib 1024] [--directory DIR]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from enclavekit.environment import data_directory
from enclavekit.runtime import find_kernel

MIB = 1 << 20
FILES, LAYERS = 20_000, 4
SOURCE = Path(__file__).parent.parent / "src"
BUILD = """
import sys
from pathlib import Path
from enclavekit.build import Access, Application, BuildOptions, KernelChoice, build
from enclavekit.image.layer_cache import LayerCache
layout, out, kernel, cache = map(Path, sys.argv[1:])
build(BuildOptions(f"oci:{layout}", out, KernelChoice(kernel, None, "bench"), Application(["/bin/app"]),
                   Access(LayerCache(cache))))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0]))
"""


def make_layout(path: Path, size: int) -> None:
    """Files of different sizes, half of them compressible, in directories of a hundred."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)
    source = random.Random(1)  # noqa: S311 - the same image each time
    filler = os.urandom(MIB)

    def blob(data: bytes, media_type: str) -> dict[str, Any]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}

    layers, diff_ids = [], []
    for layer in range(LAYERS):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as out:
            for number in range(FILES // LAYERS):
                length = int(source.expovariate(FILES / size))
                offset = source.randrange(MIB // 2)
                data = (filler[offset : offset + length // 2] + bytes(length))[:length]
                info = tarfile.TarInfo(f"layer{layer}/d{number // 100}/f{number}")
                info.size = length
                out.addfile(info, io.BytesIO(data))
        diff_ids.append(f"sha256:{hashlib.sha256(made.getvalue()).hexdigest()}")
        packed = gzip.compress(made.getvalue(), 1, mtime=0)
        layers.append(blob(packed, "application/vnd.oci.image.layer.v1.tar+gzip"))
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    }
    entry = blob(json.dumps(manifest).encode(), manifest["mediaType"])  # type: ignore[arg-type]
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


def time_build(layout: Path, work: Path, kernel: Path) -> tuple[float, int]:
    """Seconds, and KiB of memory of its own at most."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, layout, work / "out.eif", kernel, work / "cache"],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return time.perf_counter() - start, int(done.stdout)


def time_others(layout: Path, work: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:latest", f"dir:{work}/copy"], check=True)
    subprocess.run(
        ["umoci", "unpack", "--rootless", "--image", f"{layout}:latest", work / "bundle"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - start
    shutil.rmtree(work / "copy")
    shutil.rmtree(work / "bundle")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernel", type=Path, help="the runtime's by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    kernel = options.kernel or find_kernel(data_directory() / "runtime", None, None).path
    times: dict[str, list[float]] = {"cold": [], "warm": [], "others": []}
    memory = 0
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        work = Path(name)
        make_layout(work / "layout", options.size_mib * MIB)
        for _ in range(options.rounds):
            times["others"].append(time_others(work / "layout", work))
            for what in ("cold", "warm"):
                seconds, kib = time_build(work / "layout", work, kernel)
                times[what].append(seconds)
                memory = max(memory, kib)
            shutil.rmtree(work / "cache")
    base = median(times["others"])
    ratios = {what: round(median(times[what]) / base, 3) for what in ("cold", "warm")}
    print(f"skopeo copy and umoci unpack {base:.2f} s")
    for what, ratio in ratios.items():
        print(f"{what} {median(times[what]):.2f} s, ratio {ratio:.3f}")
    print(f"at most {memory / 1024:.1f} MiB of its own")
    print(json.dumps({"bench": "image", "size_mib": options.size_mib, "ratio": ratios, "memory_kib": memory}))


if __name__ == "__main__":
    main()
