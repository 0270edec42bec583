from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
import threading
import warnings

import pytest
from fakeksm import DEFAULTS, make_sysfs, shown

from pyksm import KsmError, NotSupported
from pyksm import lease as lease_module
from pyksm._sys import PAGE_SIZE
from pyksm.host import Host


@pytest.fixture
def root(tmp_path):
    return make_sysfs(tmp_path / "ksm")


@pytest.fixture
def host(root, tmp_path):
    host = Host(root, lease=tmp_path / "lease")
    yield host
    host.close()
    lease_module._mine.claims.clear()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- counters ----


def test_counters_are_the_files_by_the_kernels_names(host):
    counters = host.counters().to_dict()
    assert counters == DEFAULTS | {"advisor_mode": "none"}
    assert json.loads(json.dumps(counters)) == counters


def test_counters_are_read_afresh_each_time(host, root):
    assert host.counters().full_scans == 7
    (root / "full_scans").write_text("8\n")
    assert host.counters().full_scans == 8
    (root / "advisor_mode").write_text("none [scan-time]\n")
    assert host.counters().advisor_mode == "scan-time"


def test_what_the_kernel_lacks_is_none(host, root):
    lacking = ["smart_scan", "advisor_mode", "general_profit", "merge_across_nodes"]
    for name in lacking:
        (root / name).unlink()
    counters = host.counters().to_dict()
    assert [name for name, value in counters.items() if value is None] == [
        name for name in counters if name in lacking
    ]
    assert counters["pages_sharing"] == 90
    assert counters["stable_node_dups"] == 4


def test_counters_are_frozen_and_have_slots(host):
    counters = host.counters()
    with pytest.raises(AttributeError):
        counters.run = 5
    assert not hasattr(counters, "__dict__")
    assert counters == host.counters()


@pytest.mark.parametrize(
    "text", ["", "abc", "12abc", "1 2", "0x10", "1" * 30, "1.5", " 5", "\x00" * 9, "9" * 70_000]
)
def test_garbage_names_the_file(host, root, text):
    (root / "pages_shared").write_text(text)
    with pytest.raises(KsmError, match="pages_shared"):
        host.counters()


def test_garbage_that_comes_later_names_the_file(host, root):
    host.counters()
    (root / "pages_shared").write_text("abc")
    with pytest.raises(KsmError, match="pages_shared"):
        host.counters()


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_file_names_the_file_and_does_not_hang(host, root, kind):
    (root / "pages_to_scan").unlink()
    if kind == "folder":
        (root / "pages_to_scan").mkdir()
    else:
        os.mkfifo(root / "pages_to_scan")
    with pytest.raises(KsmError, match="pages_to_scan"):
        host.counters()
    with pytest.raises(KsmError, match="pages_to_scan"):
        host.tune(pages_to_scan=5)
    assert shown_run(root) == "0"


def shown_run(root):
    return (root / "run").read_text().strip()


def test_the_files_close_with_the_host_and_not_before(root, tmp_path):
    before = open_fds()
    host = Host(root, lease=tmp_path / "lease")
    assert open_fds() == before
    host.counters()
    assert open_fds() == before + len(DEFAULTS)
    host.counters()
    assert open_fds() == before + len(DEFAULTS)
    host.close()
    host.close()
    assert open_fds() == before
    with pytest.raises(ValueError, match="closed"):
        host.counters()
    other = Host(root, lease=tmp_path / "lease")
    other.counters()
    del other
    gc.collect()
    assert open_fds() == before


def test_a_failed_opening_leaves_nothing_open(host, root):
    before = open_fds()
    (root / "run").write_text("garbage")
    with pytest.raises(KsmError):
        host.counters()
    assert open_fds() == before
    (root / "run").write_text("0\n")
    assert host.counters().run == 0


def test_the_files_do_not_leak_into_other_programs(host):
    host.counters()
    assert len(host._fds) == len(DEFAULTS) - 1
    assert not any(os.get_inheritable(fd) for fd in (*host._fds, host._mode_fd))


def test_threads_and_forks_may_read_at_once(host):
    results = []

    def read():
        results.extend(host.counters().pages_sharing for _ in range(200))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if host.counters().pages_sharing == 90 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    for thread in threads:
        thread.join()
    assert results == [90] * 800


def test_a_child_forked_while_a_thread_reads_is_not_stuck(host):
    host.counters()
    with host._lock:
        pid = os.fork()
        if pid == 0:
            host.counters()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0


# ---- stats ----


def test_stats_are_net_and_say_where_they_are_from(host):
    stats = host.stats()
    tracked = 10 + 90 + 20 + 30
    assert stats.nbytes == tracked * PAGE_SIZE
    assert stats.merged_bytes == (10 + 90 + 3) * PAGE_SIZE
    assert stats.zero_bytes == 3 * PAGE_SIZE
    assert stats.overhead_bytes == 64 * (tracked + 10 + 2)
    assert stats.saved_bytes == (90 + 3) * PAGE_SIZE - stats.overhead_bytes
    assert stats.source == "counters"
    assert stats.counters == host.counters()
    assert stats.to_dict()["counters"]["run"] == 0


def test_stats_of_an_old_kernel_know_no_zero_pages(host, root):
    (root / "ksm_zero_pages").unlink()
    stats = host.stats()
    assert stats.zero_bytes is None
    assert stats.merged_bytes == 100 * PAGE_SIZE


def test_stats_without_the_counters_are_none_and_not_0(host, root):
    (root / "pages_volatile").unlink()
    stats = host.stats()
    assert (stats.nbytes, stats.saved_bytes, stats.overhead_bytes) == (None, None, None)


# ---- tune ----


def test_tune_sets_and_undoes(host, root):
    before = shown(root)
    with host.tune(pages_to_scan=5000, sleep_millisecs=10, smart_scan=False) as undo:
        assert host.counters().pages_to_scan == 5000
        assert host.counters().sleep_millisecs == 10
        assert host.counters().smart_scan == 0
    assert shown(root) == before
    undo.undo()
    assert shown(root) == before


def test_it_undoes_when_the_body_raises(host, root):
    before = shown(root)
    with pytest.raises(ZeroDivisionError), host.tune(run=1, pages_to_scan=20000):
        raise ZeroDivisionError
    assert shown(root) == before


def test_merge_and_unmerge_are_run(host):
    with host.merge():
        assert host.running
        with host.unmerge():
            assert host.counters().run == 2
        assert host.running
    assert host.counters().run == 0


def test_an_ignored_undo_keeps_the_change(host, root):
    host.tune(pages_to_scan=300)
    with host.tune(pages_to_scan=5000):
        pass
    assert host.counters().pages_to_scan == 300
    assert host.lease_status().requests == ()


def test_two_hosts_of_a_process_keep_for_each_other(root, tmp_path):
    Host(root, lease=tmp_path / "lease").tune(pages_to_scan=300)
    assert Host(root, lease=tmp_path / "lease").restore().requests == ()
    assert (root / "pages_to_scan").read_text().strip() == "300"


def test_keep_needs_no_undo(host):
    host.keep(pages_to_scan=300, smart_scan=False)
    assert host.restore(force=True).original == {}
    assert host.counters().pages_to_scan == 300


def test_bad_knobs_are_refused_before_anything(host, root, tmp_path):
    before = shown(root)
    for error, says, knobs in [
        (ValueError, "Did you mean", {"page_to_scan": 5}),
        (ValueError, "counter", {"full_scans": 5}),
        (TypeError, "float", {"run": 1, "pages_to_scan": 5.0}),
        (ValueError, "1 to 100", {"run": 1, "advisor_max_cpu": 2**32 + 1}),
        (ValueError, "no knob", {}),
    ]:
        for act in (host.tune, host.keep):
            with pytest.raises(error, match=says):
                act(**knobs)
    assert shown(root) == before
    assert not (tmp_path / "lease").exists()


def test_a_spin_with_the_knobs_as_they_are_is_refused(host, root):
    (root / "sleep_millisecs").write_text("0\n")
    with pytest.raises(ValueError, match="burn a whole core"):
        host.tune(pages_to_scan=0)
    assert host.counters().pages_to_scan == 100


def test_a_knob_the_kernel_lacks_says_since_when(host, root):
    (root / "smart_scan").unlink()
    with pytest.raises(NotSupported, match=r"smart_scan\. It came with Linux 6\.7") as caught:
        host.tune(run=1, smart_scan=0)
    assert caught.value.errno == errno.ENOENT
    assert host.counters().run == 0


def test_a_knob_set_by_somebody_else_is_left_with_a_warning(host, root):
    undo = host.tune(pages_to_scan=5000, smart_scan=0)
    (root / "pages_to_scan").write_text("1234\n")
    with pytest.warns(RuntimeWarning, match="pages_to_scan is 1234: somebody else") as caught:
        undo.undo()
    assert len(caught) == 1
    assert (root / "pages_to_scan").read_text().strip() == "1234"
    assert host.lease_status().foreign == {"pages_to_scan": 1234}


def test_a_warning_made_an_error_comes_after_the_knobs_are_back(host, root):
    undo = host.tune(pages_to_scan=5000, smart_scan=0)
    (root / "pages_to_scan").write_text("1234\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            undo.undo()
    assert (root / "smart_scan").read_text().strip() == "1"


def test_a_value_that_does_not_read_back_is_an_error_and_undone(host, root, monkeypatch):
    write = os.write

    def truncating(fd, data):
        return write(fd, b"1\n" if data == b"99\n" else data)

    monkeypatch.setattr(os, "write", truncating)
    before = shown(root)
    with pytest.raises(KsmError, match="reads 1 after 99"):
        host.tune(pages_to_scan=5000, advisor_max_cpu=99)
    assert shown(root) == before


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EBUSY, "Unmerge first: sudo pyksm tune run=2"),
        (errno.EROFS, "in a container; on its host: sudo pyksm tune"),
        (errno.EACCES, "Ask an administrator to: sudo pyksm tune"),
    ],
)
def test_the_kernels_refusals_in_words(host, root, monkeypatch, code, says):
    write = os.write

    def refusing(fd, data):
        if data == b"512\n":
            raise OSError(code, "no")
        return write(fd, data)

    monkeypatch.setattr(os, "write", refusing)
    before = shown(root)
    with pytest.raises(NotSupported, match=says) as caught:
        host.tune(run=1, max_page_sharing=512)
    assert caught.value.errno == code
    assert shown(root) == before


def test_another_errno_keeps_its_name(host, monkeypatch):
    write = os.write

    def refusing(fd, data):
        if data == b"512\n":
            raise OSError(errno.ENOMEM, "no")
        return write(fd, data)

    monkeypatch.setattr(os, "write", refusing)
    with pytest.raises(OSError, match="max_page_sharing=512") as caught:
        host.tune(max_page_sharing=512)
    assert caught.value.errno == errno.ENOMEM


# ---- where it cannot ----


def test_without_ksm(tmp_path):
    host = Host(tmp_path / "none", lease=tmp_path / "lease")
    assert not host.exists
    assert not host.running
    assert not host.writable
    for act in (host.counters, host.stats, host.merge, host.unmerge, host.restore):
        with pytest.raises(NotSupported, match=r"no KSM.*CONFIG_KSM"):
            act()
    assert not (tmp_path / "lease").exists()
    (tmp_path / "none").write_text("a file")
    assert not host.exists
    with pytest.raises(NotSupported):
        host.counters()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become nobody")
def test_without_privilege_it_reads_and_says_who_can_write(root, tmp_path, monkeypatch):
    for path in (root, *root.iterdir()):
        path.chmod(0o755)
    lease = tmp_path / "lease"
    read, write = os.pipe()
    monkeypatch.chdir(root)  # the folders above are closed to others
    pid = os.fork()
    if pid == 0:
        os.setgid(65534)
        os.setuid(65534)
        host = Host(".", lease=lease)
        try:
            host.tune(pages_to_scan=5000, sleep_millisecs=1)
        except NotSupported as error:
            told = f"{error.errno} {error}"
        seen = (host.counters().pages_sharing, host.stats().saved_bytes is None, host.writable)
        os.write(write, f"{seen} {host.refusal.errno} {told}".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read) as file:
        assert file.read() == (
            f"(90, False, False) {errno.EACCES} {errno.EACCES} changing ./pages_to_scan needs "
            "root. Ask an administrator to: sudo pyksm tune pages_to_scan=5000 sleep_millisecs=1"
        )
    assert not lease.exists()


# ---- the rest ----


def test_the_lease_of_another_folder_is_another_file(root, tmp_path):
    assert Host(lease=tmp_path).lease.path == str(tmp_path / "ksm.json")
    assert Host(root, lease=tmp_path).lease.path != str(tmp_path / "ksm.json")
    link = tmp_path / "link"
    link.symlink_to(root)
    assert Host(link, lease=tmp_path).lease.path == Host(root, lease=tmp_path).lease.path


def test_stats_clean_up_after_the_dead(host, root):
    code = (
        "import os, sys; from pyksm.host import Host;"
        "u = Host(sys.argv[1], lease=sys.argv[2]).tune(pages_to_scan=5000); os._exit(1)"
    )
    command = [sys.executable, "-c", code, root, host.lease.directory]
    subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    assert shown(root)["pages_to_scan"] == "5000"
    assert host.stats().counters.pages_to_scan == 100


def test_stats_do_not_mind_a_broken_lease(host, root):
    host.tune(pages_to_scan=5000)
    with open(host.lease.path, "w") as file:
        file.write("garbage")
    assert host.stats().merged_bytes


def make_proc(folder, schedstat=None):
    for pid, name, parent in [(1, "init", 0), (9, "ksmd", 1), (37, "ksmd", 2), (50, "ksmd", 1)]:
        (folder / str(pid)).mkdir(parents=True)
        fields = ["S", parent, *range(5, 14), 250, 150, *range(16, 40)]
        text = f"{pid} ({name}) {' '.join(map(str, fields))}\n"
        (folder / str(pid) / "stat").write_text(text)
    if schedstat:
        (folder / "37" / "schedstat").write_text(schedstat)
    return folder


def test_ksmd_is_the_kernels_thread_of_that_name(root, tmp_path):
    proc = make_proc(tmp_path / "proc")
    host = Host(root, proc=str(proc))
    assert host.ksmd_cpu_seconds() == 400 / os.sysconf("SC_CLK_TCK")


def test_ksmd_is_told_to_the_nanosecond_where_the_kernel_does(root, tmp_path):
    proc = make_proc(tmp_path / "proc", "1500000000 7 3\n")
    assert Host(root, proc=str(proc)).ksmd_cpu_seconds() == 1.5


def test_ksmd_cannot_be_seen_in_another_pid_namespace(root, tmp_path):
    (tmp_path / "proc").mkdir()
    assert Host(root, proc=str(tmp_path / "proc")).ksmd_cpu_seconds() is None
    assert Host(root, proc=str(tmp_path / "no")).ksmd_cpu_seconds() is None
