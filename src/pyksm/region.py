"""``Region``: the whole pages inside any buffer."""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyksm import _sys
from pyksm.errors import NotSupported
from pyksm.frames import fork_sharing, frame_files, survey
from pyksm.host import Host
from pyksm.marks import Piece, keep_small, ledger
from pyksm.process import RMAP_ITEM, Process
from pyksm.result import Result, human_bytes
from pyksm.settling import Progress, Scope, SettleResult, Unmerged, explain, settle
from pyksm.smaps import read_mappings
from pyksm.undo import Undo

__all__ = ["Region", "RegionStats"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionStats(Result):
    """What is merged of a region now; sizes in bytes, read live from the page tables."""

    nbytes: int
    """Length of the region: whole pages."""
    resident_bytes: int
    """Pages present in memory; a page never touched cannot merge."""
    mergeable_bytes: int
    """Bytes in mappings marked VM_MERGEABLE (``mg`` in smaps)."""
    merged_bytes: int | None
    """Bytes in KSM pages or KSM-placed zero pages."""
    saved_bytes: int | None
    """Physical memory saved by merging, net of 64 bytes a tracked page."""
    zero_bytes: int | None
    """The part of ``saved_bytes`` that is zero pages (only with ``use_zero_pages``)."""
    exact: bool
    """Whether page frames could be read (CAP_SYS_ADMIN); if not, from smaps' PSS."""


class Region:
    """The whole pages inside a buffer.

    ``obj`` is anything with the buffer protocol, contiguous: a :class:`pyksm.Buffer`, a numpy
    array, ``bytearray``, ``mmap``, ``memoryview``. The pages at its two ends that it shares with
    neighbours are left out. A Region holds the buffer: the memory cannot go or move while it
    lives. Read-only memory is fine, merging writes nothing.

    Raises TypeError for objects without a buffer and arrays of Python objects, ValueError for
    memory that is empty or not contiguous, NotSupported if there is no whole page in it.

    >>> buffer = pyksm.Buffer(1 << 20)
    >>> pyksm.Region(buffer)
    <pyksm.Region: 1.0 MiB of Buffer>
    """

    __slots__ = ("__weakref__", "address", "nbytes", "obj", "view")

    def __init__(self, obj: object) -> None:
        """Find the whole pages of ``obj``; nothing is changed."""
        self.obj = obj
        self.view = _flat_view(obj)
        page = _sys.PAGE_SIZE
        start = _sys.address_of(self.view)
        first = -(-start // page) * page
        last = (start + self.view.nbytes) // page * page
        if last <= first:
            raise NotSupported(
                f"{_name(obj)} of {self.view.nbytes} bytes at {start:#x} holds no whole page of "
                f"{page} bytes",
                hint="Only whole pages merge: use objects of several pages, or pyksm.copy(obj), "
                "which aligns them",
            )
        self.address = first
        self.nbytes = last - first

    def merge(self) -> Undo:
        """Let the kernel merge these pages (MADV_MERGEABLE).

        Merging itself is ksmd's work and comes later; see :meth:`settle`. The region is looked at
        afterwards: what KSM skips (shared mappings, hugetlb, clean file pages) is in the
        ``skipped`` of the result, and if that is everything, NotSupported is raised. Needs no
        privilege. The mark ends when the Undo is undone or when the memory's owner dies; owners
        without weak references (``bytes``, ``bytearray``) are kept alive until it is undone.

        Raises NotSupported (EINVAL from a kernel without KSM), OSError EAGAIN if
        vm.max_map_count leaves no room to split a mapping. Linux 2.6.32; mm/ksm.c, ksm_madvise.

        >>> with pyksm.Region(bytearray(1 << 20)).merge() as undo:
        ...     undo.nbytes >= (1 << 20) - 8192
        True
        """
        return ask([self], want=True)

    def unmerge(self, *, force: bool = False) -> Undo:
        """Keep these pages from merging, and give merged ones their own copies back.

        It holds, also while the whole process is merged, until it is undone, a later ``merge``
        names the same pages, or the memory dies. Costs about 2 us a merged page (half a second a
        GiB), in steps of 2 MiB so that no other thread waits long for the mmap lock. Raises
        MemoryError, with nothing changed, if the copies would not fit into MemAvailable or a
        memory cgroup's limit; ``force=True`` tries all the same.
        """
        return ask([self], want=False, force=force)

    def stats(self) -> RegionStats:
        """Read what is merged of these pages now, and what that saves.

        Live: read from the page tables, never from ksmd's counters, which stay stale until its
        next lap. Needs /proc/kpageflags (CAP_SYS_ADMIN) to be exact; without it the saving is
        taken from the mappings' PSS (kernel 6.18: exact for memory that was never forked).
        """
        mappings = list(read_mappings("/proc/self/smaps", self.address, self._end))
        mergeable = sum(
            min(m.end, self._end) - max(m.start, self.address) for m in mappings if m.mergeable
        )
        with frame_files("/proc/self") as files:
            inherited = fork_sharing(os.getpid()) if files.frames else ({}, set())
            pages = survey(files, [(self.address, self._end)], inherited)
        page = _sys.PAGE_SIZE
        if files.frames:
            zeros = min(pages.zero, Process().zero_pages() or 0) if mergeable else 0
            merged, saved = pages.ksm + zeros, pages.saved + zeros
        else:
            zeros = 0
            merged, saved = _from_pss(mappings, pages.shared)
        tracked = pages.present if mergeable else 0
        return RegionStats(
            nbytes=self.nbytes,
            resident_bytes=pages.present * page,
            mergeable_bytes=mergeable,
            merged_bytes=merged * page,
            saved_bytes=round(saved * page) - RMAP_ITEM * tracked,
            zero_bytes=zeros * page,
            exact=files.frames,
        )

    def _scope(self) -> Scope:
        """Return how far merging of these pages has come, for :func:`pyksm.settle`."""
        page = _sys.PAGE_SIZE
        mappings = [
            m for m in read_mappings("/proc/self/smaps", self.address, self._end) if m.mergeable
        ]
        ranges = [(max(m.start, self.address), min(m.end, self._end)) for m in mappings]
        with frame_files("/proc/self") as files:
            pages = survey(files, ranges)
        merged = pages.ksm + pages.zero if files.frames else _from_pss(mappings, pages.shared)[0]
        return Scope(candidates=pages.present * page, merged=merged * page)

    def _unmerged(self) -> list[Unmerged]:
        """Say what of these pages has not merged, and why."""
        stats = self.stats()
        return explain(
            unmarked=stats.nbytes - stats.mergeable_bytes,
            untouched=stats.mergeable_bytes - stats.resident_bytes,
            single=stats.resident_bytes - (stats.merged_bytes or 0),
        )

    def _keep_small(self) -> None:
        keep_small()

    def settle(
        self,
        timeout: float | None = None,
        cpu: float = 1.0,
        progress: Progress | None = None,
    ) -> SettleResult:
        """Make merging of these pages happen now; return when it has (see :func:`pyksm.settle`)."""
        return settle([self], Host(), timeout=timeout, cpu=cpu, progress=progress)

    @property
    def _end(self) -> int:
        return self.address + self.nbytes

    def __repr__(self) -> str:
        """Show the size and the kind of object."""
        return f"<pyksm.Region: {human_bytes(self.nbytes)} of {_name(self.obj)}>"


def ask(regions: Sequence[Region], *, want: bool, force: bool = False) -> Undo:
    """Claim the pages of several regions at once, all or none; one Undo for all."""
    if want:
        require_ksm()
    pieces = [Piece(r.address, r.address + r.nbytes, _owner(r.obj)) for r in regions]
    claims, skipped = ledger.claim(pieces, want, force=force)

    def keep() -> None:
        for claim in claims:
            claim.kept = True

    return Undo(
        functools.partial(ledger.end, claims),
        keep=keep,
        nbytes=sum(end - start for claim in claims for start, end in claim.ranges),
        skipped=skipped,
    )


def _from_pss(mappings: list[Any], shared_pages: int) -> tuple[int, float]:
    """Judge merged and saved pages without page frames, from the mappings' own KSM, RSS and PSS.

    Each page that is not exclusively mapped saves what such pages of these mappings save on
    average: (Rss - Pss) over the number of them, which ``KSM:`` bounds.
    """
    page = _sys.PAGE_SIZE
    ksm = sum(m.bytes_of("KSM") or 0 for m in mappings) // page
    unshared = sum((m.bytes_of("Rss") or 0) - (m.bytes_of("Pss") or 0) for m in mappings) / page
    merged = min(shared_pages, ksm)
    return merged, min(unshared, merged) if ksm else 0.0


@functools.cache
def require_ksm() -> None:
    """Raise NotSupported if the kernel was built without KSM (madvise answers EINVAL)."""
    try:
        _sys.madvise(0, 0, _sys.MERGEABLE)
    except OSError as error:
        raise NotSupported(
            "this kernel has no KSM (madvise(MADV_MERGEABLE): EINVAL)",
            hint="It needs CONFIG_KSM=y; run `pyksm doctor`",
            errno=error.errno or 0,
        ) from error


def _flat_view(obj: object) -> memoryview:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(obj, numpy.ndarray):
        _refuse_bad_array(obj)
    try:
        view = memoryview(obj)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{_name(obj)} has no buffer; expected memory such as a numpy array, pyksm.Buffer, "
            "bytearray or mmap. pyksm.copy(obj) moves an object's arrays into merged memory"
        ) from None
    except (ValueError, BufferError) as error:
        if numpy is None or not isinstance(obj, numpy.ndarray):
            raise ValueError(f"the memory of {_name(obj)} is not available: {error}") from error
        view = memoryview(obj.reshape(-1, order="A").view("u1"))  # dtypes PEP 3118 cannot name
    if "O" in view.format:
        raise TypeError(f"{_name(obj)} holds Python objects: their pages are pointers")
    if not view.contiguous:
        raise ValueError(
            f"{_name(obj)} is not contiguous: its memory has gaps that belong to others. "
            "Pass its base, or a contiguous copy (pyksm.copy)"
        )
    if view.nbytes == 0:
        raise ValueError(f"{_name(obj)} is empty: there is no memory to act on")
    return view


def _refuse_bad_array(array: Any) -> None:
    if array.dtype.hasobject:
        raise TypeError(
            f"an array of dtype {array.dtype} holds Python objects: its pages are pointers, "
            "which never merge usefully; expected numbers, bools, bytes or structs of them"
        )
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise ValueError(
            f"the array of shape {array.shape} and strides {array.strides} is not contiguous: "
            "its memory has gaps that belong to others. Pass its base, or pyksm.copy(array)"
        )
    if array.nbytes == 0:
        raise ValueError(f"the array of shape {array.shape} is empty: no memory to act on")


def _owner(obj: object) -> object:
    """Return the object whose death frees the memory, as far as it can be found.

    Follows memoryviews and array bases down to what owns the memory. If that cannot be weakly
    referenced, the object the caller passed stands for it: a mark must end too early rather than
    too late.
    """
    owner: object = obj
    while (below := _below(owner)) is not None:
        owner = below
    return owner if _weakly_referable(owner) or not _is_array(obj) else obj


def _below(obj: object) -> object | None:
    """Return what a view looks into."""
    if isinstance(obj, memoryview):
        return obj.obj
    return getattr(obj, "base", None) if _is_array(obj) else None


def _weakly_referable(obj: object) -> bool:
    try:
        weakref.ref(obj)
    except TypeError:
        return False
    return True


def _is_array(obj: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(obj, numpy.ndarray)


def _name(obj: object) -> str:
    return type(obj).__name__


Region.__module__ = RegionStats.__module__ = "pyksm"
