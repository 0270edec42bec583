"""The host: this kernel's KSM, which is one for all processes; owns ``/sys/kernel/mm/ksm``."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import stat
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Final

from pyksm import _sys
from pyksm.errors import KsmError, NotSupported
from pyksm.frames import survey_host
from pyksm.headroom import require
from pyksm.knobs import KNOBS, Value, Values, check
from pyksm.lease import Lease, LeaseStatus
from pyksm.result import Result
from pyksm.settling import Progress, Scope, SettleResult, Unmerged, explain, settle
from pyksm.undo import Undo

__all__ = ["Host", "HostCounters", "HostStats"]

_SYSFS: Final = "/sys/kernel/mm/ksm"
_LEASES: Final = "/run/pyksm"
# sizeof(struct ksm_rmap_item) and of struct ksm_stable_node on 64-bit kernels.
_ITEM_BYTES: Final = 64
# sysfs gives a page; a real value is one short line.
_MAX_FILE: Final = 1 << 16
_INTEGER: Final = re.compile(rb"-?[0-9]{1,20}\Z")
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_WRITE: Final = os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostCounters(Result):
    """Every file of ``/sys/kernel/mm/ksm`` by the kernel's name; ``None`` where it has none such.

    They describe the whole host, and the kernel brings them up to date only as ksmd comes by:
    with ksmd stopped they stay as they were, and a fork adds to ``pages_sharing`` what was shared
    anyway.
    """

    run: int | None
    """0: ksmd stands still, 1: it scans, 2: it stands still and everything was unmerged."""
    pages_to_scan: int | None
    """Pages a batch."""
    sleep_millisecs: int | None
    """Milliseconds between batches."""
    smart_scan: int | None
    """1: pages that failed to merge are skipped for up to 8 laps. Linux 6.7."""
    use_zero_pages: int | None
    """1: pages of zeros merge with the kernel's zero page. Linux 4.11."""
    merge_across_nodes: int | None
    """0: pages merge only within a NUMA node. Only with CONFIG_NUMA."""
    max_page_sharing: int | None
    """Mappings of one merged page before a second copy is made. Linux 4.13."""
    stable_node_chains_prune_millisecs: int | None
    advisor_mode: str | None
    """``none``, or ``scan-time``: the kernel sets pages_to_scan. Linux 6.8."""
    advisor_max_cpu: int | None
    """Percent of one core."""
    advisor_min_pages_to_scan: int | None
    """What the advisor starts from; not a floor."""
    advisor_max_pages_to_scan: int | None
    advisor_target_scan_time: int | None
    """Seconds a lap."""
    full_scans: int | None
    """Laps; run=2 sets it back to 0."""
    pages_shared: int | None
    """Merged pages there are."""
    pages_sharing: int | None
    """Further mappings of them: pages saved, but see the class."""
    pages_unshared: int | None
    """Pages that were unlike any other in this lap."""
    pages_volatile: int | None
    """All other tracked pages: changing, new, or skipped."""
    pages_scanned: int | None
    """Linux 6.6."""
    pages_skipped: int | None
    """Skipped by smart_scan. Linux 6.7."""
    ksm_zero_pages: int | None
    """Mappings of the zero page that ksmd made. Linux 6.6."""
    general_profit: int | None
    """Bytes the kernel thinks are saved, net of 64 a tracked page; may be negative. Linux 6.4."""
    stable_node_chains: int | None
    """Contents that went over max_page_sharing. Linux 4.13."""
    stable_node_dups: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostStats(Result):
    """What is merged on this host."""

    nbytes: int | None
    """Bytes of all the pages ksmd tracks, in every process."""
    merged_bytes: int | None
    """Bytes that processes see in merged pages, zero pages among them."""
    saved_bytes: int | None
    """Physical memory saved, net of ``overhead_bytes``, zero pages included; may be negative."""
    zero_bytes: int | None
    """The part of it, before overhead, that is pages of zeros (use_zero_pages)."""
    overhead_bytes: int | None
    """Kernel memory for the tracking: 64 bytes a tracked page and a merged page."""
    source: str
    """``processes``: live, from the page frames of every process. ``counters``: the kernel's,
    stale until ksmd's next lap, and inflated by fork."""
    counters: HostCounters


_NAMES: Final = tuple(field.name for field in dataclasses.fields(HostCounters))
_INT_NAMES: Final = tuple(name for name in _NAMES if name != "advisor_mode")
_MODES: Final = {b"[none] scan-time\n": "none", b"none [scan-time]\n": "scan-time"}


class _Draft(Result):
    """A HostCounters that can still be written, and then becomes one.

    The generated ``__init__`` of a frozen class takes four times as long: it goes through
    ``object.__setattr__`` for each of 24 fields.
    """

    __slots__ = _NAMES
    # Both, or CPython takes the slow way for each assignment (update_one_slot, typeobject.c).
    __setattr__ = object.__setattr__
    __delattr__ = object.__delattr__


def _frozen(values: Sequence[int | None], mode: str | None) -> HostCounters:
    """Make the counters of their values, in the order of ``_INT_NAMES``, and the advisor's mode."""
    draft: Any = _Draft()
    (
        draft.run,
        draft.pages_to_scan,
        draft.sleep_millisecs,
        draft.smart_scan,
        draft.use_zero_pages,
        draft.merge_across_nodes,
        draft.max_page_sharing,
        draft.stable_node_chains_prune_millisecs,
        draft.advisor_max_cpu,
        draft.advisor_min_pages_to_scan,
        draft.advisor_max_pages_to_scan,
        draft.advisor_target_scan_time,
        draft.full_scans,
        draft.pages_shared,
        draft.pages_sharing,
        draft.pages_unshared,
        draft.pages_volatile,
        draft.pages_scanned,
        draft.pages_skipped,
        draft.ksm_zero_pages,
        draft.general_profit,
        draft.stable_node_chains,
        draft.stable_node_dups,
    ) = values
    draft.advisor_mode = mode
    draft.__class__ = HostCounters
    counters: HostCounters = draft
    return counters


class Host:
    """This kernel's KSM: its counters, its switch and its knobs.

    Reading needs no privilege. Changing a knob needs root and a writable ``/sys``; every change
    goes through one lease for the whole host, so that any number of programs can ask for what
    they need and the last one out puts back what was there.

    >>> host = pyksm.Host()
    >>> host.counters().max_page_sharing
    256
    >>> with host.tune(pages_to_scan=5000, sleep_millisecs=10):
    ...     host.counters().pages_to_scan
    5000
    >>> host.counters().pages_to_scan
    100
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = _SYSFS,
        *,
        lease: str | os.PathLike[str] = _LEASES,
        proc: str = "/proc",
    ) -> None:
        """Take the sysfs folder, the directory of the lease file, and where /proc is.

        Opens nothing yet: a host without KSM can be asked whether it ``exists``.
        """
        self.root = os.fspath(root)
        self._proc = proc
        self._lock = threading.Lock()
        self._fds: tuple[int, ...] = ()
        self._present: tuple[bool, ...] = ()
        self._mode_fd: int | None = None
        self._is_open = False
        self._is_closed = False
        self._ksmd: str | None = None
        self._files = _KnobFiles(self.root)
        self.lease = Lease(os.fspath(lease), self._files, name=_lease_name(self.root))
        _watch_forks(self)

    def __repr__(self) -> str:
        """Show the folder."""
        return f"pyksm.Host({self.root!r})"

    # ---- cheap facts ----

    @property
    def exists(self) -> bool:
        """Whether this kernel has KSM (CONFIG_KSM and CONFIG_SYSFS)."""
        return os.path.isdir(self.root)

    @property
    def running(self) -> bool:
        """Whether ksmd scans now (``run`` is 1)."""
        return self.exists and self._files.read_one("run") == 1

    @property
    def writable(self) -> bool:
        """Whether this process may change knobs; ``refusal`` says why not."""
        return self.refusal is None

    @property
    def refusal(self) -> KsmError | OSError | None:
        """What ``tune`` would raise for want of KSM or of permission; ``None`` if it would not."""
        try:
            self._files.try_writing()
        except (KsmError, OSError) as error:
            return error
        return None

    # ---- reading ----

    def counters(self) -> HostCounters:
        """Read every sysfs file at once.

        The files stay open from the first call on, which makes this some 20 times faster than
        opening and reading each; ``close()`` or the end of the object closes them. Raises
        NotSupported if the kernel has no KSM, KsmError if a file holds something else.
        """
        with self._lock:
            if not self._is_open:
                self._open()
            values = _sys.pread_ints(self._fds)
            mode = None if self._mode_fd is None else os.pread(self._mode_fd, 64, 0)
            present = self._present
        if None in values:
            self._files.read_all(_INT_NAMES)  # names the culprit
            raise KsmError(f"{self.root}: a counter could not be read")
        if False in present:
            places = iter(values)
            values = [next(places) if there else None for there in present]
        return _frozen(values, None if mode is None else _MODES.get(mode) or _word(mode))

    def stats(self) -> HostStats:
        """Tell what is merged on the host now, and what it saves.

        With CAP_SYS_ADMIN the merged pages of every process are looked at, which is live, does
        not count what fork shares anyway, and takes some milliseconds a GiB marked. Without it
        the figures are the kernel's counters: ``(pages_sharing + ksm_zero_pages)`` pages, as old
        as ksmd's last visit and inflated by fork. ``source`` says which it is. Less, in both, the
        kernel's own 64 bytes a tracked and a merged page.
        """
        with contextlib.suppress(OSError, KsmError):
            self.lease.sweep()
        stats = _stats(self.counters())
        live = survey_host(self._proc) if os.path.realpath(self.root) == _SYSFS else None
        if live is None:
            return stats
        zero, overhead = stats.zero_bytes or 0, stats.overhead_bytes or 0
        return dataclasses.replace(
            stats,
            merged_bytes=live.ksm * _sys.PAGE_SIZE + zero,
            saved_bytes=round(live.saved * _sys.PAGE_SIZE) + zero - overhead,
            source="processes",
        )

    def ksmd_cpu_seconds(self) -> float | None:
        """Return the CPU seconds ksmd has used since boot; ``None`` where it cannot be seen.

        It cannot be seen from inside a container with its own pid namespace.
        """
        if self._ksmd is not None:
            with contextlib.suppress(OSError):
                return _cpu_seconds(self._ksmd)
        self._ksmd = _find_ksmd(self._proc)
        return None if self._ksmd is None else _cpu_seconds(self._ksmd)

    def _scope(self) -> Scope:
        """Return how far merging on the host has come, for :func:`pyksm.settle`."""
        stats = _stats(self.counters())
        return Scope(candidates=stats.nbytes or 0, merged=stats.merged_bytes or 0)

    def _unmerged(self) -> list[Unmerged]:
        """Say what of the tracked memory has not merged, and why."""
        scope = self._scope()
        return explain(unmarked=0, untouched=0, single=scope.candidates - scope.merged)

    def _keep_small(self) -> None:
        """Leave other processes' memory as they want it."""

    def settle(
        self,
        timeout: float | None = None,
        cpu: float = 1.0,
        progress: Progress | None = None,
    ) -> SettleResult:
        """Make merging on the whole host happen now; return when it has (:func:`pyksm.settle`)."""
        return settle([self], self, timeout=timeout, cpu=cpu, progress=progress)

    # ---- changing ----

    def merge(self) -> Undo:
        """Start ksmd (``run=1``): what was marked for merging gets merged, in every process."""
        return self.tune(run=1)

    def unmerge(self, *, force: bool = False) -> Undo:
        """Stop ksmd and give every process its own copies back (``run=2``).

        Blocks until it is done, half a second per GiB merged; an interrupt is retried. Undoing
        puts ``run`` back; what was merged has to be merged again. Raises MemoryError, with
        nothing changed, if the copies would not fit; ``force=True`` tries all the same.
        """
        require(
            (self.counters().pages_sharing or 0) * _sys.PAGE_SIZE,
            "unmerging the whole host",
            force=force,
        )
        return self.tune(run=2)

    def tune(self, **knobs: int | str) -> Undo:
        """Set knobs by the kernel's names; all of them, or none if one is refused.

        While several ask for the same knob the strongest wins: most ``pages_to_scan``, least
        ``sleep_millisecs``, ``smart_scan=0``, ``run`` 2 before 1 before 0, the last asker of
        ``advisor_mode``; the last one out puts the original back. Undoing warns
        (RuntimeWarning) of a knob that somebody else has set meanwhile and leaves it to them.

        Raises ValueError for an unknown knob or a value out of range, TypeError for one of the
        wrong type, NotSupported where the kernel lacks the knob or refuses now (``errno`` EBUSY,
        EINVAL, EACCES, EROFS), TimeoutError if another process holds the lease for 30 s. Nothing
        is changed then.
        """
        claim = self.lease.hold(self._checked(knobs))
        lease, root = self.lease, self.root

        def revert() -> None:
            for name, value in lease.release(claim).items():
                warnings.warn(
                    f"{root}/{name} is {value}: somebody else set it while pyksm held it at "
                    f"{claim.wanted[name]}, so it was left as it is",
                    RuntimeWarning,
                    stacklevel=4,
                )

        return Undo(revert, keep=claim.drop)

    def keep(self, **knobs: int | str) -> None:
        """Set knobs for good; what ``tune`` does when its Undo is ignored, but on record at once.

        Others may hold stronger requests at the moment: this is what the knobs go back to after
        them. Raises as ``tune`` does.
        """
        self.lease.keep(self._checked(knobs))

    def restore(self, *, force: bool = False) -> LeaseStatus:
        """Undo what processes that died left behind; return what still stands.

        Every other change does this first, too. ``force`` ends the requests of living processes
        as well. A knob that cannot be put back now (EBUSY while pages are merged) is raised.
        """
        self._files.try_writing()
        self.lease.restore(force=force)
        return self.lease.status()

    def lease_status(self) -> LeaseStatus:
        """Tell who holds which knob and what the originals are; changes nothing.

        Raises PermissionError where the file is not this user's to read.
        """
        return self.lease.status()

    def _checked(self, knobs: dict[str, int | str]) -> Values:
        for name in knobs:
            if name in _NAMES and name not in KNOBS:
                raise ValueError(
                    f"{name} is a counter, not a knob. The knobs are {', '.join(KNOBS)}"
                )
        wanted = check(knobs)
        self._files.try_writing(wanted)
        return wanted

    # ---- the open files ----

    def close(self) -> None:
        """Close the files; counters() fails from then on. A second call does nothing."""
        with self._lock:
            self._is_closed = True
            self._close_files()

    def __del__(self) -> None:
        """Close the files."""
        if getattr(self, "_is_open", False):
            self._close_files()

    def _close_files(self) -> None:
        fds = self._fds if self._mode_fd is None else (*self._fds, self._mode_fd)
        self._fds, self._mode_fd, self._is_open = (), None, False
        for fd in fds:
            os.close(fd)

    def _open(self) -> None:
        if self._is_closed:
            raise ValueError("this Host was closed")
        self._files.must_exist()
        # Looking at every value once, in Python, catches garbage that a fast read would not.
        present = self._files.read_all(_NAMES)
        opened: list[int] = []
        try:
            for name in _NAMES:
                if name in present:
                    opened.append(os.open(f"{self.root}/{name}", _READ))
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        names = [name for name in _NAMES if name in present]
        by_name = dict(zip(names, opened, strict=True))
        self._mode_fd = by_name.pop("advisor_mode", None)
        self._fds = tuple(by_name.values())
        self._present = tuple(name in by_name for name in _INT_NAMES)
        self._is_open = True


class _KnobFiles:
    """The text of the sysfs files; opens and closes at each use, so it needs no care."""

    def __init__(self, root: str) -> None:
        self.root = root

    def must_exist(self) -> None:
        if not os.path.isdir(self.root):
            raise NotSupported(
                f"this kernel has no KSM: {self.root} does not exist",
                hint="KSM needs a kernel built with CONFIG_KSM=y",
                errno=errno.ENOENT,
            )

    def try_writing(self, wanted: Values | None = None) -> None:
        """Raise unless all the wanted knobs are there and could be written; changes nothing."""
        self.must_exist()
        for name in wanted or ("run",):
            try:
                os.close(os.open(f"{self.root}/{name}", _WRITE))
            except OSError as error:
                raise self._refused(name, error, wanted or {}) from None

    def read(self) -> Values:
        """Return every knob this kernel has."""
        self.must_exist()
        return self.read_all(tuple(KNOBS))

    def read_all(self, names: tuple[str, ...]) -> Values:
        values = {name: self.read_one(name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def read_one(self, name: str) -> Value | None:
        """Return one file's value; None where the kernel has no such file, KsmError for garbage."""
        path = f"{self.root}/{name}"
        try:
            fd = os.open(path, _READ)
        except FileNotFoundError:
            return None
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_FILE:
                raise KsmError(f"{path} is not a file of the kernel's KSM")
            line = os.pread(fd, 256, 0).partition(b"\n")[0]
        finally:
            os.close(fd)
        if name == "advisor_mode":
            word = _word(line)
            if word in KNOBS[name].words:
                return word
        elif _INTEGER.match(line):
            return int(line)
        raise KsmError(f"{path} is not a file of the kernel's KSM: it says {line[:40]!r}")

    def write(self, name: str, value: Value) -> None:
        """Set one knob, and raise unless it then reads back as that value."""
        try:
            fd = os.open(f"{self.root}/{name}", _WRITE)
            try:
                text = f"{value}\n".encode()
                # Repeated by Python after a signal (PEP 475). That matters for run=2: a signal
                # aborts the unmerging and leaves run=0 (run_store in mm/ksm.c); writing goes on.
                os.write(fd, text)
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, len(text))  # of use where the folder is not the kernel's
            finally:
                os.close(fd)
        except OSError as error:
            raise self._refused(name, error, {name: value}) from error
        found = self.read_one(name)
        if found != value:
            raise KsmError(
                f"{self.root}/{name} reads {found!r} after {value!r} was written: either another "
                "program sets it at the same time, or this kernel cannot hold the value"
            )

    def _refused(self, name: str, error: OSError, wanted: Values) -> KsmError | OSError:
        """Say in words what an errno of these files means."""
        path, number = f"{self.root}/{name}", error.errno or 0
        asked = " ".join(f"{knob}={value}" for knob, value in wanted.items())
        command = f"sudo pyksm tune {asked}".rstrip()
        if number == errno.ENOENT:
            message = f"this kernel has no knob {name}"
            hint = f"It came with Linux {KNOBS[name].since}"
        elif number == errno.EROFS:
            message = f"{path} is read-only here"
            hint = f"That is usual in a container; on its host: {command}"
        elif number in (errno.EACCES, errno.EPERM):
            message = f"changing {path} needs root"
            hint = f"Ask an administrator to: {command}"
        elif number == errno.EBUSY:
            message = f"the kernel refuses to change {name} while any page of the host is merged"
            hint = "Unmerge first: sudo pyksm tune run=2"
        elif number == errno.EINVAL and name == "pages_to_scan":
            message = "pages_to_scan cannot be set while advisor_mode is scan-time"
            hint = "Ask for advisor_mode='none' as well"
        elif number in (errno.EISDIR, errno.ENOTDIR, errno.ENXIO):
            return KsmError(f"{path} is not a file of the kernel's KSM")
        else:
            return OSError(number, f"{os.strerror(number)} when setting {name} ({asked})", path)
        return NotSupported(message, hint=hint, errno=number)


def _word(text: bytes) -> str:
    """Return the chosen word of ``[none] scan-time``; the only word where none is in brackets."""
    chosen = re.search(rb"\[(.+?)\]", text)
    return (chosen[1] if chosen else text.partition(b"\n")[0].strip()).decode("ascii", "replace")


def _stats(counters: HostCounters) -> HostStats:
    tree = (
        counters.pages_shared,
        counters.pages_sharing,
        counters.pages_unshared,
        counters.pages_volatile,
    )
    zero = (counters.ksm_zero_pages or 0) * _sys.PAGE_SIZE
    zero_bytes = None if counters.ksm_zero_pages is None else zero
    shared, sharing = tree[:2]
    if shared is None or sharing is None or None in tree:
        return HostStats(
            nbytes=None,
            merged_bytes=None,
            saved_bytes=None,
            zero_bytes=zero_bytes,
            overhead_bytes=None,
            source="counters",
            counters=counters,
        )
    # pages_volatile is what is left of the rmap_items, so their sum is all of them.
    tracked = sum(count for count in tree if count is not None)
    overhead = _ITEM_BYTES * (tracked + shared + (counters.stable_node_chains or 0))
    return HostStats(
        nbytes=tracked * _sys.PAGE_SIZE,
        merged_bytes=(shared + sharing) * _sys.PAGE_SIZE + zero,
        saved_bytes=sharing * _sys.PAGE_SIZE + zero - overhead,
        zero_bytes=zero_bytes,
        overhead_bytes=overhead,
        source="counters",
        counters=counters,
    )


def _lease_name(root: str) -> str:
    """Return the lease file's name; another folder's knobs must not mix with this kernel's."""
    path = os.path.realpath(root)
    return "ksm" if path == _SYSFS else f"ksm-{hashlib.sha256(path.encode()).hexdigest()[:12]}"


def _find_ksmd(proc: str) -> str | None:
    try:
        pids = [name for name in os.listdir(proc) if name.isdigit()]
    except OSError:
        return None
    for pid in sorted(pids, key=int):
        with contextlib.suppress(OSError, IndexError):
            with open(f"{proc}/{pid}/stat", "rb") as file:
                head, _, rest = file.read().rpartition(b")")
            if head.endswith(b"(ksmd") and rest.split()[1] == b"2":  # a child of kthreadd
                return f"{proc}/{pid}"
    return None


def _cpu_seconds(folder: str) -> float:
    try:
        with open(f"{folder}/schedstat", "rb") as file:  # CONFIG_SCHED_INFO: nanoseconds
            return int(file.read().split()[0]) / 1e9
    except FileNotFoundError:
        with open(f"{folder}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime


_hosts: weakref.WeakSet[Host] = weakref.WeakSet()


def _watch_forks(host: Host, _registered: list[bool] = []) -> None:  # noqa: B006 - a flag
    if not _registered:
        os.register_at_fork(after_in_child=_in_forked_child)
        _registered.append(True)
    _hosts.add(host)


def _in_forked_child() -> None:
    for host in list(_hosts):
        host._lock = threading.Lock()  # a thread of the parent may have held it


for _public in (Host, HostCounters, HostStats):
    _public.__module__ = "pyksm"
