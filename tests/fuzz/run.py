# SPDX-License-Identifier: Apache-2.0
"""Fuzzes every target for its part of the time; fails on a crash, and on an input that is slow or takes much memory.

    python tests/fuzz/run.py [--seconds 60] [--corpus DIR]

Inputs that failed are left in the current directory (crash-…, timeout-…, oom-…).
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = ("eif", "signature", "certificate", "cpio", "vsock", "document", "chain", "recipient")
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
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
