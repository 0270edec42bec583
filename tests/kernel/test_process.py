"""Processes on the real kernel: the whole-process switch, and reading others."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import Ksmd, mappings, rollup_kb, spawn, vm_flags, wait_until

import pyksm
from pyksm import NotSupported, Process, Region

PAGE = mmap.PAGESIZE


def private(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = os.urandom(nbytes)
    return memory


@pytest.fixture
def marked() -> Iterator[Region]:
    yield Region(private(8 * PAGE))
    gc.collect()


def is_marked(region: Region) -> bool:
    return "mg" in vm_flags(region.address)


def share_marked(pid: int | str = "self") -> float:
    anonymous = [m for m in mappings(pid) if "ac" in m.flags and m.kb("Anonymous")]
    return sum("mg" in m.flags for m in anonymous) / len(anonymous)


# ---- the switch ----


def test_merge_covers_all_memory_now_and_later(marked: Region) -> None:
    with Process().merge():
        assert is_marked(marked)
        assert share_marked() == 1
        later = private(PAGE)
        assert is_marked(Region(later))
        assert Process().stats().ksm_merge_any is True
    assert not is_marked(marked)
    assert Process().stats().ksm_merge_any is False


def test_marks_that_stood_before_come_back(marked: Region) -> None:
    """PR_SET_MEMORY_MERGE 0 wipes them: pyksm's own, and those of others."""
    foreign = private(4 * PAGE)
    foreign.madvise(mmap.MADV_MERGEABLE)
    undo = marked.merge()
    with Process().merge():
        pass
    assert is_marked(marked)
    assert is_marked(Region(foreign))
    undo.undo()
    assert not is_marked(marked)


def test_buffers_and_arena_stay_marked() -> None:
    buffer = pyksm.Buffer(1 << 20)
    with pyksm.allocator():
        array = np.ones(1 << 18)
    with Process().merge():
        pass
    assert is_marked(Region(buffer))
    assert is_marked(Region(array))


def test_an_opt_out_holds_through_the_switch(marked: Region) -> None:
    """The kernel forgets it at SET 1 and at every off-on cycle; pyksm does not."""
    opted_out = marked.unmerge()
    for _ in range(2):
        with Process().merge():
            assert not is_marked(marked)
            assert share_marked() > 0.5
    with Process().merge():
        opted_out.undo()
        assert is_marked(marked)
    assert not is_marked(marked)


def test_an_opt_out_made_while_merged_is_undone_to_merged(marked: Region) -> None:
    with Process().merge():
        with marked.unmerge():
            assert not is_marked(marked)
        assert is_marked(marked)
    assert not is_marked(marked)


def test_a_region_merged_while_the_process_is_outlives_the_switch(marked: Region) -> None:
    with Process().merge():
        undo = marked.merge()
    assert is_marked(marked)
    undo.undo()
    assert not is_marked(marked)


def test_switches_nest_and_undo_in_any_order(marked: Region) -> None:
    first = Process().merge()
    second = Process().merge()
    first.undo()
    assert is_marked(marked)
    with Process().unmerge():
        assert not is_marked(marked)
    assert is_marked(marked)
    second.undo()
    assert not is_marked(marked)


def test_a_kept_switch_is_what_a_later_one_goes_back_to() -> None:
    def worker() -> None:
        import pyksm

        def merged() -> bool | None:
            return pyksm.Process().stats().ksm_merge_any

        pyksm.Process().merge()  # thrown away: from now on
        with pyksm.Process().unmerge():
            say(merged())  # noqa: F821
        say(merged())  # noqa: F821

    with spawn(worker) as child:
        child.expect("False")
        child.expect("True")


def test_a_process_already_merged_stays_so() -> None:
    def worker() -> None:
        import ctypes

        import pyksm

        libc = ctypes.CDLL(None)
        zero = ctypes.c_ulong(0)
        assert libc.prctl(67, ctypes.c_ulong(1), zero, zero, zero) == 0
        with pyksm.Process().merge():
            pass
        say(libc.prctl(68, zero, zero, zero, zero))  # noqa: F821

    with spawn(worker) as child:
        child.expect("1")


def test_switching_off_lets_others_map_memory(ksmd: Ksmd) -> None:
    """Un-sharing goes in steps; the marks of 64 MiB are gone and the memory is private again."""
    memory = private(32 << 20)
    twin = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    twin[:] = memory[:]
    undo = Process().merge()
    wait_until(lambda: rollup_kb("KSM") >= 64 << 10, 60)
    undo.undo()
    assert rollup_kb("KSM") == 0
    assert twin[:] == memory[:]


@pytest.mark.parametrize("align_heap", [False, True])
def test_align_heap_puts_the_blocks_of_an_aged_process_at_one_offset(align_heap: bool) -> None:
    def worker(align_heap: bool) -> None:
        import numpy as np

        import pyksm

        pyksm.Process().merge(align_heap=align_heap)
        np.ones(30 << 20, dtype="u1")  # freed: glibc's dynamic threshold is 30 MiB from now on
        junk = [np.ones(70_000 + 997 * i, dtype="u1") for i in range(200)]
        del junk[::2]  # holes in the heap
        arrays = [np.ones(100_000 + 1000 * i, dtype="u1") for i in range(40)]
        say(sum(array.ctypes.data % 4096 == 16 for array in arrays))  # noqa: F821

    with spawn(worker, align_heap) as child:
        at_one_offset = int(child.reply())
    assert at_one_offset >= 38 if align_heap else at_one_offset < 10


# ---- forks ----


def test_a_forked_child_undoes_nothing_and_switches_itself(marked: Region) -> None:
    with Process().merge() as undo:
        child = os.fork()
        if child == 0:
            undo.undo()
            ok = is_marked(marked)
            with Process().unmerge():
                ok = ok and not is_marked(marked)
            os._exit(0 if ok else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert is_marked(marked)


# ---- other processes, and no processes ----


def test_stats_of_another_process(ksmd: Ksmd) -> None:
    def worker() -> None:
        import mmap
        import os

        import pyksm

        memory = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = os.urandom(2 << 20) * 2
        with pyksm.Region(memory).merge():
            say("ready")  # noqa: F821
            for _ in commands():  # noqa: F821
                pass

    with spawn(worker) as child:
        child.expect("ready")
        process = Process(child.pid)
        wait_until(lambda: process.stats().merged_bytes == 4 << 20)
        stats = process.stats()
        assert stats.saved_bytes == (2 << 20) - (stats.overhead_bytes or 0)
        assert stats.pid == child.pid
        assert stats.ksm_merging_pages == 1024
        for verb in (process.merge, process.unmerge):
            with pytest.raises(NotSupported, match="another process"):
                verb()
        child.kill()
        with pytest.raises(ProcessLookupError, match="there is no process"):
            process.stats()


def test_a_reused_pid_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "77"
    folder.mkdir()
    stat = "77 (a b) c) S 1 1 1 0 -1 0 " + "0 " * 12 + "{started} " + "0 " * 20
    (folder / "stat").write_text(stat.format(started=100))
    (folder / "ksm_stat").write_text("ksm_rmap_items 0\nksm_merge_any: no\n")
    (folder / "smaps_rollup").write_text("0-1 ---p 0 00:00 0 [rollup]\nRss: 4 kB\nKSM: 0 kB\n")
    (folder / "smaps").write_text("")
    process = Process(77, proc=tmp_path)
    assert process.stats().rss_bytes == 4096
    (folder / "stat").write_text(stat.format(started=200))
    with pytest.raises(ProcessLookupError):
        process.stats()


def test_what_an_old_kernel_does_not_tell_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "77"
    folder.mkdir()
    (folder / "stat").write_text("77 (x) S 1 1 1 0 -1 0 " + "0 " * 12 + "100 " + "0 " * 20)
    (folder / "smaps_rollup").write_text("0-1 ---p 0 00:00 0 [rollup]\nRss: 4 kB\n")
    (folder / "smaps").write_text("")
    (folder / "pagemap").write_text("")
    stats = Process(77, proc=tmp_path).stats()
    assert stats.merged_bytes is None
    assert stats.zero_bytes is None
    assert stats.ksm_merge_any is None
    assert stats.overhead_bytes is None
    assert "-" in stats._repr_html_()
    assert stats.to_dict()["pid"] == 77


def test_another_users_process_is_refused_in_words() -> None:
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            Process(os.getppid()).stats()
        except PermissionError as error:
            os._exit(0 if "may not be read" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("pid", "error", "words"),
    [
        (0, ValueError, "no pid"),
        (-1, ValueError, "no pid"),
        (10**12, ValueError, "no pid"),
        (1.0, TypeError, "not float"),
        ("1", TypeError, "not str"),
        (True, TypeError, "bool"),
        (1 << 22, ProcessLookupError, "no process"),
        (2, NotSupported, "kernel thread"),
    ],
)
def test_what_is_no_process(pid: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Process(pid)  # type: ignore[arg-type]


def test_a_zombie_is_no_process() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    wait_until(lambda: ") Z " in Path(f"/proc/{child}/stat").read_text())
    with pytest.raises(ProcessLookupError, match="zombie"):
        Process(child)
    os.waitpid(child, 0)


# ---- signals ----


def test_a_handler_without_sa_restart_does_not_cut_an_unmerge_short(ksmd: Ksmd) -> None:
    """MADV_UNMERGEABLE returns EINTR with part of the range done."""
    memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = os.urandom(32 << 20) * 2
    region = Region(memory)
    undo = region.merge()
    wait_until(lambda: region.stats().merged_bytes == 64 << 20, 60)
    ticks: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        undo.undo()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert region.stats().merged_bytes == 0
    assert not is_marked(region)
    assert ticks


def test_threads_keep_running_while_memory_is_unshared(ksmd: Ksmd) -> None:
    memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = os.urandom(32 << 20) * 2
    region = Region(memory)
    undo = region.merge()
    wait_until(lambda: region.stats().merged_bytes == 64 << 20, 60)
    turns = 0
    done = threading.Event()

    def spin() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1

    thread = threading.Thread(target=spin)
    thread.start()
    undo.undo()
    counted = turns
    done.set()
    thread.join()
    assert counted > 100


def test_import_changes_nothing() -> None:
    code = """
import sys, pyksm
assert "numpy" not in sys.modules
assert not any("VmFlags" in line and " mg" in line for line in open("/proc/self/smaps"))
assert pyksm.Process().stats().ksm_merge_any in (False, None)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
