# SPDX-License-Identifier: Apache-2.0
"""Fuzzes every target, and the ROM's loader, each for its part of the time.

Fails on a crash, and on an input that is slow or takes much memory.

    python tests/fuzz/run.py [--seconds 60] [--corpus DIR]

Inputs that failed are left in the current directory (crash-…, timeout-…, oom-…).
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = (
    "eif",
    "signature",
    "certificate",
    "cpio",
    "vsock",
    "document",
    "chain",
    "recipient",
    "nsm",
    "device",
    "agent",
)
MAX_INPUT = 1 << 16
INPUT_TIMEOUT_S = 5
"""Instrumented code takes several times as long; worst.py has the true figures."""
RSS_LIMIT_MIB = 512


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path)
    options = parser.parse_args()
    failed = []
    with contextlib.ExitStack() as stack:
        corpus = options.corpus or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for target in TARGETS:
            (corpus / target).mkdir(parents=True, exist_ok=True)
            words = [
                f"-max_total_time={options.seconds // len(TARGETS)}",
                f"-timeout={INPUT_TIMEOUT_S}",
                f"-rss_limit_mb={RSS_LIMIT_MIB}",
                f"-max_len={MAX_INPUT}",
                "-print_final_stats=1",
                "-verbosity=0",
            ]
            print(f"fuzzing {target}", flush=True)
            script = Path(__file__).with_name("targets.py")
            done = subprocess.run([sys.executable, script, target, *words, corpus / target], check=False)
            if done.returncode:
                failed.append(target)
        if not _fuzz_loader(corpus, options.seconds // len(TARGETS)):
            failed.append("loader")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _fuzz_loader(corpus: Path, seconds: int) -> bool:
    """The same C source as in the ROM, with clang's own fuzzer and sanitizers; False when something was found."""
    if shutil.which("clang") is None:
        print("clang is not installed: the loader is not fuzzed", flush=True)
        return True
    print("fuzzing loader", flush=True)
    directory = corpus / "loader"
    directory.mkdir(parents=True, exist_ok=True)
    sys.path.append(str(HERE.parent / "unit/platform"))
    from test_loader_program import GOOD

    for number, image in enumerate(GOOD):
        (directory / f"good-{number}").write_bytes(image)
    with tempfile.TemporaryDirectory() as made:
        program = Path(made) / "fuzzer"
        sanitizers = "-fsanitize=fuzzer,address,undefined"
        command = ["clang", "-std=c11", "-O1", "-g", "-DFUZZ", sanitizers, "-fno-sanitize-recover=all"]
        subprocess.run([*command, "-o", program, HERE.parent / "loader/harness.c"], check=True)
        words = [f"-max_total_time={seconds}", f"-timeout={INPUT_TIMEOUT_S}", f"-max_len={MAX_INPUT}"]
        return subprocess.run([program, *words, "-verbosity=0", directory], check=False).returncode == 0


if __name__ == "__main__":
    main()
