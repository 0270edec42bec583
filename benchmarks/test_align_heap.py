"""What align_heap costs: a mapping, and its first touch, for each large temporary.

    make bench PYTEST_ARGS="-k align_heap"

With glibc's default an aged process keeps blocks of up to 32 MiB in its heap and hands them out
again warm; with the threshold fixed at 64 KiB every one is mapped, touched and unmapped.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

WORKER = """
import sys, time
import numpy as np
import pyksm

if sys.argv[1] == "aligned":
    from pyksm import _sys
    assert _sys.set_mmap_threshold(64 << 10)
np.ones(30 << 20, dtype="u1")
nbytes = int(sys.argv[2])
turns = max(3, (256 << 20) // nbytes)
times = []
for _ in range(7):
    start = time.perf_counter()
    for _ in range(turns):
        np.empty(nbytes, dtype="u1").fill(1)
    times.append((time.perf_counter() - start) / turns)
print(min(times))
"""


def seconds(kind: str, nbytes: int) -> float:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, kind, str(nbytes)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


@pytest.mark.parametrize("nbytes", [100 << 10, 1 << 20, 16 << 20])
def test_large_temporaries(benchmark: object, slack: float, nbytes: int) -> None:
    """Report how many times longer alloc + fill + free of a temporary takes."""
    rounds = [(seconds("default", nbytes), seconds("aligned", nbytes)) for _ in range(3)]
    ratio = statistics.median(aligned / default for default, aligned in rounds)
    benchmark.extra_info["ratio to glibc's default"] = round(ratio, 2)  # type: ignore[attr-defined]
    benchmark.pedantic(seconds, args=("aligned", nbytes), rounds=1)  # type: ignore[attr-defined]
    assert ratio < 60 * slack
