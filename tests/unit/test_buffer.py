"""Buffer as memory: sizes, the buffer protocol, lifetime. Needs no KSM (missing_ok)."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import mmap
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import mappings, rollup_kb, spawn

from pyksm import _buffer

Buffer = partial(_buffer.Buffer, missing_ok=True)
PAGE = mmap.PAGESIZE
MIB = 1 << 20


def is_mapped(address: int) -> bool:
    return any(m.start <= address < m.end for m in mappings())


@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, 100_000, 2 * MIB, 5 * MIB + 1])
def test_it_is_page_aligned_zero_filled_and_of_the_size_asked_for(nbytes):
    buffer = Buffer(nbytes)
    assert buffer.nbytes == len(buffer) == nbytes
    assert buffer.address % (2 * MIB if nbytes >= 2 * MIB else PAGE) == 0
    assert bytes(buffer) == bytes(nbytes)
    memoryview(buffer)[nbytes - 1] = 7
    whole = -nbytes % PAGE + nbytes
    assert is_mapped(buffer.address + whole - 1)
    assert ctypes.string_at(buffer.address + nbytes, whole - nbytes) == bytes(whole - nbytes)


def test_huge_alignment_gives_back_what_it_took_too_much():
    before = sum(m.end - m.start for m in mappings())
    buffers = [Buffer(2 * MIB + PAGE) for _ in range(16)]
    taken = sum(m.end - m.start for m in mappings()) - before
    assert {b.address % (2 * MIB) for b in buffers} == {0}
    assert taken < 16 * (2 * MIB + PAGE) + 2 * MIB


def test_it_is_huge_aligned_where_the_kernel_does_not_align_by_itself(tmp_path):
    """Linux before 6.7, played by a library that shifts every large mapping by a page."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    (tmp_path / "shift.c").write_text("""
        #define _GNU_SOURCE
        #include <sys/mman.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
            int shift = fd < 0 && at == 0 && n >= 2 << 20;
            char *got = (char *)syscall(SYS_mmap, at, n + 8192 * shift, prot, flags, fd, offset);
            if (!shift || got == MAP_FAILED)
                return got;
            munmap(got, 4096);
            munmap(got + 4096 + n, 4096);  /* or the next one would lie as the first does */
            return got + 4096;
        }
        void *mmap64(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
            return mmap(at, n, prot, flags, fd, offset);
        }
    """)
    library = tmp_path / "shift.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "shift.c"], check=True)

    def worker():
        from support import mappings

        from pyksm._buffer import Buffer

        for nbytes in (2 << 20, (5 << 20) + 1):
            whole = -nbytes % 4096 + nbytes
            before = sum(m.end - m.start for m in mappings())
            buffers = [Buffer(nbytes, missing_ok=True) for _ in range(8)]
            for buffer in buffers:
                memoryview(buffer)[nbytes - 1] = 1
            taken = sum(m.end - m.start for m in mappings()) - before - 8 * whole
            say({b.address % (2 << 20) for b in buffers}, taken < 4 << 20)  # noqa: F821

    with spawn(worker, env={"LD_PRELOAD": str(library)}) as child:
        child.expect("{0} True")
        child.expect("{0} True")


@pytest.mark.parametrize("size", [1.0, "1", None, True, False, np.float64(1), b"1", 2j])
def test_what_is_no_size_is_a_type_error(size):
    with pytest.raises(TypeError, match="nbytes must be"):
        Buffer(size)


@pytest.mark.parametrize("size", [0, -1, -(1 << 70), sys.maxsize, 1 << 64, 1 << 80])
def test_a_size_that_cannot_be_is_a_value_error(size):
    with pytest.raises(ValueError, match=str(size)):
        Buffer(size)


def test_anything_with_index_is_a_size():
    assert len(Buffer(np.int64(5000))) == 5000


def test_no_memory_names_the_size():
    with pytest.raises(MemoryError, match=str(1 << 60)):
        Buffer(1 << 60)
    assert (0, 1 << 60) not in _buffer.live()


def test_it_is_a_writable_buffer_of_bytes():
    buffer = Buffer(8000)
    view = memoryview(buffer)
    assert (view.format, view.itemsize, view.readonly, view.nbytes) == ("B", 1, False, 8000)
    view.cast("d")[0] = 1.5
    assert np.frombuffer(buffer)[0] == 1.5
    assert (ctypes.c_double * 1000).from_buffer(buffer)[0] == 1.5
    assert io.BytesIO(b"abc").readinto(buffer) == 3
    assert bytes(buffer)[:4] == b"abc\0"


def test_readonly_refuses_writes_and_shows_the_same_memory():
    buffer = Buffer(100)
    view = buffer.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    memoryview(buffer)[0] = 9
    assert view[0] == 9


def test_close_refuses_while_exported_and_then_unmaps():
    buffer = Buffer(PAGE)
    address = buffer.address
    views = [memoryview(buffer), np.frombuffer(buffer, "u1"), ctypes.c_char.from_buffer(buffer)]
    with pytest.raises(BufferError, match="3 live view"):
        buffer.close()
    assert not buffer.closed
    assert is_mapped(address)
    del views
    buffer.close()
    buffer.close()
    assert buffer.closed
    assert not is_mapped(address)


def test_a_closed_buffer_says_so():
    buffer = Buffer(PAGE)
    buffer.close()
    for use in (lambda: buffer.address, lambda: memoryview(buffer), lambda: buffer.readonly,
                buffer.keep_small, buffer.__enter__):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            use()
    assert "closed" in repr(buffer)
    assert buffer.nbytes == PAGE


def test_with_closes_and_refuses_with_live_views():
    with Buffer(PAGE) as buffer:
        pass
    assert buffer.closed
    with pytest.raises(BufferError), Buffer(PAGE) as buffer:
        view = memoryview(buffer)
    del view


def test_with_never_hides_the_exception_of_the_body():
    with pytest.raises(ZeroDivisionError) as caught, Buffer(PAGE) as buffer:  # noqa: PT012
        view = memoryview(buffer)
        raise ZeroDivisionError
    assert "not closed" in caught.value.__notes__[0]
    del view


def test_the_last_view_frees_it():
    buffer = Buffer(PAGE)
    address, gone = buffer.address, weakref.ref(buffer)
    array = np.frombuffer(buffer, "u1")[10:].reshape(-1, 2)
    del buffer
    array[:] = 5
    assert gone() is not None
    del array
    assert gone() is None
    assert not is_mapped(address)


def test_a_cycle_through_a_subclass_is_collected():
    class Holder(_buffer.Buffer):
        pass

    holder = Holder(PAGE, missing_ok=True)
    holder.me = holder
    holder.view = memoryview(holder)
    address, gone = holder.address, weakref.ref(holder)
    del holder
    gc.collect()
    assert gone() is None
    assert not is_mapped(address)


def test_thousands_of_them_leave_nothing_behind():
    def use() -> None:
        for _ in range(3000):
            with Buffer(3 * PAGE) as buffer, memoryview(buffer) as view:
                view[0] = 1

    def state() -> tuple[int, int, int]:
        gc.collect()
        return len(mappings()), rollup_kb("Anonymous"), len(os.listdir("/proc/self/fd"))

    use()
    before = state()
    use()
    after = state()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 512
    assert after[2] == before[2]


def test_a_failed_creation_leaves_nothing_behind():
    before = _buffer.live()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, hard))
    try:
        with pytest.raises(MemoryError, match="cannot map"):
            Buffer(1 << 34)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert _buffer.live() == before


def test_at_max_map_count_memory_is_given_back_all_the_same():
    def worker():
        import mmap
        import os
        from ctypes import string_at
        from pathlib import Path

        from pyksm._buffer import Buffer

        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        buffers = {b.address: b for b in (Buffer(65536, missing_ok=True) for _ in range(50))}
        middle = next(b for a, b in buffers.items() if {a - 65536, a + 65536} <= buffers.keys())
        memoryview(middle)[0] = 1
        address = middle.address
        others = []
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            for i in range(limit):
                prot = mmap.PROT_READ if i % 2 else mmap.PROT_READ | mmap.PROT_WRITE
                others.append(mmap.mmap(-1, 4096, flags=flags, prot=prot))
        except OSError:
            pass
        try:
            middle.close()
            say("closed")  # noqa: F821
        except MemoryError as error:
            freed = string_at(address, 1) == b"\0"
            say("vm.max_map_count" in str(error), middle.closed, freed)  # noqa: F821
        os._exit(0)

    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 200_000:
        pytest.skip(f"vm.max_map_count={limit} takes too long to reach")
    with spawn(worker) as child:
        assert child.reply() == "True True True"


def test_a_child_has_its_own_copy():
    buffer = Buffer(PAGE)
    memoryview(buffer)[0] = 1
    child = os.fork()
    if not child:
        same = memoryview(buffer)[0] == 1
        memoryview(buffer)[0] = 2
        buffer.close()
        os._exit(0 if same and buffer.closed else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert memoryview(buffer)[0] == 1


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_does_not_pickle(way):
    with pytest.raises(TypeError, match=r"pyksm\.Buffer"):
        way(Buffer(PAGE))


def test_live_lists_marked_buffers_until_they_go():
    kept, closed, dropped = Buffer(PAGE + 1), Buffer(PAGE), Buffer(PAGE)
    if not kept.mergeable:
        assert _buffer.live() == []
        return
    entries = [(b.address, -b.nbytes % PAGE + b.nbytes) for b in (kept, closed, dropped)]
    assert [entry for entry in _buffer.live() if entry in entries] == entries
    closed.close()
    del dropped
    assert [entry for entry in _buffer.live() if entry in entries] == entries[:1]


def test_threads_make_and_drop_them_at_once():
    errors = []

    def work() -> None:
        try:
            for n in range(500):
                with Buffer(PAGE * (n % 5 + 1)) as buffer:
                    assert bytes(buffer)[:1] == b"\0"
                    _buffer.live()
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    before = _buffer.live()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert _buffer.live() == before


def test_repr_tells_size_and_address():
    buffer = Buffer(10)
    assert f"10 bytes at {buffer.address:#x}" in repr(buffer)
    assert bool(buffer)
