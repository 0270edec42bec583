"""allocator(): the handler and its arena, as far as no ksmd is needed.

The cases follow numpy's own ``numpy/_core/tests/test_mem_policy.py``. What wraps numpy's default
handler, forks or ends a process runs in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import gc
import importlib
import random
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy._core.multiarray import get_handler_name
from support import capabilities, kernel_tests, rollup_kb, vm_flags

import pyksm
from pyksm import _numpy, _sys
from pyksm.allocating import allocator

room = importlib.import_module("pyksm.allocating")
PAGE = _sys.PAGE_SIZE
KIB, MIB = 1 << 10, 1 << 20
SIZES = [1, 100, 4096, 65535, 65536, 65537, 200 * KIB, MIB, 5 * MIB, 8 * MIB, 8 * MIB + 1, 33 * MIB]
"""Below the threshold, runs of a slab, both sides of the largest run, mappings of their own."""


@pytest.fixture
def ksm() -> None:
    """Ask for a kernel that takes the mark; nothing of the host is changed, so no lock."""
    if reason := capabilities()["ksm"]:
        if kernel_tests() == "require":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture
def handler_as_it_was(ksm: None) -> Iterator[None]:
    before = _numpy.current()
    yield
    assert _numpy.current() is before
    assert get_handler_name() == "default_allocator"


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def in_arena(array: np.ndarray) -> bool:
    start = address(array)
    return any(base <= start < base + nbytes for base, nbytes in _numpy.slabs())


def run_python(source: str, *options: str, timeout: float = 60) -> str:
    """Run Python text in a fresh process with warnings as errors; return what it printed."""
    src = str(Path(pyksm.__file__).parents[1])
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-X",
            "faulthandler",
            *options,
            "-c",
            textwrap.dedent(source),
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={"PYTHONPATH": src},
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stdout}{done.stderr}"
    assert not done.stderr, done.stderr
    return done.stdout.strip()


# --- the door ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [65536.0, True, False, "65536", None, b"1", [1], np.float64(4096)]
)
def test_min_bytes_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="min_bytes must be"):
        allocator(value)  # type: ignore[arg-type]
    assert get_handler_name() == "default_allocator"


@pytest.mark.parametrize("value", [0, -1, -(2**70), PAGE - 1])
def test_min_bytes_below_a_page_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"at least the page size, {PAGE}"):
        allocator(value)
    assert get_handler_name() == "default_allocator"


@pytest.mark.parametrize("value", [2**63, 2**64 + 65536, 2**200])
def test_min_bytes_beyond_the_address_space_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="beyond the address space"):
        allocator(value)
    assert get_handler_name() == "default_allocator"


def test_everywhere_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="everywhere must be"):
        allocator(everywhere=1)  # type: ignore[arg-type]


def test_min_bytes_takes_whole_numbers_of_other_types(handler_as_it_was: None) -> None:
    with allocator(np.int64(PAGE)):
        assert in_arena(np.empty(PAGE, "u1"))


def test_without_ksm_in_the_kernel_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "madvise")

    room._check_kernel.cache_clear()
    monkeypatch.setattr(_sys, "madvise", refuse)
    with pytest.raises(pyksm.NotSupported, match="no KSM") as caught:
        allocator()
    assert caught.value.errno == errno.EINVAL
    assert "CONFIG_KSM" in caught.value.hint
    assert get_handler_name() == "default_allocator"
    monkeypatch.undo()


def test_a_mark_that_does_not_take_is_noticed(ksm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    room._check_kernel.cache_clear()
    monkeypatch.setattr(room, "read_mappings", lambda *_: iter(()))
    with pytest.raises(pyksm.NotSupported, match="did not mark it"):
        allocator()
    assert get_handler_name() == "default_allocator"
    monkeypatch.undo()
    with allocator():
        assert get_handler_name() == "pyksm"


def test_importing_it_loads_no_numpy() -> None:
    assert run_python("import sys, pyksm.allocating; print('numpy' in sys.modules)") == "False"


# --- the memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [65536, 65537, MIB, 8 * MIB, 8 * MIB + 1, 40 * MIB])
def test_large_arrays_are_page_aligned_and_marked(handler_as_it_was: None, nbytes: int) -> None:
    with allocator():
        made = [np.empty(nbytes, "u1"), np.zeros(nbytes, "u1"), np.ones(nbytes, "u1")]
    for array in made:
        assert address(array) % PAGE == 0
        assert in_arena(array)
        assert "mg" in vm_flags(address(array))
        assert "mg" in vm_flags(address(array) + nbytes - 1)
        assert get_handler_name(array) == "pyksm"


@pytest.mark.parametrize("nbytes", [0, 1, 16, 1000, 4096, 65535])
def test_small_arrays_stay_with_the_c_library(handler_as_it_was: None, nbytes: int) -> None:
    before = _numpy.counters()["live_arrays"]
    with allocator():
        made = [np.empty(nbytes, "u1"), np.zeros(nbytes, "u1")]
        assert _numpy.counters()["live_arrays"] == before
    assert not any(map(in_arena, made))
    assert all(address(array) % 16 == 0 for array in made)
    assert not made[1].any()


def test_many_small_arrays_some_of_them_page_aligned(handler_as_it_was: None) -> None:
    # One block in 256 of malloc's starts a page by chance; freeing it must find it is not ours.
    with allocator():
        made = [np.full(nbytes, 7, "u1") for nbytes in range(1000, 8000) for _ in range(2)]
        assert any(address(array) % PAGE == 0 for array in made)
    assert not any(in_arena(array) for array in made if address(array) % PAGE == 0)
    made.clear()


def test_min_bytes_is_kept_by_each_allocator(handler_as_it_was: None) -> None:
    with allocator(MIB):
        assert not in_arena(np.empty(MIB - 1, "u1"))
        assert in_arena(np.empty(MIB, "u1"))
        with allocator(PAGE):
            assert in_arena(np.empty(PAGE, "u1"))
            assert not in_arena(np.empty(PAGE - 1, "u1"))
        assert not in_arena(np.empty(MIB - 1, "u1"))


@pytest.mark.parametrize("nbytes", [4096, 65536, 100 * KIB, MIB, 8 * MIB, 9 * MIB, 64 * MIB])
def test_zeros_are_zero_on_memory_that_was_used(handler_as_it_was: None, nbytes: int) -> None:
    with allocator(PAGE):
        used = {address(np.full(nbytes, 0xFF, "u1")) for _ in range(3)}
        for _ in range(3):
            array = np.zeros(nbytes, "u1")
            used.discard(address(array))
            assert not array.any()
            array[:] = 0xFF
        del array
        assert not np.zeros(nbytes // 2, "u1").any()
    assert not used, "the test never met used memory"


def test_arrays_outlive_the_block(handler_as_it_was: None) -> None:
    with allocator():
        made = [np.full(nbytes, 9, "u1") for nbytes in SIZES]
    gc.collect()
    more = [np.full(nbytes, 1, "u1") for nbytes in SIZES]
    assert all((array == 9).all() for array in made)
    del more, made


def test_objects_and_structures(handler_as_it_was: None) -> None:
    with allocator():
        objects = np.array([object() for _ in range(20000)], dtype=object)
        empty = np.empty(20000, dtype=object)
        records = np.zeros(20000, dtype=[("a", "f8"), ("b", "S3"), ("c", object)])
    assert in_arena(objects)
    assert empty[5] is None
    assert records["c"][7] == 0
    del objects, empty, records
    gc.collect()


def test_the_policy_goes_with_the_data_not_with_the_view(handler_as_it_was: None) -> None:
    class Weights(np.ndarray):
        pass

    with allocator():
        view = np.arange(MIB).view(Weights).reshape(2, -1)
    assert get_handler_name(view) is None
    assert isinstance(view, Weights)
    owner = view.base.base
    assert get_handler_name(owner) == "pyksm"
    copy = view.copy()
    assert get_handler_name(copy) == "default_allocator"
    del owner
    assert view[1, -1] == MIB - 1


@pytest.mark.parametrize("after", SIZES)
@pytest.mark.parametrize("before", SIZES)
def test_resize_keeps_what_fits(handler_as_it_was: None, before: int, after: int) -> None:
    live = _numpy.counters()["live_arrays"]
    with allocator():
        array = np.arange(before, dtype="u4").astype("u1")
        expected = array[: min(before, after)].tobytes()
        array.resize(after, refcheck=False)
        assert array.nbytes == after
        assert array[: min(before, after)].tobytes() == expected
        assert not array[before:].any()
        array[:] = 1
        assert in_arena(array) == (after >= 65536)
    del array
    assert _numpy.counters()["live_arrays"] == live


@pytest.mark.parametrize("first", [4096, 65536, 9 * MIB])
def test_resize_outside_the_block_and_of_arrays_from_before(
    handler_as_it_was: None, first: int
) -> None:
    older = np.full(first, 3, "u1")
    with allocator():
        inside = np.full(first, 5, "u1")
        older.resize(40 * MIB, refcheck=False)  # numpy keeps the handler an array was made with
    inside.resize(40 * MIB, refcheck=False)
    assert in_arena(inside)
    assert (inside[:first] == 5).all()
    assert not in_arena(older)
    assert (older[:first] == 3).all()


def test_resize_to_and_from_nothing(handler_as_it_was: None) -> None:
    with allocator():
        array = np.ones(MIB, "u1")
        array.resize(0, refcheck=False)
        assert array.size == 0
        array.resize(MIB, refcheck=False)
        assert not array.any()


def test_growing_by_steps_moves_into_the_free_run_behind(handler_as_it_was: None) -> None:
    with allocator():
        array = np.full(65536, 1, "u1")
        for nbytes in range(131072, 24 * MIB, MIB):
            grown = array.size
            array.resize(nbytes, refcheck=False)
            assert not array[grown:].any()
            array[:] = 1
        for nbytes in range(22 * MIB, 65536, -3 * MIB + 77):
            array.resize(nbytes, refcheck=False)
            assert array.all()


def test_what_cannot_be_had_is_a_memory_error(handler_as_it_was: None) -> None:
    with allocator():
        for nbytes in (1 << 46, 1 << 50, (1 << 63) - 1):
            with pytest.raises(MemoryError):
                np.empty(nbytes, "u1")
            with pytest.raises(MemoryError):
                np.zeros(nbytes, "u1")
        array = np.ones(MIB, "u1")
        with pytest.raises(MemoryError):
            array.resize(1 << 50, refcheck=False)
        assert array.all()
        del array
    assert np.ones(MIB).all()


def test_at_the_address_space_limit_it_fails_and_recovers() -> None:
    run_python("""
        import resource, numpy as np
        from pyksm.allocating import allocator
        with allocator():
            np.ones(1 << 20)
            with open("/proc/self/statm") as statm:
                used = int(statm.read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (used + (80 << 20),) * 2)
            kept = []
            try:
                while True:
                    kept.append(np.full(1 << 20, len(kept) % 250, "u1"))
            except MemoryError:
                pass
            assert len(kept) > 40, len(kept)
            assert all(a[0] == a[-1] == i % 250 for i, a in enumerate(kept))
            del kept[::2]
            kept += [np.full(1 << 20, 7, "u1") for _ in range(len(kept) // 2)]
    """)


def model(seed: int, steps: int, most: int) -> None:
    """Allocate, fill, resize, check and free at random, checking every byte."""
    dice = random.Random(seed)
    live: list[tuple[np.ndarray, int]] = []
    held = 0
    for step in range(steps):
        mark = step % 251 + 1
        if not live or (dice.random() < 0.55 and held < most):
            nbytes = int(2 ** dice.uniform(10, 24))
            zeroed = dice.random() < 0.4
            array = (np.zeros if zeroed else np.empty)(nbytes, "u1")
            assert not zeroed or not array.any()
        else:
            array, old = live.pop(dice.randrange(len(live)))
            held -= array.nbytes
            assert (array == old).all()
            if dice.random() < 0.6:
                del array
                continue
            kept = array.size
            array.resize(int(2 ** dice.uniform(10, 24)), refcheck=False)
            assert (array[:kept] == old).all()
        array[:] = mark
        live.append((array, mark))
        held += array.nbytes
        del array


def test_a_random_life(handler_as_it_was: None) -> None:
    before = _numpy.counters()
    with allocator(PAGE):
        model(seed=1, steps=1500, most=300 * MIB)
    after = _numpy.counters()
    assert after["live_arrays"] == before["live_arrays"]
    assert after["live_bytes"] == before["live_bytes"]


def test_random_lives_in_four_threads(handler_as_it_was: None) -> None:
    before = _numpy.counters()

    def worker(seed: int) -> None:
        with allocator(PAGE):
            model(seed, steps=300, most=60 * MIB)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(worker, seed) for seed in range(4)]:
            done.result()
    assert _numpy.counters()["live_bytes"] == before["live_bytes"]


# --- what is kept ------------------------------------------------------------------------------


def test_freed_memory_is_kept_within_its_bounds(handler_as_it_was: None) -> None:
    live = _numpy.counters()["live_bytes"]
    for nbytes, count in ((MIB, 700), (16 * MIB, 45)):
        with allocator():
            made = [np.ones(nbytes, "u1") for _ in range(count)]
            resident = rollup_kb("Rss")
            del made
            kept = _numpy.counters()["kept_bytes"]
            assert 128 * MIB < kept <= 256 * MIB + live // 8
            assert resident - rollup_kb("Rss") > 400 << 10
        assert _numpy.counters()["kept_bytes"] <= 32 * MIB + live // 8
        assert resident - rollup_kb("Rss") > 600 << 10


def test_every_second_one_freed_gives_memory_back(handler_as_it_was: None) -> None:
    with allocator():
        made = [np.ones(65536, "u1") for _ in range(12000)]
        resident = rollup_kb("Rss")
        del made[::2]  # 375 MiB
        live, kept = (_numpy.counters()[key] for key in ("live_bytes", "kept_bytes"))
        assert kept <= 256 * MIB + live // 8
        del made
    assert resident - rollup_kb("Rss") > 650 << 10


def test_kept_memory_is_used_again(handler_as_it_was: None) -> None:
    with allocator():
        for nbytes in (65536, MIB, 16 * MIB):
            first = address(np.ones(nbytes, "u1"))
            assert address(np.empty(nbytes, "u1")) == first


def test_handlers_do_not_leak(ksm: None) -> None:
    grown = run_python("""
        import pathlib
        from pyksm.allocating import allocator
        def resident():
            return int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        for _ in range(2000): allocator().undo()
        before = resident()
        for _ in range(100_000): allocator().undo()
        print(resident() - before)
    """)
    assert int(grown) * PAGE < 4 * MIB  # a handler is 176 bytes


def test_slabs_are_all_marked_and_hold_every_array(handler_as_it_was: None) -> None:
    with allocator():
        made = [np.ones(nbytes, "u1") for nbytes in (65536, MIB, 9 * MIB, 70 * MIB)]
    found = _numpy.slabs()
    assert len(found) == _numpy.counters()["mappings"]
    assert sum(nbytes for _, nbytes in found) == _numpy.counters()["mapped_bytes"]
    for base, nbytes in found:
        assert base % PAGE == 0
        assert "mg" in vm_flags(base)
        assert "mg" in vm_flags(base + nbytes - PAGE)
    assert all(map(in_arena, made))


# --- undoing -----------------------------------------------------------------------------------


def test_undo_once_and_for_all(handler_as_it_was: None) -> None:
    undo = allocator()
    assert get_handler_name() == "pyksm"
    undo.undo()
    assert get_handler_name() == "default_allocator"
    undo.undo()
    assert get_handler_name() == "default_allocator"


def test_undo_when_the_body_raises(handler_as_it_was: None) -> None:
    with pytest.raises(ZeroDivisionError) as caught, allocator():
        np.ones(MIB)[1 // 0]
    assert not hasattr(caught.value, "__notes__")


def test_nested_in_order(handler_as_it_was: None) -> None:
    with allocator():
        outer = _numpy.current()
        with allocator():
            assert _numpy.current() is not outer
        assert _numpy.current() is outer


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
)
def test_nested_out_of_order(handler_as_it_was: None, order: tuple[int, ...]) -> None:
    sizes = (65536, 131072, 262144)
    undos = [allocator(size) for size in sizes]
    standing = [0, 1, 2]
    for which in order:
        undos[which].undo()
        standing.remove(which)
        now = sizes[standing[-1]] if standing else None
        assert get_handler_name() == ("pyksm" if standing else "default_allocator")
        if now is not None:
            assert in_arena(np.empty(now, "u1"))
            assert not in_arena(np.empty(now - 1, "u1"))


def test_inside_a_foreign_handler_it_puts_that_one_back(handler_as_it_was: None) -> None:
    foreign = _numpy.handler(MIB)
    default = _numpy.set_current(foreign)
    try:
        with allocator():
            assert _numpy.current() is not foreign
        assert _numpy.current() is foreign
    finally:
        _numpy.set_current(default)


def test_under_a_foreign_handler_it_refuses_and_can_be_tried_again(
    handler_as_it_was: None,
) -> None:
    undo = allocator()
    ours = _numpy.set_current(_numpy.handler(MIB))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="put that one back first"):
            undo.undo()
    _numpy.set_current(ours)
    undo.undo()
    assert get_handler_name() == "default_allocator"


def test_another_thread_cannot_undo_it(handler_as_it_was: None) -> None:
    undo = allocator()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="another thread"):
        pool.submit(undo.undo).result()
    assert get_handler_name() == "pyksm"
    undo.undo()


def test_another_context_cannot_undo_it(handler_as_it_was: None) -> None:
    undo = allocator()
    with pytest.raises(RuntimeError, match="another thread or context"):
        contextvars.copy_context().run(undo.undo)
    assert get_handler_name() == "pyksm"
    undo.undo()


def test_asyncio_tasks_inherit_and_keep_to_themselves(handler_as_it_was: None) -> None:
    async def child(changed: asyncio.Event) -> None:
        assert in_arena(np.empty(MIB))
        with allocator(2 * MIB):
            changed.set()
            await asyncio.sleep(0)
            assert not in_arena(np.empty(MIB, "u1"))
        _numpy.set_current(default)

    async def sibling(changed: asyncio.Event) -> None:
        await changed.wait()
        assert in_arena(np.empty(MIB, "u1"))

    async def parent() -> None:
        changed = asyncio.Event()
        with allocator():
            await asyncio.gather(child(changed), sibling(changed))
            assert get_handler_name() == "pyksm"
        assert get_handler_name() == "default_allocator"

    default = _numpy.current()
    asyncio.run(parent())


# --- threads -----------------------------------------------------------------------------------


def test_a_new_thread_starts_with_numpys_default(handler_as_it_was: None) -> None:
    inherits = getattr(sys.flags, "thread_inherit_context", False)
    with allocator(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(get_handler_name).result() == (
            "pyksm" if inherits else "default_allocator"
        )


def test_a_pool_is_covered_by_its_initializer(handler_as_it_was: None) -> None:
    with ThreadPoolExecutor(2, initializer=allocator) as pool:
        for made in pool.map(np.ones, [MIB] * 4):
            assert in_arena(made)
    with ThreadPoolExecutor(1, initializer=allocator, initargs=(2 * MIB,)) as pool:
        assert not in_arena(pool.submit(np.empty, MIB, "u1").result())


def test_arrays_may_die_in_any_thread(handler_as_it_was: None) -> None:
    with allocator():
        made = [np.ones(nbytes, "u1") for nbytes in SIZES]
    live = _numpy.counters()["live_arrays"]
    thread = threading.Thread(target=made.clear)
    thread.start()
    thread.join()
    assert _numpy.counters()["live_arrays"] == live - sum(nbytes >= 65536 for nbytes in SIZES)


EVERYWHERE = """
    import queue, threading, numpy as np
    from concurrent.futures import ThreadPoolExecutor
    from numpy._core.multiarray import get_handler_name
    from pyksm import _numpy
    from pyksm.allocating import allocator
    MIB = 1 << 20
    def ours(array):
        at = array.__array_interface__["data"][0]
        return any(base <= at < base + nbytes for base, nbytes in _numpy.slabs())
"""


def run_everywhere(source: str) -> str:
    return run_python(textwrap.dedent(EVERYWHERE) + textwrap.dedent(source))


def test_everywhere_reaches_threads_that_exist(ksm: None) -> None:
    run_everywhere("""
        pool = ThreadPoolExecutor(1)
        assert not ours(pool.submit(np.ones, MIB).result())
        with allocator(everywhere=True):
            assert ours(np.ones(MIB))
            assert ours(pool.submit(np.ones, MIB).result())
            assert not ours(np.ones(100))
            with ThreadPoolExecutor(1) as late:
                assert ours(late.submit(np.zeros, MIB).result())
        assert not ours(np.ones(MIB))
        assert not ours(pool.submit(np.ones, MIB).result())
        pool.shutdown()
        assert get_handler_name() == "default_allocator"
    """)


def test_everywhere_frees_and_resizes_both_kinds_of_memory_for_ever(ksm: None) -> None:
    run_everywhere("""
        sizes = [0, 10, 1000, 4096, 65536, 200_000, MIB, 9 * MIB]
        for turn in range(3):
            ordinary = [np.full(n, 1, "u1") for n in sizes]
            with allocator(everywhere=True):
                merged = [np.full(n, 2, "u1") for n in sizes]
                for a, n in zip(ordinary, reversed(sizes)):
                    old = a.size
                    a.resize(n, refcheck=False)
                    assert (a[:old] == 1).all() and not a[old:].any()
                    assert ours(a) == (n >= 65536)
            assert [ours(a) for a in merged] == [n >= 65536 for n in sizes]
            for a, n in zip(merged, reversed(sizes)):
                old = a.size
                a.resize(n, refcheck=False)
                assert (a[:old] == 2).all() and not a[old:].any()
            del a, ordinary[::2], merged[::2]
        ordinary = merged = None
        assert _numpy.counters()["live_arrays"] == 0, _numpy.counters()
    """)


def test_everywhere_nests_in_any_order(ksm: None) -> None:
    run_everywhere("""
        a = allocator(4 * MIB, everywhere=True)
        b = allocator(MIB, everywhere=True)
        assert ours(np.empty(MIB, "u1"))
        a.undo()
        assert ours(np.empty(MIB, "u1"))
        with allocator(8 * MIB, everywhere=True):
            assert not ours(np.empty(MIB, "u1"))
            with allocator():
                assert ours(np.empty(MIB, "u1"))
        assert ours(np.empty(MIB, "u1"))
        b.undo()
        assert not ours(np.empty(64 * MIB, "u1"))
    """)


def test_everywhere_refuses_a_default_handler_it_does_not_know(
    ksm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_numpy, "wrap_default", lambda: False)
    with pytest.raises(pyksm.NotSupported, match="not the one numpy comes with"):
        allocator(everywhere=True)


# --- processes ---------------------------------------------------------------------------------


def test_a_forked_child_goes_on_with_its_own_copy(ksm: None) -> None:
    run_python("""
        import os, threading, numpy as np
        from numpy._core.multiarray import get_handler_name
        from pyksm import _numpy
        from pyksm.allocating import allocator
        undo = allocator()
        kept = [np.full(n, 3, "u1") for n in (65536, 1 << 20, 20 << 20)]
        pid = os.fork()
        if not pid:
            assert all((a == 3).all() for a in kept)
            undo.undo()  # not the child's change: it does nothing there
            assert get_handler_name() == "pyksm"
            for a in kept:
                a[:] = 4
            del kept[0], a
            more = [np.zeros(n, "u1") for n in (65536, 1 << 20, 20 << 20) for _ in range(20)]
            assert not any(a.any() for a in more)
            kept[0].resize(30 << 20, refcheck=False)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert all((a == 3).all() for a in kept)
        undo.undo()
        assert get_handler_name() == "default_allocator"
    """)


def test_fork_while_other_threads_allocate(ksm: None) -> None:
    run_python(
        """
        import os, threading, warnings, numpy as np
        from pyksm import _numpy
        from pyksm.allocating import allocator
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: the point here
        with allocator():
            many = [np.empty(9 << 20, "u1") for _ in range(1000)]  # never touched
        stop = threading.Event()
        def churn():
            allocator()
            while not stop.is_set():
                made = [np.ones(n, "u1") for n in (65536, 300_000, 10 << 20)]
                del made[::2]
        def walk():  # over all mappings, under the lock and without the GIL
            while not stop.is_set():
                _numpy.keep_small()
        threads = [threading.Thread(target=run) for run in (churn, churn, walk, walk)]
        for t in threads: t.start()
        try:
            for _ in range(60):
                pid = os.fork()
                if not pid:
                    with allocator():
                        for n in (65536, 300_000, 10 << 20):
                            assert not np.zeros(n, "u1").any()
                    os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0
        finally:
            stop.set()
            for t in threads: t.join()
        """,
        timeout=100,
    )


def test_arrays_that_live_to_the_end_of_the_interpreter(ksm: None) -> None:
    run_python("""
        import builtins, sys, threading, numpy as np
        from pyksm.allocating import allocator
        allocator()
        allocator(everywhere=True)
        class Late:
            def __init__(self): self.data = np.ones(1 << 20)
            def __del__(self): self.data.resize(2 << 20, refcheck=False); np.ones(1 << 20)
        builtins.kept = [np.ones(n) for n in (100, 1 << 16, 1 << 24)]
        sys.late = Late()
        cycle = [np.ones(1 << 20)]; cycle.append(cycle)
        threading.local().array = np.ones(1 << 20)
    """)


# --- numpy's bookkeeping -----------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1000, MIB, 20 * MIB])
def test_tracemalloc_sees_the_arrays(handler_as_it_was: None, nbytes: int) -> None:
    only_data = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)

    def traced() -> int:
        taken = tracemalloc.take_snapshot().filter_traces([only_data])
        return sum(stat.size for stat in taken.statistics("filename"))

    tracemalloc.start()
    try:
        with allocator():
            array = np.ones(nbytes, "u1")
            assert traced() == nbytes
            array.resize(2 * nbytes, refcheck=False)
            assert traced() == 2 * nbytes
            del array
        assert traced() == 0
    finally:
        tracemalloc.stop()


def test_kept_memory_can_be_given_back_at_once() -> None:
    with allocator():
        array = np.ones(1 << 20)
        kept = np.ones(1 << 20)
        del kept
    assert _numpy.counters()["kept_bytes"] > 0
    _numpy.release_kept()
    assert _numpy.counters()["kept_bytes"] == 0
    assert array.sum() == 1 << 20
