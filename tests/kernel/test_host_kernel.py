"""Host on this machine's kernel."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from support import SYSFS, counter, knobs, read_knob, wait_until, write_knob

from pyksm import NotSupported
from pyksm._sys import MERGEABLE, PAGE_SIZE, address_of, madvise
from pyksm.host import Host

pytestmark = pytest.mark.kernel("knobs")


@pytest.fixture
def host(tmp_path):
    host = Host(lease=tmp_path / "lease")
    yield host
    host.restore(force=True)
    host.close()


@pytest.fixture
def merged(ksmd):
    """Hold 32 MiB of one page over and over, merged."""
    import mmap

    memory = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory.write(bytes(range(256)) * (len(memory) // 256))
    madvise(address_of(memory), len(memory), MERGEABLE)
    pages = len(memory) // PAGE_SIZE
    wait_until(lambda: counter("pages_sharing") >= pages * 0.99, 30)
    yield memory
    memory.close()


def test_every_file_of_this_kernel_is_a_field(host):
    counters = host.counters().to_dict()
    there = {path.name for path in SYSFS.iterdir()}
    assert there <= set(counters)
    assert {name for name, value in counters.items() if value is not None} == there
    for name in there - {"pages_scanned", "full_scans"}:
        assert str(counters[name]) == read_knob(name)


def test_stats_see_the_merging(host, merged):
    stats = host.stats()
    assert stats.merged_bytes >= 0.99 * len(merged)
    # The whole host counts, whatever else is registered on it; so compare with the kernel's sum.
    stable_nodes = stats.counters.pages_shared + stats.counters.stable_node_chains
    profit = stats.counters.general_profit - 64 * stable_nodes
    assert abs(stats.saved_bytes - profit) <= 0.02 * len(merged)
    assert stats.saved_bytes + stats.overhead_bytes >= 0.95 * len(merged)


KNOBS = {
    "run": 1,
    "pages_to_scan": 5000,
    "sleep_millisecs": 1000,
    "smart_scan": 0,
    "use_zero_pages": 1,
    "merge_across_nodes": 0,
    "max_page_sharing": 512,
    "stable_node_chains_prune_millisecs": 100,
    "advisor_max_cpu": 50,
    "advisor_min_pages_to_scan": 600,
    "advisor_max_pages_to_scan": 7000,
    "advisor_target_scan_time": 9,
    "advisor_mode": "scan-time",
}


@pytest.mark.parametrize("name", KNOBS)
def test_each_knob_is_set_and_put_back(host, name):
    if not (SYSFS / name).exists():
        pytest.skip(f"this kernel has no {name}")
    before = knobs()
    with host.tune(**{name: KNOBS[name]}):
        assert read_knob(name) == str(KNOBS[name])
    assert knobs() == before


def test_all_knobs_at_once(host):
    before = knobs()
    wanted = {n: v for n, v in KNOBS.items() if n != "pages_to_scan" and (SYSFS / n).exists()}
    with host.tune(**wanted):
        assert {name: read_knob(name) for name in wanted} == {n: str(v) for n, v in wanted.items()}
    assert knobs() == before


def test_the_advisor_gives_the_custom_scan_rate_back(host):
    write_knob("pages_to_scan", 777)
    try:
        with host.tune(advisor_mode="scan-time"):
            assert counter("pages_to_scan") == counter("advisor_min_pages_to_scan")
        assert counter("pages_to_scan") == 777
    finally:
        write_knob("pages_to_scan", 100)


def test_an_advisor_that_was_on_comes_back_with_its_number(host):
    write_knob("advisor_min_pages_to_scan", 2345)
    write_knob("advisor_mode", "scan-time")
    write_knob("advisor_min_pages_to_scan", 500)
    before = knobs()
    assert before["pages_to_scan"] == "2345"
    try:
        with pytest.raises(NotSupported, match="advisor") as caught:
            host.tune(pages_to_scan=9000)
        assert caught.value.errno == errno.EINVAL
        with host.tune(advisor_mode="none", pages_to_scan=9000):
            assert read_knob("advisor_mode") == "none"
            assert counter("pages_to_scan") == 9000
        assert knobs() == before
    finally:
        write_knob("advisor_mode", "none")


def test_what_the_kernel_refuses_while_pages_are_merged_is_explained(host, merged):
    before = knobs()
    with pytest.raises(NotSupported, match=r"merged\. Unmerge first") as caught:
        host.tune(sleep_millisecs=7, max_page_sharing=512)
    assert caught.value.errno == errno.EBUSY
    assert knobs() == before
    with host.tune(run=2, max_page_sharing=512):  # unmerges first, in this order
        assert counter("max_page_sharing") == 512
        assert counter("pages_shared") == 0


def test_unmerge_unmerges_and_stays_2(host, merged):
    with host.unmerge():
        assert counter("run") == 2
        assert counter("pages_sharing") == 0
    assert counter("run") == 1


def test_an_interrupted_unmerge_goes_on(host, merged):
    ticks = []
    before = signal.signal(signal.SIGALRM, lambda *_: ticks.append(counter("run")))
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.005)
    try:
        host.unmerge().undo()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert host.lease_status().requests == ()
    assert counter("run") == 1


def test_an_unmerge_ended_by_an_exception_puts_run_back(host, merged):
    class EnoughError(Exception):
        pass

    def end(*_):
        if counter("run") != 1:
            raise EnoughError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.002)
    try:
        with pytest.raises(EnoughError), host.unmerge():
            time.sleep(5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    host.restore()
    assert counter("run") == 1


def test_ksmd_cpu_seconds_grow_while_it_scans(host, merged):
    first = host.ksmd_cpu_seconds()
    if first is None:
        pytest.skip("ksmd cannot be seen from this pid namespace")
    wait_until(lambda: host.ksmd_cpu_seconds() > first + 0.01, 30)


def test_a_killed_holder_is_undone_by_the_next_call(host, tmp_path):
    before = knobs()
    code = (
        "import os, sys, signal; from pyksm.host import Host\n"
        "with Host(lease=sys.argv[1]).tune(pages_to_scan=4000, smart_scan=0):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, host.lease.directory]
    assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    assert counter("pages_to_scan") == 4000
    assert host.restore().requests == ()
    assert knobs() == before


def test_a_read_only_sysfs_is_a_container(tmp_path):
    """A bind mount in a mount namespace of its own is what containers see."""
    code = (
        "from pyksm.host import Host\n"
        "import pyksm\n"
        "h = Host(lease='/nonexistent/x')\n"
        "assert h.counters().run == 0 and not h.writable\n"
        "try: h.merge()\n"
        "except pyksm.NotSupported as error: print(error.errno, error)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    folder = str(SYSFS)
    script = f'mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"cannot make a mount namespace here: {done.stderr.strip()}")
    assert done.stderr == ""
    assert done.stdout == (
        f"{errno.EROFS} {folder}/run is read-only here. That is usual in a container; "
        "on its host: sudo pyksm tune run=1\n"
    )
