"""settle on the real kernel: it merges, knows when, and puts every knob back."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import threading
import time

import numpy as np
import pytest
from support import counter, knobs, spawn, vm_flags, wait_until

import pyksm
from pyksm import NotSupported, Region

MIB = 1 << 20


def private(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = data
    return memory


def test_merges_reports_and_restores() -> None:
    before = knobs()
    data = os.urandom(8 * MIB)
    twins, single = [private(data), private(data)], private(os.urandom(2 * MIB))
    fractions: list[float] = []
    with pyksm.merge([*twins, single]):
        result = pyksm.settle(
            [*twins, single], timeout=60, progress=lambda fraction, rate: fractions.append(fraction)
        )
        assert result.converged
        assert result.burst
        assert result.nbytes == 18 * MIB
        assert result.merged_bytes == 16 * MIB
        assert result.saved_bytes == 8 * MIB - 64 * 18 * 256
        assert result.laps >= 2
        assert result.seconds > 0
        assert result.ksmd_cpu_seconds is not None
        assert [(u.code, u.nbytes) for u in result.unmerged] == [("single", 2 * MIB)]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
    assert knobs() == before


def test_knobs_return_when_it_is_interrupted() -> None:
    before = knobs()

    def stop(fraction: float, rate: float) -> None:
        raise KeyboardInterrupt

    memory = private(os.urandom(4 * MIB))
    with pyksm.merge(memory), pytest.raises(KeyboardInterrupt):
        pyksm.settle(memory, progress=stop)
    assert knobs() == before


def test_a_timeout_is_a_result() -> None:
    memory = private(os.urandom(4 * MIB))
    with pyksm.merge(memory):
        result = Region(memory).settle(timeout=0)
    assert not result.converged
    assert result.merged_bytes == 0


def test_unmarked_and_untouched_memory_is_named() -> None:
    memory = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert [u.code for u in Region(memory).settle(timeout=10).unmerged] == ["unmarked"]
    with pyksm.merge(memory):
        assert [u.code for u in Region(memory).settle(timeout=10).unmerged] == ["untouched"]


def test_memory_that_keeps_changing_does_not_hold_it_up() -> None:
    data = os.urandom(4 * MIB)
    twins, busy = [private(data), private(data)], private(bytes(4 * MIB))
    done = threading.Event()

    def write() -> None:
        source = random.Random(1)
        while not done.is_set():
            page = source.randrange(1024) * 4096
            busy[page : page + 8] = source.randbytes(8)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pyksm.merge([*twins, busy]):
            result = pyksm.settle([*twins, busy], timeout=60)
            assert result.converged
            assert pyksm.settle(twins, timeout=60).merged_bytes == 8 * MIB
    finally:
        done.set()
        writer.join()


def test_late_duplicates_merge_despite_smart_scan(ksmd: object) -> None:
    """An old unique region and a fresh twin: with smart_scan some never meet."""
    before = knobs()
    data = os.urandom(2 * MIB)
    old = private(data)
    with pyksm.merge(old):
        pyksm.Host().tune(smart_scan=1)
        lap = counter("full_scans")
        wait_until(lambda: counter("full_scans") >= lap + 15)
        late = private(data)
        with pyksm.merge(late):
            result = pyksm.settle([old, late], timeout=60)
            assert result.merged_bytes == 4 * MIB
    assert before["pages_to_scan"] == knobs()["pages_to_scan"]


def test_the_event_loop_goes_on_and_cancelling_restores() -> None:
    before = knobs()

    async def main() -> tuple[int, pyksm.SettleResult]:
        data = os.urandom(8 * MIB)
        twins = [private(data), private(data)]
        ticks = 0
        with pyksm.merge(twins):
            task = asyncio.create_task(pyksm.settle_async(twins, timeout=60))
            while not task.done():
                await asyncio.sleep(0.005)
                ticks += 1
            result = await task
            again = asyncio.create_task(pyksm.settle_async(pyksm.Host(), cpu=0.01))
            await asyncio.sleep(0.05)
            again.cancel()
            with pytest.raises(asyncio.CancelledError):
                await again
            return ticks, result

    ticks, result = asyncio.run(main())
    assert result.merged_bytes == 16 * MIB
    assert ticks >= 3
    assert knobs() == before


def test_another_process_is_settled() -> None:
    def worker() -> None:
        import mmap
        import os

        import pyksm

        memory = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = os.urandom(4 << 20) * 2
        pyksm.merge(memory)
        say("ready")  # noqa: F821
        for _ in commands():  # noqa: F821
            pass

    with spawn(worker) as child:
        child.expect("ready")
        result = pyksm.Process(child.pid).settle(timeout=60)
        assert result.converged
        assert result.merged_bytes == 8 * MIB


def test_the_cpu_share_is_kept() -> None:
    """ksmd's own CPU clock, over enough unique memory that it always has work."""
    memory = private(os.urandom(96 * MIB))
    with pyksm.merge(memory):
        result = pyksm.settle(memory, cpu=0.3, timeout=4)
    share = (result.ksmd_cpu_seconds or 0) / result.seconds
    assert 0.1 < share < 0.36


def test_pyksms_own_memory_is_kept_from_huge_pages() -> None:
    buffer = pyksm.Buffer(4 * MIB)
    memoryview(buffer)[:] = os.urandom(2 * MIB) * 2
    with pyksm.allocator():
        array = np.ones(1 << 20)
        pyksm.settle(buffer, timeout=60)
        assert "nh" in vm_flags(buffer.address)
        assert "nh" in vm_flags(Region(array).address)


def test_without_root_and_without_ksmd_it_says_so_at_once() -> None:
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        start = time.monotonic()
        try:
            pyksm.Host().settle()
        except NotSupported as error:
            ok = "not running" in str(error) and "pyksm tune run=1" in error.hint
            os._exit(0 if ok and time.monotonic() - start < 1 else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cpu": 0}, ValueError, "share of one core"),
        ({"cpu": 1.1}, ValueError, "share of one core"),
        ({"cpu": "1"}, TypeError, "not str"),
        ({"cpu": True}, TypeError, "not bool"),
        ({"timeout": -1}, ValueError, "0 or more"),
        ({"timeout": float("nan")}, ValueError, "0 or more"),
        ({"timeout": "1"}, TypeError, "not str"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pyksm.settle(bytearray(1 << 16), **options)  # type: ignore[arg-type]


def test_nothing_to_settle() -> None:
    with pytest.raises(ValueError, match="nothing to settle"):
        pyksm.settle([])
