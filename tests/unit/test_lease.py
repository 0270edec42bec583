from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakeksm import Kernel, make_sysfs, shown
from support import spawn, wait_until

from pyksm import KsmError, NotSupported
from pyksm import lease as lease_module
from pyksm.host import Host
from pyksm.lease import Lease


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "lease"


@pytest.fixture
def lease(kernel, folder):
    return Lease(str(folder), kernel, name="ksm")


@pytest.fixture(autouse=True)
def _no_claim_left():
    yield
    lease_module._mine.claims.clear()


def on_disk(lease: Lease) -> dict:
    return json.loads(Path(lease.path).read_text())


def edit(lease: Lease, **changes: object) -> None:
    Path(lease.path).write_text(json.dumps(on_disk(lease) | changes))


def orphan(lease: Lease, *, pid: int, start: int) -> None:
    """Make the only request in the file another process's."""
    request = on_disk(lease)["requests"][0] | {"pid": pid, "start": start}
    edit(lease, requests=[request])
    lease_module._mine.claims.clear()


# ---- several at once ----


def test_the_last_one_out_restores(lease, kernel):
    before = kernel.read()
    first = lease.hold({"pages_to_scan": 5000, "sleep_millisecs": 10})
    second = lease.hold({"pages_to_scan": 2000, "sleep_millisecs": 1, "smart_scan": 0})
    assert kernel.knobs["pages_to_scan"] == 5000
    assert kernel.knobs["sleep_millisecs"] == 1
    lease.release(first)
    assert kernel.knobs["pages_to_scan"] == 2000
    assert kernel.knobs["smart_scan"] == 0
    lease.release(second)
    assert kernel.read() == before
    assert not Path(lease.path).exists()


def test_two_hosts_of_one_process_share_the_lease(kernel, folder):
    one, two = (Lease(str(folder), kernel, name="ksm") for _ in range(2))
    claim = one.hold({"pages_to_scan": 5000})
    other = two.hold({"pages_to_scan": 7000})
    one.release(claim)
    assert kernel.knobs["pages_to_scan"] == 7000
    two.release(other)
    assert kernel.knobs["pages_to_scan"] == 100


def test_threads_leave_nothing_behind(tmp_path):
    root = make_sysfs(tmp_path / "ksm")
    before = shown(root)
    errors = []

    def work(seed):
        try:
            host = Host(root, lease=tmp_path / "lease")
            for i in range(10):
                with host.tune(pages_to_scan=1000 + seed * 100 + i, smart_scan=0):
                    assert host.counters().pages_to_scan >= 1000
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert shown(root) == before


def test_an_unmerge_beats_the_merges_before_it_and_is_not_repeated(lease, kernel):
    lease.hold({"run": 1})
    unmerge = lease.hold({"run": 2})
    assert kernel.knobs["run"] == 2
    later = lease.hold({"run": 1})
    assert kernel.knobs["run"] == 1
    lease.release(later)
    assert kernel.writes.count(("run", 2)) == 1
    lease.release(unmerge)
    assert kernel.knobs["run"] == 1


def test_an_unmerge_alone_is_followed_by_a_stopped_ksmd(lease, kernel):
    unmerge = lease.hold({"run": 2})
    later = lease.hold({"run": 1})
    lease.release(later)
    assert kernel.knobs["run"] == 0
    lease.release(unmerge)
    assert kernel.writes.count(("run", 2)) == 1


# ---- the advisor ----


def test_switching_the_advisor_on_and_off_keeps_the_custom_scan_rate(lease, kernel):
    kernel.knobs["pages_to_scan"] = 777
    claim = lease.hold({"advisor_mode": "scan-time"})
    assert kernel.knobs["pages_to_scan"] == 500
    kernel.knobs["pages_to_scan"] = 10  # the advisor at work is not somebody else
    lease.release(claim)
    assert kernel.knobs["pages_to_scan"] == 777
    assert kernel.knobs["advisor_mode"] == "none"


def test_an_advisor_that_was_on_goes_on_from_its_number(lease, kernel):
    kernel.knobs |= {"advisor_mode": "scan-time", "pages_to_scan": 2345}
    before = kernel.read()
    claim = lease.hold({"advisor_mode": "none", "pages_to_scan": 9000})
    assert kernel.knobs["pages_to_scan"] == 9000
    lease.release(claim)
    assert kernel.read() == before


def test_pages_to_scan_under_the_advisor_is_refused_in_words(lease, kernel):
    kernel.knobs["advisor_mode"] = "scan-time"
    with pytest.raises(NotSupported, match="advisor_mode='none'") as caught:
        lease.hold({"pages_to_scan": 9})
    assert caught.value.errno == errno.EINVAL
    assert kernel.writes == []
    assert not Path(lease.path).exists()


def test_the_advisors_last_asker_wins_and_its_leaving_counts(lease, kernel):
    rate = lease.hold({"pages_to_scan": 5000})
    advisor = lease.hold({"advisor_mode": "scan-time"})
    assert kernel.knobs["advisor_mode"] == "scan-time"
    lease.release(advisor)
    assert kernel.knobs["pages_to_scan"] == 5000
    lease.release(rate)
    assert kernel.knobs["pages_to_scan"] == 100


# ---- all or nothing ----


@pytest.mark.parametrize("failing", ["smart_scan", "sleep_millisecs", "pages_to_scan", "run"])
def test_a_failure_at_any_knob_puts_the_others_back(lease, kernel, failing):
    before = kernel.read()
    kernel.fail[failing] = OSError(errno.EIO, "no")
    wanted = {"smart_scan": 0, "sleep_millisecs": 1, "pages_to_scan": 9, "run": 1}
    with pytest.raises(OSError, match="no"):
        lease.hold(wanted)
    assert kernel.read() == before
    assert not Path(lease.path).exists()


def test_an_interrupt_puts_them_back_and_leaves_no_claim(lease, kernel):
    before = kernel.read()
    kernel.fail["run"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        lease.hold({"pages_to_scan": 9, "run": 1})
    assert kernel.read() == before
    assert lease.status().requests == ()


def test_a_failure_leaves_the_others_holding_what_they_held(lease, kernel):
    lease.hold({"pages_to_scan": 5000, "run": 2})
    kernel.fail["sleep_millisecs"] = OSError(errno.EIO, "no")
    with pytest.raises(OSError, match="no"):
        lease.hold({"pages_to_scan": 9000, "sleep_millisecs": 1, "run": 1})
    assert kernel.knobs["pages_to_scan"] == 5000
    assert kernel.knobs["run"] == 2
    assert [r.knobs for r in lease.status().requests] == [{"pages_to_scan": 5000, "run": 2}]


def test_what_cannot_be_put_back_now_is_tried_again_by_the_next(lease, kernel):
    claim = lease.hold({"max_page_sharing": 512})
    kernel.fail["max_page_sharing"] = NotSupported("busy", errno=errno.EBUSY)
    with pytest.raises(NotSupported, match="busy"):
        lease.release(claim)
    assert lease.status().pending == ("max_page_sharing",)
    other = lease.hold({"smart_scan": 0})  # somebody else's trouble is not raised here
    kernel.fail.clear()
    lease.release(other)
    assert kernel.knobs["max_page_sharing"] == 256
    assert not Path(lease.path).exists()


def test_nothing_is_changed_if_the_journal_cannot_be_written(lease, kernel, folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        lease.hold({"pages_to_scan": 9})
    assert kernel.writes == []


def test_the_journal_is_on_disk_before_the_first_write(lease, kernel):
    seen = []
    write = kernel.write
    kernel.write = lambda name, value: (seen.append(on_disk(lease)), write(name, value))
    lease.hold({"pages_to_scan": 9})
    assert seen[0]["original"] == {"pages_to_scan": 100}
    assert seen[0]["written"] == {"pages_to_scan": [100, 9]}


# ---- holders that died ----


def test_a_dead_holder_is_undone_by_the_next_call(lease, kernel):
    lease.hold({"pages_to_scan": 5000})
    orphan(lease, pid=2**22 - 3, start=1)
    assert [request.alive for request in lease.status().requests] == [False]
    lease.hold({"smart_scan": 0})
    assert kernel.knobs["pages_to_scan"] == 100


def test_a_reused_pid_is_not_the_holder(lease, kernel):
    lease.hold({"pages_to_scan": 5000})
    orphan(lease, pid=os.getppid(), start=1)
    lease.sweep()
    assert kernel.knobs["pages_to_scan"] == 100


def test_a_living_holder_is_left_alone(lease, kernel):
    start = lease_module._start_time("/proc", os.getppid())
    lease.hold({"pages_to_scan": 5000})
    orphan(lease, pid=os.getppid(), start=start)
    lease.sweep()
    lease.restore()
    assert kernel.knobs["pages_to_scan"] == 5000
    lease.restore(force=True)
    assert kernel.knobs["pages_to_scan"] == 100


def test_a_zombie_is_dead():
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: lease_module._start_time("/proc", process.pid) is None, 10)
    process.wait()


def test_a_name_with_brackets_does_not_hide_the_start_time(tmp_path):
    (tmp_path / "5").mkdir()
    fields = " ".join(["S", *map(str, range(4, 22)), "98765", "0"])
    (tmp_path / "5" / "stat").write_text(f"5 (a) b) S (x) {fields}\n")
    assert lease_module._start_time(str(tmp_path), 5) == 98765


def test_a_holder_of_another_pid_namespace_cannot_be_judged(lease, kernel):
    lease.hold({"pages_to_scan": 5000})
    edit(lease, requests=[on_disk(lease)["requests"][0] | {"pid": 2**22 - 3, "pidns": 1}])
    lease_module._mine.claims.clear()
    lease.restore()
    assert kernel.knobs["pages_to_scan"] == 5000


def test_a_request_of_ours_that_nobody_holds_is_dropped(lease, kernel):
    lease.hold({"pages_to_scan": 5000})
    lease_module._mine.claims.clear()
    lease.sweep()
    assert kernel.knobs["pages_to_scan"] == 100


def test_an_unmerge_aborted_by_a_kill_is_not_taken_for_somebody_else(kernel, lease):
    kernel.knobs["run"] = 1
    journal = []
    write = kernel.write
    kernel.write = lambda name, value: (
        journal.append(on_disk(lease)["written"]),
        write(name, value),
    )
    lease.hold({"run": 2})
    assert journal[0] == {"run": [1, 2, 0]}
    kernel.write = write
    edit(lease, written=journal[0])
    orphan(lease, pid=2**22 - 3, start=1)
    kernel.knobs["run"] = 0
    lease.sweep()
    assert kernel.knobs["run"] == 1


def test_after_a_reboot_nothing_is_restored(lease, kernel):
    lease.hold({"pages_to_scan": 5000})
    edit(lease, boot_id="another")
    lease_module._mine.claims.clear()
    lease.restore()
    assert kernel.knobs["pages_to_scan"] == 5000  # the boot's own, whatever the file says
    assert lease.status().original == {}


# ---- somebody else's hand ----


def test_a_knob_somebody_else_set_is_left_and_reported(lease, kernel):
    claim = lease.hold({"pages_to_scan": 5000, "smart_scan": 0})
    kernel.knobs["pages_to_scan"] = 1234
    assert lease.release(claim) == {"pages_to_scan": 1234}
    assert kernel.knobs["pages_to_scan"] == 1234
    assert kernel.knobs["smart_scan"] == 1
    assert lease.status().foreign == {"pages_to_scan": 1234}


def test_it_stays_theirs_while_others_hold_other_knobs(lease, kernel):
    lease.hold({"pages_to_scan": 5000})
    kernel.knobs["pages_to_scan"] = 1234
    lease.hold({"smart_scan": 0})
    assert kernel.knobs["pages_to_scan"] == 1234
    again = lease.hold({"pages_to_scan": 6000})
    assert lease.status().foreign == {}
    lease.release(again)
    assert kernel.knobs["pages_to_scan"] == 1234


def test_an_advisor_somebody_else_switched_off_stays_off(lease, kernel):
    claim = lease.hold({"advisor_mode": "scan-time"})
    kernel.write("advisor_mode", "none")
    kernel.write("pages_to_scan", 321)
    lease.release(claim)
    assert kernel.knobs["advisor_mode"] == "none"
    assert kernel.knobs["pages_to_scan"] == 321


# ---- keeping ----


def test_an_undoing_that_failed_is_never_a_keeping(tmp_path, monkeypatch):
    root = make_sysfs(tmp_path / "ksm")
    host = Host(root, lease=tmp_path / "lease")

    def interrupted(dir_fd):
        raise KeyboardInterrupt

    undo = host.tune(pages_to_scan=5000)
    with monkeypatch.context() as patch:
        patch.setattr(host.lease, "_begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            undo.undo()
    del undo
    assert shown(root)["pages_to_scan"] == "5000"
    host.lease.sweep()
    assert shown(root)["pages_to_scan"] == "100"
    assert lease_module._mine.claims == {}


def test_a_dropped_change_is_what_the_knobs_go_back_to(lease, kernel, folder):
    lease.hold({"pages_to_scan": 300}).drop()
    strong = Lease(str(folder), kernel, name="ksm").hold({"pages_to_scan": 5000})
    assert kernel.knobs["pages_to_scan"] == 5000
    lease.release(strong)
    assert kernel.knobs["pages_to_scan"] == 300
    assert not Path(lease.path).exists()


def test_keep_is_on_record_at_once(lease, kernel):
    lease.keep({"pages_to_scan": 300, "run": 1})
    assert not Path(lease.path).exists()
    assert lease_module._mine.claims == {}
    lease.restore(force=True)
    assert (kernel.knobs["pages_to_scan"], kernel.knobs["run"]) == (300, 1)


def test_keeping_under_a_stronger_request_comes_after_it(lease, kernel):
    strong = lease.hold({"pages_to_scan": 5000})
    lease.keep({"pages_to_scan": 300})
    assert kernel.knobs["pages_to_scan"] == 5000
    lease.release(strong)
    assert kernel.knobs["pages_to_scan"] == 300


@pytest.mark.parametrize(("mode", "other"), [("scan-time", "none"), ("none", "scan-time")])
def test_keeping_an_advisor_mode(lease, kernel, mode, other):
    kernel.knobs |= {"advisor_mode": other, "pages_to_scan": 2345}
    lease.keep({"advisor_mode": mode})
    claim = lease.hold({"smart_scan": 0})
    lease.release(claim)
    assert kernel.knobs["advisor_mode"] == mode
    assert kernel.knobs["pages_to_scan"] == (500 if mode == "scan-time" else 100)
    assert not Path(lease.path).exists()


SCRIPT = """
import os, sys
from pyksm.host import Host
host = Host(sys.argv[1], lease=sys.argv[2])
how = sys.argv[3]
if how == "dropped":
    host.tune(pages_to_scan=300)
elif how == "variable":
    undo = host.tune(pages_to_scan=300)
elif how == "raise":
    with host.tune(pages_to_scan=300):
        raise SystemExit(0)
elif how == "fork":
    undo = host.tune(pages_to_scan=300)
    if os.fork() == 0:
        undo.undo()
        sys.exit()  # runs atexit
    assert os.wait()[1] == 0
    assert host.counters().pages_to_scan == 300
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("how", "at_exit", "after"),
    [
        ("dropped", "300", "300"),
        ("variable", "100", "100"),
        ("raise", "100", "100"),
        ("fork", "300", "100"),
    ],
)
def test_what_an_exit_leaves(tmp_path, how, at_exit, after):
    root = make_sysfs(tmp_path / "ksm")
    command = [sys.executable, "-c", SCRIPT, root, tmp_path / "lease", how]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    assert shown(root)["pages_to_scan"] == at_exit
    Host(root, lease=tmp_path / "lease").restore()
    assert shown(root)["pages_to_scan"] == after


# ---- the file ----


def test_the_file_is_private(lease, folder):
    lease.hold({"smart_scan": 0})
    assert oct(os.stat(lease.path).st_mode & 0o7777) == "0o600"
    assert oct(os.stat(folder).st_mode & 0o7777) == "0o755"
    assert oct(os.stat(folder / "ksm.lock").st_mode & 0o7777) == "0o600"


@pytest.mark.parametrize("what", ["ksm.json", "ksm.lock"])
def test_no_symlink_is_followed(lease, kernel, folder, tmp_path, what):
    folder.mkdir(mode=0o755)
    (tmp_path / "victim").write_text("mine")
    (folder / what).symlink_to(tmp_path / "victim")
    with pytest.raises(KsmError, match="symbolic link"):
        lease.hold({"smart_scan": 0})
    assert (tmp_path / "victim").read_text() == "mine"
    assert kernel.writes == []


def test_a_directory_that_is_a_symlink_is_refused(lease, kernel, folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KsmError, match="symbolic link"):
        lease.hold({"smart_scan": 0})
    assert kernel.writes == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_directory_others_can_write_is_refused(lease, kernel, folder):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(KsmError, match="chmod go-w"):
        lease.hold({"smart_scan": 0})
    assert kernel.writes == []


def test_a_file_others_can_read_or_write_is_refused(lease, kernel):
    lease.hold({"smart_scan": 0})
    os.chmod(lease.path, 0o666)
    with pytest.raises(KsmError, match="chmod 600"):
        lease.status()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_another_users_file_is_refused(lease, folder):
    lease.hold({"smart_scan": 0})
    os.chown(lease.path, 65534, 65534)
    with pytest.raises(KsmError, match="belongs to user 65534"):
        lease.status()


GARBAGE = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b" " * (1 << 20) + b"{}",
    b'{"version": 2}',
]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_is_an_error_and_no_write(lease, kernel, folder, text):
    folder.mkdir(mode=0o755)
    path = Path(lease.path)
    path.write_bytes(text)
    path.chmod(0o600)
    for call in (lambda: lease.hold({"smart_scan": 0}), lease.restore, lease.status, lease.sweep):
        with pytest.raises(KsmError, match=r"ksm\.json") as caught:
            call()
        assert f"rm {path}" in str(caught.value)
    assert kernel.writes == []
    assert path.read_bytes() == text


@pytest.mark.parametrize(
    "changes",
    [
        {"original": {"pages_to_scan": -1}},
        {"original": {"pages_to_scan": "9"}},
        {"original": {"run": 7}},
        {"original": {"../../../etc/passwd": 1}},
        {"original": {}},
        {"original": [1]},
        {"original": None},
        {"written": {"pages_to_scan": []}},
        {"written": {"pages_to_scan": [2**40]}},
        {"written": {"pages_to_scan": 5}},
        {"written": {"run": [0]}},
        {"requests": [{}]},
        {"requests": [{"id": 1, "pid": 1, "start": 1, "pidns": 1, "knobs": {}}]},
        {"requests": [{"id": "a", "pid": "1", "start": 1, "pidns": 1, "knobs": {}}]},
        {"requests": [{"id": "a", "pid": 1, "start": 1, "pidns": 1, "knobs": {"x": 1}}]},
        {"requests": [{"id": "a", "pid": 1, "start": 1, "pidns": 1, "knobs": {"run": 1}}]},
        {"requests": 5},
        {"foreign": {"colour": 1}},
        {"boot_id": 5},
        {"version": None},
    ],
)
def test_a_damaged_file_is_an_error_and_no_write(lease, kernel, changes):
    lease.hold({"pages_to_scan": 5000})
    edit(lease, **changes)
    kernel.writes.clear()
    with pytest.raises(KsmError, match="not a lease pyksm wrote"):
        lease.restore()
    assert kernel.writes == []


def test_a_knob_this_kernel_lacks_is_let_go(lease, kernel):
    lease.hold({"smart_scan": 0})
    lease_module._mine.claims.clear()
    del kernel.knobs["smart_scan"]
    lease.restore()
    assert lease.status().original == {}


# ---- waiting ----


def test_a_stuck_holder_is_named_after_a_bounded_wait(lease, kernel, folder):
    def stuck(folder):
        import fcntl
        import os

        fd = os.open(f"{folder}/ksm.lock", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.pwrite(fd, f"{os.getpid():<10}\n".encode(), 0)
        say("ready")  # noqa: F821 - given by spawn
        for _ in commands():  # noqa: F821
            pass

    lease.restore()
    lease.timeout = 0.2
    with spawn(stuck, str(folder)) as child:
        child.expect("ready")
        with pytest.raises(TimeoutError, match=str(child.pid)):
            lease.hold({"smart_scan": 0})
    assert kernel.writes == []
    lease.hold({"smart_scan": 0})


def test_a_forked_child_does_not_inherit_a_lock_of_another_thread(tmp_path):
    root = make_sysfs(tmp_path / "ksm")
    host = Host(root, lease=tmp_path / "lease")
    inside, go_on = threading.Event(), threading.Event()
    write = host._files.write

    def slow(name, value):
        inside.set()
        assert go_on.wait(10)
        write(name, value)

    host._files.write = slow
    thread = threading.Thread(target=lambda: host.lease.hold({"smart_scan": 0}))
    thread.start()
    assert inside.wait(10)
    read, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(say)
            os.read(read, 1)  # until the parent's thread is out
            assert host.lease._fds == []  # or the child would keep a killed parent's lock
            host._files.write = write
            host.lease.timeout = 5
            host.lease.release(host.lease.hold({"sleep_millisecs": 1}))
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the status tells
            os._exit(1)
    go_on.set()
    thread.join()
    os.close(read)
    os.close(say)
    assert os.waitpid(pid, 0)[1] == 0
    assert shown(root)["smart_scan"] == "0"  # the parent's, which the child does not own
    host.lease.restore(force=True)


def test_a_signal_handler_may_not_reenter(lease, kernel):
    def reenter(*args):
        with pytest.raises(KsmError, match="signal handler"):
            lease.restore()

    write = kernel.write
    kernel.write = lambda *change: (
        os.kill(os.getpid(), signal.SIGUSR1),
        time.sleep(0),
        write(*change),
    )
    before = signal.signal(signal.SIGUSR1, reenter)
    try:
        lease.release(lease.hold({"smart_scan": 0}))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert kernel.knobs["smart_scan"] == 1
