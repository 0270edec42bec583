"""All counters of sysfs, against opening and reading each file."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
from support import SYSFS

from pyksm.host import Host

pytestmark = pytest.mark.kernel


def seconds(call) -> float:
    started = time.perf_counter()
    for _ in range(10):
        call()
    return time.perf_counter() - started


def test_counters_take_a_fifteenth_of_opening_each(benchmark, slack):
    host = Host()
    paths = [str(path) for path in Path(SYSFS).iterdir()]

    def open_each():
        for path in paths:
            with open(path) as file:
                file.read()

    host.counters()
    plain, fast = [], []
    for _ in range(150):  # interleaved, so that a busy moment meets both
        plain.append(seconds(open_each))
        fast.append(seconds(host.counters))
    ratio = statistics.median(plain) / statistics.median(fast)
    benchmark.extra_info["times faster"] = ratio
    benchmark(host.counters)
    host.close()
    assert ratio >= 15 / slack
