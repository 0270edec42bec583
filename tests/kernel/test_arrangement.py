"""The arrangement that every kernel test stands on."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import (
    HostLock,
    Ksmd,
    counter,
    knobs,
    mappings,
    read_knob,
    rollup_kb,
    smaps_kb,
    spawn,
    vm_flags,
    wait_until,
)

MIB = 1 << 20


def _holder(size, seed):
    import mmap
    import random

    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_MERGEABLE)
    area[:] = random.Random(seed).randbytes(size)
    say("ready")  # noqa: F821
    for (word,) in commands():  # noqa: F821
        if word == "break":
            area[::4096] = bytes(len(area[::4096]))
        say(word)  # noqa: F821


def test_two_processes_merge_and_the_host_shows_it(ksmd: Ksmd) -> None:
    size = 16 * MIB
    with spawn(_holder, size, 7) as one, spawn(_holder, size, 7) as two:
        for child in (one, two):
            child.expect("ready")
        wait_until(lambda: rollup_kb("KSM", two.pid) >= size // 1024, what="both to be merged")
        pss = rollup_kb("Pss", one.pid) + rollup_kb("Pss", two.pid)
        assert counter("pages_sharing") >= size // 4096
        ksmd.stop()
        assert one.ask("break") == "break"
        # Not AnonPages: other work on this host would move it by megabytes.
        grown = rollup_kb("Pss", one.pid) + rollup_kb("Pss", two.pid) - pss
        assert grown * 1024 == pytest.approx(size, rel=0.1)


def test_the_fixture_scans_without_smart_scan(ksmd: Ksmd) -> None:
    assert counter("run") == 1
    assert knobs().get("smart_scan", "0") == "0"
    with mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_MERGEABLE)
        area[:] = os.urandom(MIB)
        ksmd.laps(2)
    ksmd.set(pages_to_scan=123)  # the fixture puts it back, or the strict check speaks


def test_ksmd_is_stopped_where_nobody_asked_for_it() -> None:
    assert read_knob("run") == "0"
    assert counter("pages_sharing") == 0


def test_smaps_reader() -> None:
    with mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_MERGEABLE)
        area.madvise(mmap.MADV_NOHUGEPAGE)
        area[:] = b"x" * MIB
        mapping = next(m for m in mappings() if "mg" in m.flags)
        assert {"mg", "nh"} <= vm_flags(mapping.start)
        assert smaps_kb(mapping.start, "Rss") == MIB // 1024
    with pytest.raises(AssertionError, match="no mapping"):
        vm_flags(0)


INNER = """
import pytest
from support import write_knob

pytestmark = pytest.mark.kernel

def test_leaves_a_knob():
    write_knob("pages_to_scan", 77)

def test_leaves_them_and_fails():
    write_knob("sleep_millisecs", 3)
    write_knob("max_page_sharing", 16)
    write_knob("run", 1)
    assert False

def test_may(ksmd):
    ksmd.set(use_zero_pages=1, pages_to_scan=5)
"""


@pytest.mark.root
def test_a_test_that_leaves_a_knob_fails_and_is_cleaned_up(
    request: pytest.FixtureRequest, host_lock: HostLock, tmp_path: Path
) -> None:
    before = knobs()
    root = request.config.rootpath
    shutil.copy(root / "conftest.py", tmp_path)
    (tmp_path / "test_inner.py").write_text(INNER)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c"]
        + [root / "pyproject.toml", "--rootdir", tmp_path, tmp_path],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYKSM_KERNEL_TESTS": "1"},
        pass_fds=[host_lock.descriptor],  # it takes our lock over instead of waiting for it
    )
    assert "1 failed, 2 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    assert f"pages_to_scan=77 (was {before['pages_to_scan']})" in done.stdout
    assert "sleep_millisecs=3" in done.stdout
    assert "max_page_sharing=16" in done.stdout
    assert knobs() == before
