"""``doctor`` where the real kernel is in the state it should find."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pytest
from support import Ksmd, spawn, wait_until

from pyksm._buffer import Buffer
from pyksm.diagnosis import CODES, Finding, doctor
from pyksm.host import Host
from pyksm.process import Process
from pyksm.region import Region
from pyksm.smaps import read_mappings
from pyksm.verbs import merge, settle

MIB = 1 << 20
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


def about(obj: object) -> dict[str, Finding]:
    """Return the findings about one object by code."""
    name = type(obj.obj if isinstance(obj, Region) else obj).__name__
    return {f.code: f for f in doctor(obj) if f.subject.startswith(name)}


def host_codes() -> set[str]:
    return {finding.code for finding in doctor() if finding.subject == "host"}


def address(obj: object) -> int:
    return Region(obj).address


def filled(nbytes: int = 4 * MIB) -> Buffer:
    buffer = Buffer(nbytes)
    with memoryview(buffer) as view:
        view[:] = b"pyksm" * (nbytes // 5) + b"." * (nbytes % 5)
    return buffer


# ---- the host ----


def test_the_switch(ksmd: Ksmd) -> None:
    assert not host_codes() & {"ksmd-off", "ksmd-unmerged", "scan-stuck", "no-ksm"}
    ksmd.set(run=0)
    assert "ksmd-off" in host_codes()
    ksmd.set(run=2)
    assert "ksmd-unmerged" in host_codes()


def test_speed(ksmd: Ksmd) -> None:
    ksmd.set(run=0, pages_to_scan=0, sleep_millisecs=20)
    assert "scan-stuck" in host_codes()
    ksmd.set(pages_to_scan=1)
    buffer = filled(16 * MIB)
    ksmd.fast()
    ksmd.laps(2)
    ksmd.set(run=0, pages_to_scan=1, sleep_millisecs=20)
    assert "scan-slow" in host_codes()
    ksmd.set(pages_to_scan=20000)
    assert "scan-slow" not in host_codes()
    buffer.close()


def test_smart_scan_and_the_advisor(ksmd: Ksmd) -> None:
    assert not host_codes() & {"smart-scan", "smart-scan-skips", "advisor-slow"}
    ksmd.set(smart_scan=1)
    assert host_codes() & {"smart-scan", "smart-scan-skips"}
    ksmd.set(advisor_mode="scan-time")
    assert "advisor-slow" in host_codes()
    ksmd.set(advisor_mode="none")


def test_chains(ksmd: Ksmd) -> None:
    ksmd.stop()
    ksmd.unmerge_all()
    ksmd.set(max_page_sharing=2)
    ksmd.fast()
    buffer = filled(64 * 5 * PAGE)  # 5 contents
    wait_until(lambda: "sharing-chains" in host_codes(), 20)
    buffer.close()


# ---- memory ----


def test_good_memory_has_no_findings(ksmd: Ksmd) -> None:
    buffer = filled()
    buffer.keep_small()
    settle(buffer, timeout=30)
    assert about(buffer) == {}


def test_what_the_kernel_skips() -> None:
    with mmap.mmap(-1, MIB) as shared:
        assert about(shared)["shared"].severity == "error"
    memfd = os.memfd_create("pyksm")
    os.ftruncate(memfd, MIB)
    with mmap.mmap(memfd, MIB) as shared:
        assert about(shared)["memfd"].nbytes == MIB
    os.close(memfd)
    segment = SharedMemory(create=True, size=MIB)
    try:
        assert "shared-memory" in {f.code for f in doctor(segment.buf)}
    finally:
        segment.close()
        segment.unlink()


def test_a_file(tmp_path: object) -> None:
    with open(f"{tmp_path}/file", "w+b") as file:
        file.truncate(MIB)
        with mmap.mmap(file.fileno(), MIB, flags=mmap.MAP_PRIVATE) as mapped:
            assert "file" in about(mapped)


def test_special_memory() -> None:
    (vdso,) = [m for m in read_mappings("/proc/self/smaps") if m.path == "[vdso]"]
    assert "special" in about((ctypes.c_char * vdso.nbytes).from_address(vdso.start))


def test_droppable_and_secret_memory() -> None:
    droppable = 0x08  # MAP_DROPPABLE, Linux 6.11
    try:
        memory = mmap.mmap(-1, MIB, flags=droppable | mmap.MAP_ANONYMOUS)
    except OSError:
        pytest.skip("this kernel has no MAP_DROPPABLE")
    with memory:
        assert "droppable" in about(memory)
    secret = libc.syscall(447, 0)  # memfd_secret, Linux 5.14
    if secret < 0:
        pytest.skip("this kernel has no memfd_secret")
    os.ftruncate(secret, MIB)
    with mmap.mmap(secret, MIB) as memory:
        assert "secret" in about(memory)
    os.close(secret)


def test_unmarked_and_untouched_memory() -> None:
    with mmap.mmap(-1, 2 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        found = about(memory)
        assert found["unmarked"].nbytes == 2 * MIB
        assert found["untouched"].nbytes == 2 * MIB
        memory[:MIB] = b"x" * MIB
        with merge(memory):
            found = about(memory)
            assert "unmarked" not in found
            assert found["untouched"].nbytes == MIB


def test_too_small_memory() -> None:
    (found,) = [f for f in doctor(bytearray(100)) if f.code == "too-small"]
    assert "pyksm.copy" in found.mend


def test_the_same_bytes_at_another_offset() -> None:
    data = np.random.default_rng(1).integers(0, 256, 4 * MIB, "u1")
    memory = np.frombuffer(filled(9 * MIB), "u1")
    first, second = memory[: 4 * MIB], memory[4 * MIB + 16 : 8 * MIB + 16]
    first[:], second[:] = data, data
    (found,) = [f for f in doctor(first, second) if f.code == "not-aligned"]
    assert "16 bytes into a page instead of 0" in found.sentence
    second[2 * MIB] ^= 1  # compared in the middle: other bytes, no finding
    assert "not-aligned" not in {f.code for f in doctor(first, second)}
    again = memory[5 * MIB : 9 * MIB]
    again[:] = data
    assert "not-aligned" not in {f.code for f in doctor(first, again)}


@pytest.fixture
def written_all_the_time() -> Iterator[Buffer]:
    buffer = filled(MIB)
    stop = threading.Event()

    def write() -> None:
        with memoryview(buffer) as view:
            count = 0
            while not stop.wait(0.001):
                count += 1
                for page in range(0, MIB // 2, PAGE):
                    view[page : page + 4] = count.to_bytes(4, "little")

    thread = threading.Thread(target=write)
    thread.start()
    yield buffer
    stop.set()
    thread.join()


def test_volatile_memory(written_all_the_time: Buffer) -> None:
    found = about(written_all_the_time)["volatile"]
    assert found.nbytes == pytest.approx(MIB / 2, rel=0.1)
    assert "50%" in found.sentence


def test_locked_memory() -> None:
    buffer = filled(MIB)
    with Buffer(MIB) as free:
        assert "mlocked" not in about(free)
    if libc.mlock(ctypes.c_void_p(address(buffer)), ctypes.c_size_t(MIB)):
        pytest.skip("mlock is not allowed here")
    try:
        assert about(buffer)["mlocked"].nbytes == MIB
    finally:
        libc.munlock(ctypes.c_void_p(address(buffer)), ctypes.c_size_t(MIB))


def test_huge_pages(ksmd: Ksmd) -> None:
    ksmd.stop()
    memory = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory[:] = (b"0123456789abcdef" * 256) * (8 * MIB // 4096)
    with merge(memory):
        found = about(memory)
        if "huge-pages" not in found:
            pytest.skip("this kernel gave no huge page")
        ksmd.fast()
        wait_until(lambda: "huge-pages-return" in about(memory), 20)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        assert "huge-pages-return" not in about(memory)


# ---- a process ----


def opted_in() -> None:
    import os
    import subprocess
    import sys

    import pyksm

    pyksm.Process().merge()
    say(*[f.code for f in pyksm.doctor()])  # type: ignore[name-defined]  # noqa: F821
    code = "import pyksm; print(*[f.code for f in pyksm.doctor()])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    say(child.stdout.decode().strip())  # type: ignore[name-defined]  # noqa: F821
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    say(*[f.code for f in pyksm.doctor(pyksm.Process(child.pid))])  # type: ignore[name-defined]  # noqa: F821
    child.kill()
    os.waitpid(child.pid, 0)


@pytest.mark.kernel("prctl")
def test_who_asked_for_the_whole_process() -> None:
    with spawn(opted_in) as child:
        itself, over_exec, seen_from_outside = (child.reply().split() for _ in range(3))
    assert "merge-any-leaks" in itself
    assert "merge-any-inherited" not in itself
    assert "merge-any-inherited" in over_exec
    assert "merge-any-inherited" in seen_from_outside


def unprivileged() -> None:
    import os

    import pyksm
    import pyksm.diagnosis
    import pyksm.process

    root = pyksm.Process(os.getppid())
    os.setgroups([])
    os.setuid(65534)  # and so not dumpable any more
    say(*[f.code for f in pyksm.doctor()])  # type: ignore[name-defined]  # noqa: F821
    say(*[f.code for f in pyksm.doctor(root)])  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.root
def test_without_privilege() -> None:
    with spawn(unprivileged) as child:
        itself, another = child.reply().split(), child.reply().split()
    assert {"no-permission", "not-dumpable"} <= set(itself)
    assert "not-readable" in another


def test_a_process_that_gains_nothing(ksmd: Ksmd) -> None:
    before = {f.code for f in doctor(Process())}
    unique = np.frombuffer(Buffer(16 * MIB), "u1")
    unique[:] = np.random.default_rng(7).integers(0, 256, unique.nbytes, "u1")
    ksmd.laps(2)
    found = {f.code for f in doctor(Process())}
    assert "profit-negative" in found - before
    gains = (Host().stats().saved_bytes or 0) >= 0  # others on this host may save more
    assert gains or "host-profit-negative" in found


def test_every_finding_has_words_and_a_known_code() -> None:
    for finding in doctor(bytearray(100), Process(1)):
        assert finding.sentence
        assert finding.severity == CODES[finding.code]
