"""``Process``: a process, yours by default, and its ``ksm_stat`` and ``smaps``."""

from __future__ import annotations

import functools
import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

from pyksm import _sys
from pyksm.errors import NotSupported
from pyksm.frames import fork_sharing, frame_files, frames_readable, survey
from pyksm.host import Host
from pyksm.marks import keep_small, ledger
from pyksm.result import Result
from pyksm.settling import Progress, Scope, SettleResult, Unmerged, explain, settle
from pyksm.smaps import Mapping, read_mappings, read_rollup
from pyksm.undo import Undo

__all__ = ["Process", "ProcessStats"]

RMAP_ITEM = 64
"""Bytes of kernel memory for each page that ksmd tracks (struct ksm_rmap_item, mm/ksm.c)."""

ALIGNED_THRESHOLD = 64 << 10
"""glibc blocks of this size and more get a mapping of their own with ``align_heap``."""

_STAT_LINE = re.compile(rb"^(\w+):? +(\S+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessStats(Result):
    """What is merged in a process now; sizes in bytes, None where the kernel does not tell."""

    pid: int
    nbytes: int
    """Anonymous memory in RAM, all that KSM could ever look at."""
    mergeable_bytes: int
    """The part of it in mappings marked VM_MERGEABLE (``mg`` in smaps)."""
    merged_bytes: int | None
    """In KSM pages or KSM-placed zero pages, live (smaps, Linux 6.6)."""
    saved_bytes: int | None
    """Physical memory this process saves by merging, net of ``overhead_bytes``; the savings of
    processes add up. Pages that fork had shared already are not counted."""
    zero_bytes: int | None
    """The part of ``saved_bytes`` that is zero pages (``ksm_zero_pages``, Linux 6.6)."""
    overhead_bytes: int | None
    """64 bytes for each page ksmd tracks (``ksm_rmap_items``)."""
    rss_bytes: int
    """Resident memory. It does not fall when pages merge."""
    pss_bytes: int
    """Resident memory with each page divided by its mappings. It does fall."""
    exact: bool
    """Whether page frames could be read (CAP_SYS_ADMIN); if not, saved_bytes is from PSS and
    counts what fork shares as well."""
    ksm_merging_pages: int | None
    ksm_rmap_items: int | None
    ksm_zero_pages: int | None
    ksm_process_profit: int | None
    """The kernel's own figure, in bytes: it counts the first copy too, and is stale until ksmd's
    next lap."""
    ksm_merge_any: bool | None
    """Whether the whole process is opted in (PR_SET_MEMORY_MERGE; shown since Linux 6.14)."""
    ksm_mergeable: bool | None


class Process:
    """A process: yours by default, or any other by its number.

    Raises TypeError or ValueError for what is no pid, ProcessLookupError if there is none such,
    NotSupported for a kernel thread. The process is remembered by its start time as well: once it
    is gone, its number taken by another raises ProcessLookupError.

    >>> pyksm.Process().stats().pid == os.getpid()
    True
    """

    __slots__ = ("__weakref__", "_started", "pid", "proc")

    def __init__(self, pid: SupportsIndex | None = None, *, proc: str | Path = "/proc") -> None:
        """Look the process up; ``proc`` is where procfs is mounted."""
        self.proc = Path(proc)
        self.pid = os.getpid() if pid is None else _valid_pid(pid)
        self._started = self._start_time()

    @property
    def is_self(self) -> bool:
        """Whether this is the calling process."""
        return self.pid == os.getpid()

    def merge(self, *, align_heap: bool = False) -> Undo:
        """Let the kernel merge all memory of this process, also what it maps later.

        PR_SET_MEMORY_MERGE (Linux 6.4, no privilege). Inherited by children, over exec too, by
        set-uid programs as well: see the security page. What ``pyksm.unmerge`` named stays out.
        The Undo switches off again, which the kernel does by un-sharing everything (half a second
        a GiB merged), and puts back the marks that stood before.

        ``align_heap=True`` also fixes glibc's M_MMAP_THRESHOLD at 64 KiB, so that large blocks of
        every library start at the same offset in a page; without it the arrays of a process that
        has run for a while do not merge. Ask for it early: free blocks that the heap already has
        are still handed out as they lie. It has a price for programs with many short-lived large
        blocks (``benchmarks/test_align_heap.py``), and it is not undone: glibc cannot tell what
        its threshold was.

        Raises NotSupported before Linux 6.4 or without KSM (EINVAL), with ``align_heap`` where
        the C library is not glibc, and for another process.
        """
        self._only_self("merge")
        _require_switch()
        if align_heap and not _sys.set_mmap_threshold(ALIGNED_THRESHOLD):
            raise NotSupported(
                "this C library has no mallopt(M_MMAP_THRESHOLD)",
                hint="align_heap needs glibc; allocate through pyksm.allocator() instead",
            )
        return self._switch(True)

    def unmerge(self, *, force: bool = False) -> Undo:
        """Switch whole-process merging off (PR_SET_MEMORY_MERGE 0), un-sharing what is merged.

        The marks of pyksm's own live regions, which the kernel wipes, are put back. Raises
        MemoryError, with nothing changed, if the copies would not fit; ``force=True`` tries all
        the same.
        """
        self._only_self("unmerge")
        _require_switch()
        return self._switch(False, force=force)

    def _switch(self, on: bool, *, force: bool = False) -> Undo:
        switch = ledger.switch(on, force=force)
        return Undo(functools.partial(ledger.end_switch, switch), keep=switch.keep)

    def stats(self) -> ProcessStats:
        """Read what is merged in the process now, and what that saves.

        Live figures come from smaps and, with CAP_SYS_ADMIN, the page frames; the ``ksm_*``
        fields are the kernel's counters under its own names, which ksmd updates only when it next
        comes by. Raises PermissionError for a process that may not be read (another user's, or
        one that is not dumpable), ProcessLookupError once it is gone.
        """
        try:
            counters = self._counters()
            rollup = read_rollup(self._path("smaps_rollup"))
            marked = self._marked()
            saved_pages = self._saved_pages(rollup, marked)
        except PermissionError as error:
            raise PermissionError(
                error.errno,
                f"process {self.pid} may not be read: it belongs to another user or is not "
                "dumpable. Run as its user or as root",
            ) from error
        except FileNotFoundError as error:
            raise self._gone() from error
        self._still_there()
        return self._result(counters, rollup, marked, saved_pages)

    def _result(
        self,
        counters: dict[str, str],
        rollup: dict[str, int],
        marked: list[Mapping],
        saved_pages: float | None,
    ) -> ProcessStats:
        page = _sys.PAGE_SIZE
        number = {name: _number(counters.get(name)) for name in _NUMBERS}
        zeros = number["ksm_zero_pages"]
        items = number["ksm_rmap_items"]
        merged = rollup.get("KSM")
        if merged is None and number["ksm_merging_pages"] is not None:
            merged = number["ksm_merging_pages"] * page
        overhead = None if items is None else items * RMAP_ITEM
        saved = None
        if saved_pages is not None:
            saved = round((saved_pages + (zeros or 0)) * page) - (overhead or 0)
        return ProcessStats(
            pid=self.pid,
            nbytes=rollup.get("Anonymous", 0),
            mergeable_bytes=sum(mapping.bytes_of("Anonymous") or 0 for mapping in marked),
            merged_bytes=None if merged is None else merged + (zeros or 0) * page,
            saved_bytes=saved,
            zero_bytes=None if zeros is None else zeros * page,
            overhead_bytes=overhead,
            rss_bytes=rollup.get("Rss", 0),
            pss_bytes=rollup.get("Pss", 0),
            exact=frames_readable(),
            ksm_merge_any=self._merge_any(counters),
            ksm_mergeable=_flag(counters.get("ksm_mergeable")),
            **number,
        )

    def _saved_pages(self, rollup: dict[str, int], marked: list[Mapping]) -> float | None:
        if rollup.get("KSM") == 0:
            return 0.0
        if not frames_readable():
            if "Pss_Anon" not in rollup or "KSM" not in rollup:
                return None
            shared = rollup["Anonymous"] - rollup["Pss_Anon"]
            return min(shared, rollup["KSM"]) / _sys.PAGE_SIZE
        ranges = [
            (mapping.start, mapping.end) for mapping in marked if mapping.bytes_of("KSM") != 0
        ]
        with frame_files(self._path("")) as files:
            return survey(files, ranges, fork_sharing(self.pid, self.proc)).saved

    def zero_pages(self) -> int | None:
        """Return ``ksm_zero_pages``, which the kernel keeps live; None before Linux 6.6."""
        return _number(self._counters().get("ksm_zero_pages"))

    def _scope(self) -> Scope:
        """Return how far merging in this process has come, for :func:`pyksm.settle`."""
        marked = self._marked()
        zeros = (self.zero_pages() or 0) * _sys.PAGE_SIZE
        return Scope(
            candidates=sum(m.bytes_of("Anonymous") or 0 for m in marked) + zeros,
            merged=sum(m.bytes_of("KSM") or 0 for m in marked) + zeros,
        )

    def _unmerged(self) -> list[Unmerged]:
        """Say what of the marked memory has not merged, and why."""
        marked = self._marked()
        resident = sum(m.bytes_of("Anonymous") or 0 for m in marked)
        merged = sum(m.bytes_of("KSM") or 0 for m in marked)
        return explain(unmarked=0, untouched=0, single=resident - merged)

    def _keep_small(self) -> None:
        if self.is_self:
            keep_small()

    def settle(
        self,
        timeout: float | None = None,
        cpu: float = 1.0,
        progress: Progress | None = None,
    ) -> SettleResult:
        """Make merging happen now; return when it has (see :func:`pyksm.settle`)."""
        return settle([self], Host(), timeout=timeout, cpu=cpu, progress=progress)

    # ---- files ----

    def _path(self, name: str) -> Path:
        return self.proc / str(self.pid) / name

    def _marked(self) -> list[Mapping]:
        return [m for m in read_mappings(self._path("smaps")) if m.mergeable]

    def _counters(self) -> dict[str, str]:
        """Parse ksm_stat, whose lines are half "name value", half "name: value"."""
        try:
            text = self._path("ksm_stat").read_bytes()
        except FileNotFoundError:
            if not self._path("stat").exists():
                raise
            return {}  # before Linux 6.1, or a kernel without KSM
        return {found[1].decode(): found[2].decode() for found in _STAT_LINE.finditer(text)}

    def _merge_any(self, counters: dict[str, str]) -> bool | None:
        if self.is_self:
            try:
                return _sys.get_memory_merge()
            except OSError:  # before Linux 6.4
                return None
        return _flag(counters.get("ksm_merge_any"))

    def _start_time(self) -> str:
        """Return the start time in clock ticks (proc_pid_stat(5), field 22)."""
        try:
            fields = self._path("stat").read_text().rpartition(") ")[2].split()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise self._gone() from error
        if fields[0] in "ZX":
            raise ProcessLookupError(
                3, f"process {self.pid} has ended (a zombie): it holds no memory any more"
            )
        if int(fields[6]) & PF_KTHREAD:
            raise NotSupported(f"process {self.pid} is a kernel thread: it has no memory to merge")
        return fields[19]

    def _still_there(self) -> None:
        if self._start_time() != self._started:
            raise self._gone()

    def _gone(self) -> ProcessLookupError:
        return ProcessLookupError(3, f"there is no process {self.pid} (any more)")

    def _only_self(self, verb: str) -> None:
        if not self.is_self:
            self._still_there()
            raise NotSupported(
                f"{verb} of another process ({self.pid}) is not supported yet",
                hint="Call pyksm.Process().merge() inside it, or start it with merging on",
            )

    def __repr__(self) -> str:
        """Show the pid."""
        return f"<pyksm.Process {self.pid}{' (this one)' if self.is_self else ''}>"


PF_KTHREAD = 0x00200000  # include/linux/sched.h
_NUMBERS = ("ksm_merging_pages", "ksm_rmap_items", "ksm_zero_pages", "ksm_process_profit")


def _valid_pid(pid: SupportsIndex) -> int:
    if isinstance(pid, bool):
        raise TypeError("a pid is a whole number, not a bool")
    try:
        number = operator.index(pid)
    except TypeError:
        raise TypeError(f"a pid is a whole number, not {type(pid).__name__}") from None
    if not 0 < number <= 1 << 22:  # PID_MAX_LIMIT
        raise ValueError(f"{number} is no pid: pids run from 1 to {1 << 22}")
    return number


def _require_switch() -> None:
    try:
        _sys.get_memory_merge()
    except OSError as error:
        raise NotSupported(
            "this kernel has no PR_SET_MEMORY_MERGE (EINVAL)",
            hint="It came with Linux 6.4 and needs CONFIG_KSM=y; merge named memory instead: "
            "pyksm.merge(obj)",
            errno=error.errno or 0,
        ) from error


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _flag(text: str | None) -> bool | None:
    return None if text is None else text == "yes"


Process.__module__ = ProcessStats.__module__ = "pyksm"
