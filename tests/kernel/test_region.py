"""Regions on the real kernel: every mark is checked with the tests' own smaps reader."""

from __future__ import annotations

import contextlib
import gc
import mmap
import multiprocessing.shared_memory
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import Ksmd, mappings, smaps_kb, spawn, vm_flags, wait_until

import pyksm
from pyksm import NotSupported, Region
from pyksm.verbs import merge, unmerge

PAGE = mmap.PAGESIZE


def private(nbytes: int) -> mmap.mmap:
    """Memory nobody has marked, touched."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = os.urandom(nbytes)
    return memory


def marks(region: Region, count: int = 8) -> str:
    """The region's pages in ``count`` pieces: M where marked."""
    step = region.nbytes // count
    addresses = range(region.address, region.address + region.nbytes, step)
    return "".join("M" if "mg" in vm_flags(address) else "-" for address in addresses)


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with contextlib.closing(private(8 * PAGE)) as memory:
        yield memory
        gc.collect()


def part(memory: mmap.mmap, first: int, last: int) -> Region:
    return Region(memoryview(memory)[first * PAGE : last * PAGE])


# ---- the whole pages inside ----


def test_only_whole_pages_are_taken() -> None:
    memory = private(4 * PAGE)
    region = Region(memoryview(memory)[10 : 4 * PAGE - 10])
    assert region.address % PAGE == 0
    assert region.nbytes == 2 * PAGE


def test_under_a_page_is_not_supported() -> None:
    with pytest.raises(NotSupported, match="no whole page"):
        Region(bytearray(100))


@pytest.mark.parametrize(
    ("obj", "error", "words"),
    [
        (5, TypeError, "has no buffer"),
        ("text", TypeError, "has no buffer"),
        ([1, 2], TypeError, "has no buffer"),
        (bytearray(), ValueError, "empty"),
        (np.empty(0), ValueError, "empty"),
        (np.empty((3, 0)), ValueError, "empty"),
        (np.zeros(10000, dtype=object), TypeError, "Python objects"),
        (np.zeros(10000, dtype=[("a", "O"), ("b", "i4")]), TypeError, "Python objects"),
        (np.zeros((200, 200))[:, ::2], ValueError, "not contiguous"),
        (memoryview(bytes(10000))[::2], ValueError, "not contiguous"),
    ],
)
def test_bad_objects_are_refused_at_the_door(
    obj: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Region(obj)


def test_closed_memory_is_refused() -> None:
    memory = private(PAGE)
    memory.close()
    with pytest.raises(ValueError, match="not available"):
        Region(memory)


def test_arrays_that_pep_3118_cannot_name_work() -> None:
    array = np.zeros(100_000, dtype="datetime64[s]")
    with merge(array):
        assert "mg" in vm_flags(Region(array).address)


def test_fortran_and_read_only_arrays_work() -> None:
    array = np.asfortranarray(np.ones((400, 300)))
    array.flags.writeable = False
    with merge(array) as undo:
        assert undo.nbytes >= array.nbytes - 2 * PAGE


def test_a_region_keeps_its_memory_in_place(memory: mmap.mmap) -> None:
    region = Region(memory)
    with pytest.raises(BufferError):
        memory.close()
    del region


# ---- marks and their undoing ----


def test_merge_marks_and_undo_unmarks(memory: mmap.mmap) -> None:
    region = Region(memory)
    assert marks(region) == "--------"
    with region.merge() as undo:
        assert marks(region) == "MMMMMMMM"
        assert (undo.nbytes, undo.skipped) == (8 * PAGE, ())
    assert marks(region) == "--------"
    del region


def test_a_region_already_mergeable_stays_so(memory: mmap.mmap) -> None:
    memory.madvise(mmap.MADV_MERGEABLE)
    region = Region(memory)
    with region.merge():
        pass
    assert marks(region) == "MMMMMMMM"
    with region.unmerge():
        assert marks(region) == "--------"
    assert marks(region) == "MMMMMMMM"
    del region


def test_overlapping_regions_stay_until_the_last_asker(memory: mmap.mmap) -> None:
    left, right, whole = part(memory, 0, 5), part(memory, 3, 8), part(memory, 0, 8)
    first, second = left.merge(), right.merge()
    assert marks(whole) == "MMMMMMMM"
    first.undo()
    assert marks(whole) == "---MMMMM"
    again = whole.merge()
    second.undo()
    assert marks(whole) == "MMMMMMMM"
    again.undo()
    assert marks(whole) == "--------"
    del left, right, whole


def test_a_hole_in_the_middle(memory: mmap.mmap) -> None:
    whole, secret = part(memory, 0, 8), part(memory, 2, 4)
    with whole.merge():
        with secret.unmerge():
            assert marks(whole) == "MM--MMMM"
        assert marks(whole) == "MMMMMMMM"
    assert marks(whole) == "--------"
    del whole, secret


def test_a_kept_mark_survives_an_earlier_undo(memory: mmap.mmap) -> None:
    region = Region(memory)
    first = region.merge()
    region.merge()  # thrown away: from now on
    first.undo()
    assert marks(region) == "MMMMMMMM"
    del region


def test_thrown_away_undos_do_not_pile_up(memory: mmap.mmap) -> None:
    from pyksm.marks import ledger

    region = Region(memory)
    for _ in range(50):
        region.merge()
        region.unmerge()
    spans = ledger.spans(region.address, region.address + region.nbytes)
    assert sum(len(span.claims) for span in spans) <= 2
    del region


def test_a_list_is_all_or_nothing(memory: mmap.mmap) -> None:
    whole = Region(memory)
    shared = mmap.mmap(-1, PAGE)
    with merge([whole, bytearray(10)]) as undo:
        assert marks(whole) == "MMMMMMMM"
        assert [skipped.code for skipped in undo.skipped] == ["too-small"]
    assert marks(whole) == "--------"
    with merge([whole, shared]) as undo:
        assert [skipped.code for skipped in undo.skipped] == ["shared"]
    with pytest.raises(TypeError, match="has no buffer"):
        merge([whole, 5])
    with pytest.raises(NotSupported):
        merge([bytearray(10), bytearray(10)])
    with pytest.raises(ValueError, match="empty list"):
        merge([])
    assert marks(whole) == "--------"
    del whole


def test_threads_may_merge_and_undo_at_once() -> None:
    memory = private(64 * PAGE)
    region = Region(memory)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(60):
                first = (seed * 7 + turn * 3) % 60
                with part(memory, first, first + 4).merge():
                    assert "mg" in vm_flags(region.address + (first + 1) * PAGE)
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert marks(region, 64) == "-" * 64


# ---- the life of the memory ----


def test_a_mark_ends_with_its_memory() -> None:
    """The mapping is kept alive by a second view that the ledger knows nothing of."""
    keeper = private(8 * PAGE)
    address = Region(keeper).address
    array = np.frombuffer(keeper, dtype="u1")
    merge(array)
    assert "mg" in vm_flags(address)
    del array
    gc.collect()
    assert "mg" in vm_flags(address)  # the mmap object owns the memory, and lives


def test_heap_memory_is_unmarked_before_it_is_freed() -> None:
    # One arena chunk: freed blocks go back to glibc's heap, which hands them out again.
    arrays = [np.ones(3 * PAGE, dtype="u1") for _ in range(200)]
    middle = arrays[100]
    merge(middle)
    address = Region(middle).address
    assert "mg" in vm_flags(address)
    del middle
    arrays[100] = arrays[0]
    gc.collect()
    assert "mg" not in vm_flags(address)


def test_an_array_in_a_cycle_is_unmarked_too() -> None:
    arrays = [np.ones(3 * PAGE, dtype="u1") for _ in range(200)]

    class Node:
        pass

    node = Node()
    node.array, node.me = arrays[100], node  # type: ignore[attr-defined]
    merge(arrays[100])
    address = Region(arrays[100]).address
    arrays[100] = arrays[0]
    del node
    gc.collect()
    assert "mg" not in vm_flags(address)


def test_a_view_may_die_before_its_owner() -> None:
    array = np.ones(64 * PAGE, dtype="u1")
    merge(array[PAGE : 32 * PAGE])
    gc.collect()
    assert "mg" in vm_flags(Region(array).address + 4 * PAGE)


def test_bytes_are_kept_alive_while_marked() -> None:
    data = bytearray(os.urandom(16 * PAGE))
    address = Region(data).address
    undo = merge(data)
    del data
    gc.collect()
    assert "mg" in vm_flags(address)
    undo.undo()


def test_undo_after_the_memory_was_closed_touches_nothing(memory: mmap.mmap) -> None:
    other = private(8 * PAGE)
    region = Region(other)
    undo, address = region.merge(), region.address
    del region
    other.close()
    undo.undo()
    assert "undone" in repr(undo)
    assert all("mg" not in m.flags for m in mappings() if m.start <= address < m.end)


def test_many_marks_leave_no_mappings_behind() -> None:
    before = len(mappings())
    array = np.ones(1000 * PAGE, dtype="u1")
    for index in range(0, 900, 3):
        with merge(array[index * PAGE : (index + 3) * PAGE]):
            pass
    assert len(mappings()) <= before + 4


# ---- what the kernel skips in silence ----


def test_shared_mappings_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match=r"default of mmap\.mmap") as caught:
        merge(mmap.mmap(-1, PAGE))
    assert "pyksm.copy" in caught.value.hint
    memfd = os.memfd_create("model")
    os.ftruncate(memfd, PAGE)
    with pytest.raises(NotSupported, match="a memfd"):
        merge(mmap.mmap(memfd, PAGE))
    os.close(memfd)
    segment = multiprocessing.shared_memory.SharedMemory(create=True, size=PAGE)
    try:
        with pytest.raises(NotSupported, match="multiprocessing shared memory"):
            merge(segment.buf)
    finally:
        gc.collect()
        segment.close()
        segment.unlink()
    np.save(tmp_path / "weights.npy", np.ones(100_000))
    with pytest.raises(NotSupported, match="shared memory"):
        merge(np.load(tmp_path / "weights.npy", mmap_mode="r"))
    with pytest.raises(NotSupported, match="page cache") as caught:
        merge(np.load(tmp_path / "weights.npy", mmap_mode="c"))
    assert "pyksm.load" in caught.value.hint


def test_a_half_shared_range_lists_what_was_skipped(memory: mmap.mmap) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    region = Region(memory)
    middle = region.address + 4 * PAGE
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    assert libc.mmap(middle, 2 * PAGE, 3, flags, -1, 0) == middle
    with region.merge() as undo:
        assert undo.nbytes == 6 * PAGE
        assert [(s.code, s.address, s.nbytes) for s in undo.skipped] == [
            ("shared", middle, 2 * PAGE)
        ]
        assert marks(region) == "MMMM--MM"
    assert marks(region) == "--------"
    del region


def test_a_refusal_in_the_middle_changes_nothing() -> None:
    """EAGAIN: vm.max_map_count is reached while a list is being marked."""

    def worker() -> None:
        import mmap

        import pyksm
        from pyksm.verbs import merge

        with open("/proc/sys/vm/max_map_count") as file:
            limit = int(file.read())
        memory = mmap.mmap(-1, 2 * limit * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = memoryview(memory)
        pages = [pyksm.Region(view[i * 4096 : (i + 1) * 4096]) for i in range(0, 2 * limit, 2)]
        try:
            merge(pages)
        except OSError as error:
            say("refused", error.errno)  # noqa: F821
        with open("/proc/self/smaps") as smaps:
            marked = sum("VmFlags" in line and " mg" in line for line in smaps)
        say("marked", marked)  # noqa: F821

    with spawn(worker) as child:
        child.expect("refused 11", timeout=110)
        child.expect("marked 0", timeout=60)


# ---- what is merged ----


def test_stats_before_and_after_merging(ksmd: Ksmd) -> None:
    half = os.urandom(1 << 20)
    memory = mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = half + half
    region = Region(memory)
    stats = region.stats()
    assert (stats.merged_bytes, stats.saved_bytes, stats.mergeable_bytes) == (0, 0, 0)
    with region.merge():
        wait_until(lambda: region.stats().merged_bytes == 2 << 20)
        stats = region.stats()
        assert stats.exact
        assert stats.saved_bytes == (1 << 20) - 64 * 512
        assert stats.merged_bytes == smaps_kb(region.address, "KSM") * 1024
    assert region.stats().merged_bytes == 0
    assert memory[:] == half + half


def test_one_write_is_seen_at_once_with_ksmd_stopped(ksmd: Ksmd) -> None:
    half = os.urandom(1 << 20)
    memory = mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = half + half
    region = Region(memory)
    with region.merge():
        wait_until(lambda: region.stats().merged_bytes == 2 << 20)
        ksmd.stop()
        memory[0] ^= 1
        stats = region.stats()
        assert stats.merged_bytes == (2 << 20) - PAGE  # its partner is a KSM page still, alone
        assert stats.saved_bytes == (1 << 20) - PAGE - 64 * 512


def test_zero_pages_are_counted_apart(ksmd: Ksmd) -> None:
    ksmd.set(use_zero_pages=1)
    memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[:] = bytes(1 << 20)
    region = Region(memory)
    with region.merge():
        wait_until(lambda: (region.stats().zero_bytes or 0) >= 1 << 20)
        stats = region.stats()
        assert stats.zero_bytes == stats.merged_bytes == 1 << 20
        assert stats.saved_bytes == (1 << 20) - 64 * 256


def test_stats_without_privilege_agree(ksmd: Ksmd) -> None:
    """The unprivileged way, smaps' PSS, against the page frames of the same process."""

    def worker() -> None:
        import ctypes
        import mmap
        import os

        import pyksm

        # capset(2), version 3, nothing left: then PFNs read as 0, whatever the uid
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
        memory = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = os.urandom(2 << 20) * 2
        region = pyksm.Region(memory)
        region.merge()
        say("ready", os.getpid())  # noqa: F821
        for _ in commands():  # noqa: F821
            stats = region.stats()
            say(stats.exact, stats.merged_bytes, stats.saved_bytes)  # noqa: F821

    with spawn(worker) as child:
        pid = int(child.reply().split()[1])
        wait_until(lambda: pyksm.Process(pid).stats().merged_bytes == 4 << 20)
        exact, merged, saved = child.ask("stats").split()
        assert exact == "False"
        assert int(merged) == 4 << 20
        assert abs(int(saved) - ((2 << 20) - 64 * 1024)) <= 2 * PAGE


# ---- forks ----


def test_a_child_keeps_the_marks_and_undoes_nothing(memory: mmap.mmap) -> None:
    region = Region(memory)
    with region.merge() as undo:
        child = os.fork()
        if child == 0:
            undo.undo()
            ok = marks(region) == "MMMMMMMM"
            with region.unmerge():
                ok = ok and marks(region) == "--------"
            os._exit(0 if ok and marks(region) == "MMMMMMMM" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert marks(region) == "MMMMMMMM"
    assert marks(region) == "--------"
    del region


def test_a_fork_while_another_thread_holds_the_ledger(memory: mmap.mmap) -> None:
    from pyksm.marks import ledger

    region = Region(memory)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with ledger._locked():
            inside.set()
            leave.wait(20)

    region.merge().undo()  # so that the ledger watches forks
    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(5)
    child = os.fork()
    if child == 0:
        with region.merge():
            os._exit(0)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del region


def test_live_marks_do_not_disturb_the_end_of_python() -> None:
    code = """
import mmap, pyksm, numpy as np
memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
array = np.ones(1 << 20)
undo = pyksm.Region(memory).merge()
pyksm.Region(array).merge()
pyksm.Process().merge()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_unmerge_named_as_a_verb(memory: mmap.mmap) -> None:
    memory.madvise(mmap.MADV_MERGEABLE)
    with unmerge(memory):
        assert "mg" not in vm_flags(Region(memory).address)
    assert "mg" in vm_flags(Region(memory).address)
