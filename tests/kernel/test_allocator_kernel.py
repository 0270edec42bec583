"""allocator() against the kernel: VMAs, huge pages, marks, and the aged process it cures."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import Ksmd, mappings, rollup_kb, smaps_kb, spawn, vm_flags, wait_until

from pyksm import _numpy, _sys
from pyksm.allocating import allocator

MIB = 1 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def vma_count() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def huge_pages() -> None:
    if not THP.exists() or "[never]" in THP.read_text():
        pytest.skip("transparent huge pages are switched off on this host")


# --- mappings ----------------------------------------------------------------------------------


def test_every_second_array_freed_needs_hardly_a_mapping() -> None:
    before = vma_count()
    with allocator():
        made = [np.empty(65536, "u1") for _ in range(20_000)]
        for array in made:
            array[0] = 1
        full = vma_count()
        del made[::2], array
        assert vma_count() - before < 130
        assert vma_count() - full < 10
        made += [np.zeros(65536, "u1") for _ in range(10_000)]
        assert vma_count() - before < 130
    assert vma_count() - before < 130
    made.clear()
    assert vma_count() - before < 20


def _loads_and_drops():
    import numpy as np

    from pyksm import _numpy
    from pyksm.allocating import allocator

    mib = 1 << 20
    with allocator():
        made = [np.ones(nbytes, "u1") for nbytes in (65536, mib, 9 * mib, 300 * mib) * 3]
    made.clear()
    say(_numpy.counters()["kept_bytes"], _numpy.counters()["live_arrays"])  # noqa: F821
    next(commands())  # noqa: F821


def test_nothing_stays_mapped_but_what_is_kept() -> None:
    with spawn(_loads_and_drops) as child:
        kept, live = map(int, child.reply().split())
        assert live == 0
        assert kept <= 32 * MIB
        resident = sum(m.kb("Rss") for m in mappings(child.pid) if "mg" in m.flags)
        assert resident * 1024 <= kept + 2 * MIB  # whole huge pages


# --- huge pages --------------------------------------------------------------------------------


def _filler(nbytes, count):
    """Say, before and after the end of the block, the address of the last array."""
    import numpy as np

    from pyksm import _numpy
    from pyksm.allocating import allocator

    arrays = []
    for _ in range(2):
        with allocator():
            arrays += [np.ones(nbytes, "u1") for _ in range(count)]
            say("filled", arrays[-1].__array_interface__["data"][0])  # noqa: F821
            next(commands())  # noqa: F821
        say("left", _numpy.keep_small())  # noqa: F821
        next(commands())  # noqa: F821
    # Freed with nothing switched on: what goes back to the kernel is as new for the next one.
    first = arrays[0]
    arrays = [first]
    with allocator():
        arrays += [np.ones(nbytes, "u1") for _ in range(3 * count)]
        say("filled", arrays[-1].__array_interface__["data"][0])  # noqa: F821
        next(commands())  # noqa: F821


@pytest.mark.parametrize(("nbytes", "count"), [(65536, 1024), (MIB, 64), (32 * MIB, 2)])
def test_memory_is_filled_through_huge_pages_and_kept_without(
    huge_pages: None, nbytes: int, count: int
) -> None:
    """AnonHugePages after the fill, ``nh`` after the block, huge pages for new memory again."""
    filled = nbytes * count >> 10

    def huge(pid: int) -> int:
        return sum(m.kb("AnonHugePages") for m in mappings(pid) if "mg" in m.flags)

    with spawn(_filler, nbytes, count) as child:
        for turn in (1, 2):
            _, last = child.reply().split()
            assert huge(child.pid) >= turn * filled * 0.9
            assert vm_flags(int(last), child.pid) >= {"mg", "hg"}
            assert child.ask("go") == "left 0"  # nothing was left for keep_small() to do
            flags = vm_flags(int(last), child.pid)
            assert flags >= {"mg", "nh"}
            assert "hg" not in flags
            child.send("go")
        child.reply()
        assert huge(child.pid) >= 3 * filled * 0.9


def test_khugepaged_is_kept_away_from_what_ksm_merged(huge_pages: None, ksmd: Ksmd) -> None:
    with allocator():
        pages = np.random.default_rng(1).integers(0, 256, (2, 4 * MIB), "u1")
        twins = np.concatenate([pages[0], pages[0]])
    merged = wait_until(lambda: _merged_kb(twins) >= 8 * 1024 * 0.98, what="ksmd to merge")
    assert merged
    assert vm_flags(address(twins)) >= {"nh", "mg"}
    assert "hg" not in vm_flags(address(twins))


def _merged_kb(array: np.ndarray) -> int:
    return smaps_kb(address(array), "KSM", array.nbytes)


# --- marks -------------------------------------------------------------------------------------


@pytest.mark.kernel("prctl")
def test_slabs_tell_what_to_mark_again_after_prctl_wiped_it() -> None:
    with allocator():
        made = [np.ones(nbytes, "u1") for nbytes in (65536, 20 * MIB)]
    _sys.set_memory_merge(True)
    _sys.set_memory_merge(False)
    assert not any("mg" in vm_flags(address(array)) for array in made)
    for base, nbytes in _numpy.slabs():
        _sys.madvise(base, nbytes, _sys.MERGEABLE)
    assert all("mg" in vm_flags(address(array)) for array in made)


def test_a_block_unmarked_and_marked_again_is_handed_on_marked() -> None:
    with allocator():
        array = np.ones(MIB, "u1")
        start = address(array)
        _sys.madvise(start, MIB, _sys.UNMERGEABLE)
        assert "mg" not in vm_flags(start)
        _sys.madvise(start, MIB, _sys.MERGEABLE)  # the ledger does this when the array dies
        del array
        again = np.ones(MIB, "u1")
        assert address(again) == start
        assert "mg" in vm_flags(start)


@pytest.fixture
def locked_memory() -> Iterator[ctypes.CDLL]:
    libc = ctypes.CDLL(None, use_errno=True)
    yield libc
    libc.munlockall()


def test_locked_memory_comes_back_zeroed_all_the_same(locked_memory: ctypes.CDLL) -> None:
    """MADV_DONTNEED refuses mlocked pages (EINVAL): zeros must not rely on it."""
    with allocator():
        array = np.full(20 * MIB, 5, "u1")
        start = address(array)
        if locked_memory.mlock(ctypes.c_void_p(start), ctypes.c_size_t(20 * MIB)):
            pytest.skip("mlock is refused here")
        del array
        again = np.zeros(20 * MIB, "u1")
        assert address(again) == start
        assert not again.any()


# --- the aged process --------------------------------------------------------------------------


def _aged_loader(folder, seed, merged):
    """Age the heap as a long-lived process does, then load every array of a folder."""
    import hashlib
    import pathlib
    import random

    import numpy as np

    from pyksm.allocating import allocator

    big = np.ones(30 << 20, "u1")  # freed, it raises glibc's dynamic mmap threshold to 30 MiB
    del big
    dice = random.Random(seed)
    churn = [np.ones(dice.randrange(100, 300_000), "u1") for _ in range(400)]
    dice.shuffle(churn)
    del churn[: len(churn) // 2]

    files = sorted(pathlib.Path(folder).glob("*.npy"), key=lambda path: int(path.stem))
    undo = allocator() if merged else None
    arrays = []
    for file in files:
        arrays.append(np.load(file))
        churn.append(np.ones(dice.randrange(100, 60_000), "u1"))
    if undo is not None:
        undo.undo()
    pages = []
    for array in arrays:
        start = array.__array_interface__["data"][0]
        data = memoryview(array).cast("B")
        for at in range(-start % 4096, len(data) - 4095, 4096):
            pages.append(hashlib.blake2b(data[at : at + 4096], digest_size=12).hexdigest())
    say(len(pages))  # noqa: F821
    for command, *rest in commands():  # noqa: F821
        if command == "pages":
            pathlib.Path(rest[0]).write_text("\n".join(pages))
            say("written")  # noqa: F821


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty arrays of 4 KiB to 12 MiB, 80 MiB together: the make-up of a real model, scaled."""
    folder = tmp_path_factory.mktemp("weights")
    noise = np.random.default_rng(60)
    sizes = [4096, 12_000, 30_000, 60_000] + [81_920, 150_000, 400_000, 1_200_000] * 13
    sizes += [5 * MIB, 8 * MIB, 12 * MIB + 4000, 30 * MIB // 4]
    for number, nbytes in enumerate(sizes):
        np.save(folder / f"{number}.npy", noise.standard_normal(nbytes // 4, "f4"))
    assert len(sizes) == 60
    return folder


def _identical(tmp_path: Path, weights: Path, merged: bool) -> float:
    """Return the share of the second process' whole pages that the first one has too."""
    found = []
    for seed in (1, 2):
        with spawn(_aged_loader, str(weights), seed, merged) as child:
            child.reply()
            child.ask("pages", tmp_path / str(seed))
        found.append((tmp_path / str(seed)).read_text().split())
    first = set(found[0])
    return sum(page in first for page in found[1]) / len(found[1])


def test_aged_processes_hold_the_same_pages(tmp_path: Path, weights: Path) -> None:
    assert _identical(tmp_path, weights, merged=True) >= 0.99


def test_without_pyksm_aged_processes_share_next_to_nothing(tmp_path: Path, weights: Path) -> None:
    assert _identical(tmp_path, weights, merged=False) <= 0.05


@pytest.mark.slow
def test_ksmd_merges_aged_processes(weights: Path, ksmd: Ksmd) -> None:
    total = sum(np.load(file).nbytes for file in weights.glob("*.npy"))
    with (
        spawn(_aged_loader, str(weights), 1, True) as one,
        spawn(_aged_loader, str(weights), 2, True) as two,
    ):
        for child in (one, two):
            child.reply()

        def merged() -> bool:
            return all(_ksm_bytes(child.pid) >= 0.98 * total for child in (one, two))

        wait_until(merged, 60, what="ksmd to merge both copies")
        # Not the host's AnonPages, which everybody else on it moves; exact without forks.
        saved = sum(_saved_bytes(child.pid) for child in (one, two))
        assert 0.98 * total <= saved <= 1.1 * total


def _saved_bytes(pid: int) -> int:
    return (rollup_kb("Anonymous", pid) - rollup_kb("Pss_Anon", pid)) * 1024


def _ksm_bytes(pid: int) -> int:
    return sum(m.kb("KSM") for m in mappings(pid) if "mg" in m.flags) * 1024
