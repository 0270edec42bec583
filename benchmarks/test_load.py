"""What load(), copy() and Buffer cost beside what people use today; ratios of one run, interleaved.

The arrays are read from the page cache and dropped, so this is the cost of the way into memory.
"""

from __future__ import annotations

import mmap
import pickle
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pyksm
from pyksm._buffer import Buffer

NBYTES = 128 << 20
ROUNDS = 9


def ratio(benchmark, ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """Return the median of ours over the median of theirs; each round runs one after the other."""
    times: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for function in times:
        function()
    for _ in range(ROUNDS):
        for function, taken in times.items():
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    found = statistics.median(times[ours]) / statistics.median(times[theirs])
    benchmark.extra_info["ratio"] = round(found, 3)
    benchmark.pedantic(ours, rounds=1)
    print(f"\n{benchmark.name}: {found:.2f}x")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("load")
    array = np.random.default_rng(0).random((2, NBYTES // 16))
    np.save(path / "a.npy", array)
    np.savez(path / "a.npz", a=array)
    for protocol in (4, 5):
        (path / f"p{protocol}").write_bytes(pickle.dumps([array], protocol))
    return path


def test_npy(benchmark, slack, folder):
    def theirs():
        return np.load(folder / "a.npy")

    assert ratio(benchmark, lambda: pyksm.load(folder / "a.npy"), theirs) < 1.25 * slack


def test_npz(benchmark, slack, folder):
    def theirs():
        with np.load(folder / "a.npz") as archive:
            return archive["a"]

    assert ratio(benchmark, lambda: pyksm.load(folder / "a.npz"), theirs) < 1.25 * slack


@pytest.mark.parametrize("protocol", [4, 5])
def test_pickle(benchmark, slack, folder, protocol):
    path = folder / f"p{protocol}"

    def theirs():
        with path.open("rb") as file:
            return pickle.load(file)

    assert ratio(benchmark, lambda: pyksm.load(path, allow_pickle=True), theirs) < 1.25 * slack


def test_safetensors(benchmark, slack, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "a.safetensors"
    safetensors.save_file({"a": np.random.default_rng(0).random(NBYTES // 8)}, path)
    ours = ratio(benchmark, lambda: pyksm.load(path), lambda: safetensors.load_file(path))
    assert ours < 1.25 * slack


def test_copy(benchmark, slack):
    source = {"a": np.ones(NBYTES // 8)}
    assert ratio(benchmark, lambda: pyksm.copy(source), lambda: source["a"].copy()) < 1.25 * slack


@pytest.mark.parametrize("size", [4096, 65536, 1 << 20, 64 << 20, (64 << 20) + 4096])
def test_creation(benchmark, slack, size):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

    def ours():
        for _ in range(1000):
            Buffer(size)

    def theirs():
        for _ in range(1000):
            mmap.mmap(-1, size, flags=flags).madvise(12)

    # Two more calls from 2 MiB on (huge pages, and the tail of an odd size).
    assert ratio(benchmark, ours, theirs) < (1.25 if size < 2 << 20 else 2.5) * slack


def test_first_touch(benchmark, slack):
    def theirs():
        return np.empty(NBYTES, "u1").fill(1)

    assert ratio(benchmark, lambda: pyksm.full(NBYTES, 1, "u1"), theirs) < 1.25 * slack
