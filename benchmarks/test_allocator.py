"""allocator() against numpy's default: ratios of one run, interleaved, warm, medians.

``PYKSM_BENCH_QUICK=1`` takes fewer rounds and smaller cases, to see that everything still runs.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import spawn

from pyksm import _numpy
from pyksm.allocating import allocator

QUICK = os.environ.get("PYKSM_BENCH_QUICK") == "1"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SMALL_RATIO = 1.02
FILL_RATIO = 1.1

pytestmark = pytest.mark.kernel


def _empty(nbytes: int, count: int) -> int:
    make, clock = np.empty, time.perf_counter_ns
    start = clock()
    for _ in range(count):
        make(nbytes, "u1")
    return clock() - start


def _filled(nbytes: int, count: int) -> int:
    make, clock = np.empty, time.perf_counter_ns
    start = clock()
    for _ in range(count):
        make(nbytes, "u1").fill(1)
    return clock() - start


def _interleaved(run: Callable[[], int], rounds: int) -> tuple[float, float]:
    """Time numpy's default and ours in turn; medians in ns, and who begins takes turns too."""
    times: dict[bool, list[int]] = {False: [], True: []}
    for number in range(rounds + 2):
        for ours in (False, True) if number % 2 else (True, False):
            with allocator() if ours else contextlib.nullcontext():
                taken = run()
            if number >= 2:  # warm by then
                times[ours].append(taken)
    return statistics.median(times[False]), statistics.median(times[True])


def _report(benchmark: Any, default: float, ours: float, limit: float) -> None:
    benchmark.extra_info["ratio_to_default"] = round(ours / default, 4)
    if not QUICK:
        assert ours <= limit * default, f"{ours / default:.3f}x of numpy's default"


@pytest.mark.parametrize("nbytes", [64, 8 * KIB])
def test_small_arrays_cost_nothing(benchmark: Any, nbytes: int) -> None:
    count = 1000  # short turns, many of them: the limit is 4 ns
    default, ours = _interleaved(lambda: _empty(nbytes, count), 5 if QUICK else 801)
    with allocator():
        benchmark.pedantic(_empty, args=(nbytes, count), rounds=3)
    _report(benchmark, default, ours, SMALL_RATIO)


@pytest.mark.parametrize(
    ("nbytes", "count", "rounds"),
    [(64 * KIB, 2000, 41), (MIB, 200, 21), (64 * MIB, 4, 11), (GIB, 1, 7)],
    ids=["64KiB", "1MiB", "64MiB", "1GiB"],
)
def test_allocate_fill_free(benchmark: Any, nbytes: int, count: int, rounds: int) -> None:
    if QUICK:
        nbytes, count, rounds = min(nbytes, 64 * MIB), max(count // 20, 1), 3
    default, ours = _interleaved(lambda: _filled(nbytes, count), rounds)
    with allocator():
        benchmark.pedantic(_filled, args=(nbytes, count), rounds=3)
    _report(benchmark, default, ours, FILL_RATIO)


@pytest.mark.parametrize("nbytes", [64 * KIB, MIB, 6 * MIB], ids=["64KiB", "1MiB", "6MiB"])
def test_load_and_drop(benchmark: Any, nbytes: int) -> None:
    """64 MiB loaded and freed, in arrays of one size, which numpy's default faults in each time."""
    count = 64 * MIB // nbytes

    def fill() -> list[np.ndarray]:
        return [np.full(nbytes, 1, "u1") for _ in range(count)]

    def fresh() -> int:
        start = time.perf_counter_ns()
        made = fill()
        taken = time.perf_counter_ns() - start
        made.clear()
        return taken

    default, ours = _interleaved(fresh, 3 if QUICK else 9)
    with allocator():
        benchmark.pedantic(fill, rounds=3)
    _report(benchmark, default, ours, FILL_RATIO)


def _vmas() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_every_second_of_160_000_arrays_freed(benchmark: Any) -> None:
    count = 16_000 if QUICK else 160_000
    before = _vmas()

    def live_and_die() -> tuple[int, int]:
        with allocator():
            made = [np.empty(64 * KIB, "u1") for _ in range(count)]
            for array in made[:: 64 * MIB // (64 * KIB)]:
                array[0] = 1  # one page in each slab: VMAs with memory merge less readily
            full = _vmas()
            del array
            del made[::2]
            return full - before, _vmas() - before

    full, halved = benchmark.pedantic(live_and_die, rounds=1)
    benchmark.extra_info.update(extra_vmas_full=full, extra_vmas_halved=halved)
    assert max(full, halved) < 1000


def _everywhere(quick):
    """Numpy's default handler before and after it was wrapped, in a process of its own."""
    import statistics
    import time

    import numpy as np

    from pyksm.allocating import allocator

    def timed():
        make, clock = np.empty, time.perf_counter_ns
        start = clock()
        for _ in range(5000):
            make(64, "u1")
        return clock() - start

    rounds = 5 if quick else 101
    for _ in range(20):
        timed()
    before = statistics.median(timed() for _ in range(rounds))
    undo = allocator(everywhere=True)
    on = statistics.median(timed() for _ in range(rounds))
    undo.undo()
    off = statistics.median(timed() for _ in range(rounds))
    say(on / before, off / before)  # noqa: F821


def test_everywhere_costs_small_arrays_little(benchmark: Any) -> None:
    """Not interleaved: once wrapped the default stays wrapped. Three processes, the median."""

    def measure() -> tuple[float, float]:
        with spawn(_everywhere, QUICK) as child:
            on, off = child.reply().split()
        return float(on), float(off)

    found = [measure() for _ in range(1 if QUICK else 3)]
    on, off = (statistics.median(values) for values in zip(*found, strict=True))
    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(ratio_on=round(on, 4), ratio_off=round(off, 4))
    if not QUICK:
        assert max(on, off) <= 1.1


def test_leaving_the_block(benchmark: Any) -> None:
    """allocator() and its Undo, with a gigabyte of live arrays to switch to small pages."""
    made = []
    with allocator():
        made = [np.empty(MIB, "u1") for _ in range(1024)]

    def enter_and_leave() -> None:
        with allocator():
            pass

    benchmark.pedantic(enter_and_leave, rounds=20, iterations=10)
    assert _numpy.counters()["live_arrays"] >= len(made)
