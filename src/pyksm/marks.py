"""The ledger of this process's marks: who asked for which pages, and what was there before.

The kernel keeps one bit a mapping (VM_MERGEABLE). Several askers of the same pages, the undoing
of them in any order, memory that dies, and the process-wide switch, which wipes every mark, need
more: for each span of pages the ledger keeps the state found and the claims made since, oldest
first. The newest claim holds. The spans are advised whenever what holds changes.

A claim ends when its Undo is undone or when its memory dies, whichever comes first. An Undo that
was thrown away leaves its claim for as long as the memory lives.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyksm import _buffer, _sys
from pyksm.errors import NotSupported
from pyksm.headroom import require
from pyksm.result import Skipped
from pyksm.smaps import Mapping, read_mappings, why_never

__all__ = ["Claim", "Ledger", "Piece", "Range", "Span", "Switch", "advise", "keep_small", "ledger"]

Range = tuple[int, int]

UNMERGE_STEP = 2 << 20
"""Un-sharing holds the mmap lock for writing, about 0.5 s a GiB; in steps it never holds long."""


def advise(start: int, end: int, merge: bool) -> None:
    """Mark or unmark [start, end), the latter in steps that let others at the mmap lock."""
    if merge:
        _sys.madvise(start, end - start, _sys.MERGEABLE)
        return
    for step in range(start, end, UNMERGE_STEP):
        _sys.madvise(step, min(UNMERGE_STEP, end - step), _sys.UNMERGEABLE)


def merged_bytes(ranges: list[Range]) -> int:
    """Return how much of the ranges lies in KSM pages now, at most (smaps tells by mapping)."""
    if not ranges:
        return 0
    ranges = sorted(ranges)
    total = 0
    for mapping in read_mappings("/proc/self/smaps", ranges[0][0], ranges[-1][1]):
        inside = sum(
            max(0, min(mapping.end, end) - max(mapping.start, start)) for start, end in ranges
        )
        total += min(inside, mapping.bytes_of("KSM") or 0)
    return total


class Piece(NamedTuple):
    """Pages [start, end) and the object whose death frees them."""

    start: int
    end: int
    owner: object


class Claim:
    """One request to merge, or not to merge, some pages of one owner."""

    __slots__ = ("__weakref__", "ended", "kept", "owner", "ranges", "reference", "want")

    def __init__(self, ranges: list[Range], want: bool, owner: object) -> None:
        self.ranges = ranges
        self.want = want
        self.kept = False
        self.ended = False
        self.owner: object = None
        self.reference: weakref.ref[Any] | None = None
        try:
            self.reference = weakref.ref(owner)
        except TypeError:  # bytes, bytearray: they cannot tell when they die, so they must not
            self.owner = owner

    def watch(self, died: Callable[[Claim], None]) -> None:
        """Have ``died`` called with this claim just before the owner's memory is freed."""
        owner = self.reference() if self.reference is not None else None
        if owner is not None:
            self.reference = weakref.ref(owner, lambda _: died(self))

    def holder(self) -> object:
        """Return the owner, or None once it is gone."""
        return self.owner if self.reference is None else self.reference()

    def hold(self) -> memoryview | bool:
        """Hold the owner's memory where it is, for the time of an advice; False if it has gone.

        An mmap or a Buffer can be closed, and a bytearray resized, while the object lives on.
        """
        owner = self.holder()
        if owner is None:
            return False
        try:
            view = memoryview(owner)  # type: ignore[arg-type]
        except TypeError:
            return True
        except (ValueError, BufferError):
            return hasattr(owner, "__array_interface__")  # a dtype PEP 3118 has no name for
        if not view.contiguous:
            return True
        start = _sys.address_of(view)
        inside = start <= self.ranges[0][0] and self.ranges[-1][1] <= start + view.nbytes
        return view if inside else False

    def same_owner(self, other: Claim) -> bool:
        """Tell whether both are about the memory of one living object."""
        owner = self.holder()
        return owner is not None and owner is other.holder()


@dataclass(slots=True, eq=False)
class Span:
    """Pages that share a history: what was found, and the claims since, oldest first.

    ``found`` is True for a mark somebody else made, False for an opt-out of somebody else, and
    None where nobody had asked, so that the process-wide switch decides.
    """

    start: int
    end: int
    found: bool | None
    claims: tuple[Claim, ...]


class Ledger:
    """All claims of this process; one instance, :data:`ledger`.

    Locking: one re-entrant lock around everything. Memory may die, and call back, at any
    allocation inside our own locked code; such a death unmarks its pages at once and leaves the
    book-keeping to the next caller.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._spans: list[Span] = []
        self._orphans: list[Claim] = []
        self.switches: list[Switch] = []
        self._switched_from = False
        self._marked_before: list[Range] = []
        self._watching_forks = False

    # ---- the door ----

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._watching_forks:
            self._watching_forks = True
            os.register_at_fork(after_in_child=self._after_fork)
        with self._lock:
            outer, self._holder = self._holder, threading.get_ident()
            try:
                self._sweep()
                yield
            finally:
                self._holder = outer

    def claim(
        self, pieces: Sequence[Piece], want: bool, *, force: bool = False
    ) -> tuple[list[Claim], list[Skipped]]:
        """Make the pages of the pieces mergeable or not, and look whether they are.

        Returns a claim for each piece that has one, and what the kernel will not merge. Raises
        NotSupported if that is everything, OSError as madvise(2) does (EAGAIN: vm.max_map_count);
        nothing is changed then. MemoryError: see :mod:`pyksm.headroom`; ``force`` skips that.
        """
        with self._locked():
            lowest, highest = min(p.start for p in pieces), max(p.end for p in pieces)
            mappings = list(read_mappings("/proc/self/smaps", lowest, highest))
            claims, skipped = [], []
            for piece in pieces:
                self._strike_gone(self._overlapping(piece.start, piece.end))
                ranges = [(piece.start, piece.end)]
                if want:
                    ranges, never = _eligible(mappings, piece.start, piece.end)
                    skipped += never
                if ranges:
                    self._cover(ranges, mappings)
                    claims.append(Claim(ranges, want, piece.owner))
            if not claims:
                raise _refusal(skipped)
            self._change(claims, _with, force=force)
            if want:
                self._prove(claims)
            for claim in claims:
                claim.watch(self._owner_died)
            return claims, skipped

    def end(self, claims: Iterable[Claim]) -> None:
        """Take claims back; the pages become what the other claims, or the past, want."""
        with self._locked():
            standing = [claim for claim in claims if not claim.ended]
            held = [claim.hold() for claim in standing]
            there = [c for c, hold in zip(standing, held, strict=True) if hold is not False]
            self._change(there, _without)
            for claim in standing:
                self._strike(claim)

    def spans(self, start: int, end: int) -> list[Span]:
        """Return the spans that overlap [start, end), with their claims."""
        with self._locked():
            return self._overlapping(start, end)

    # ---- the process-wide switch ----

    def switch(self, on: bool, *, force: bool = False) -> Switch:
        """Ask for PR_SET_MEMORY_MERGE on or off; what pyksm's own claims want stays so."""
        with self._locked():
            self._fold_kept_switches()
            if not self.switches:
                self._switched_from = _sys.get_memory_merge()
            switch = Switch(on)
            self._throw(on, force=force)
            self.switches.append(switch)
            return switch

    def _fold_kept_switches(self) -> None:
        """Make the newest kept request what later ones go back to; older ones never hold again."""
        kept = [index for index, switch in enumerate(self.switches) if switch.kept]
        if kept:
            self._switched_from = self.switches[kept[-1]].on
            del self.switches[: kept[-1] + 1]

    def end_switch(self, switch: Switch) -> None:
        """Take a process-wide request back; the newest of those left holds."""
        with self._locked():
            if switch not in self.switches:
                return
            left = [other for other in self.switches if other is not switch]
            self._throw(left[-1].on if left else self._switched_from)
            self.switches = left

    def _throw(self, on: bool, *, force: bool = False) -> None:
        if _sys.get_memory_merge() == on:
            return
        if on:
            self._marked_before = self._foreign_marks()
            _sys.set_memory_merge(True)
        else:
            marked = [m for m in read_mappings("/proc/self/smaps") if m.mergeable]
            needed = sum(mapping.bytes_of("KSM") or 0 for mapping in marked)
            require(needed, "switching whole-process merging off", force=force)
            for mapping in marked:  # in steps, before the kernel does it in one long hold
                with contextlib.suppress(OSError):  # another thread unmapped it
                    advise(mapping.start, mapping.end, merge=False)
            _sys.set_memory_merge(False)
            self._remark()
        held = self._strike_gone(self._spans)
        for span in self._spans:
            self._apply(span)
        del held

    def _foreign_marks(self) -> list[Range]:
        """Return what is marked now and is neither pyksm's memory nor in the ledger."""
        ours = sorted([*_own_memory(), *((span.start, span.end) for span in self._spans)])
        marked = [(m.start, m.end) for m in read_mappings("/proc/self/smaps") if m.mergeable]
        return [piece for start, end in marked for piece in _minus(start, end, ours)]

    def _remark(self) -> None:
        """Put back the marks that PR_SET_MEMORY_MERGE 0 wiped (mm/ksm.c, ksm_disable)."""
        for start, end in [*_own_memory(), *self._marked_before]:
            with contextlib.suppress(OSError):  # unmapped meanwhile, wholly or in part
                advise(start, end, merge=True)
        self._marked_before = []

    # ---- spans ----

    def _overlapping(self, start: int, end: int) -> list[Span]:
        first = bisect_right(self._spans, start, key=lambda span: span.end)
        last = first
        while last < len(self._spans) and self._spans[last].start < end:
            last += 1
        return self._spans[first:last]

    def _cover(self, ranges: list[Range], mappings: list[Mapping]) -> None:
        """Have spans that begin and end exactly at the ranges' ends, new ones as found."""
        by_process = _process_wide()
        for start, end in ranges:
            self._split(start)
            self._split(end)
            known = [(span.start, span.end) for span in self._overlapping(start, end)]
            for hole_start, hole_end in _minus(start, end, known):
                for mapping in _inside(mappings, hole_start, hole_end):
                    piece = max(mapping.start, hole_start), min(mapping.end, hole_end)
                    found = _found(mapping.mergeable, by_process)
                    insort(self._spans, Span(*piece, found, ()), key=lambda span: span.start)

    def _split(self, edge: int) -> None:
        index = bisect_right(self._spans, edge, key=lambda span: span.end)
        if index < len(self._spans) and self._spans[index].start < edge:
            span = self._spans[index]
            self._spans.insert(index + 1, Span(edge, span.end, span.found, span.claims))
            span.end = edge

    def _change(
        self,
        claims: list[Claim],
        change: Callable[[tuple[Claim, ...], Claim], tuple[Claim, ...]],
        *,
        force: bool = False,
    ) -> None:
        """Add or take claims; put all back if the kernel refuses one.

        Raises MemoryError, with nothing changed, if the copies that merged pages need back would
        not fit.
        """
        after: dict[Span, tuple[Claim, ...]] = {}
        for claim in claims:
            for start, end in claim.ranges:
                for span in self._overlapping(start, end):
                    after[span] = change(after.get(span, span.claims), claim)
        breaking = [
            (span.start, span.end)
            for span, claims_after in after.items()
            if self._marked(span, span.claims) and not self._marked(span, claims_after)
        ]
        require(merged_bytes(breaking), "giving merged pages their own copies back", force=force)
        before = {span: span.claims for span in after}
        try:
            for span, claims_after in after.items():
                span.claims = claims_after
                self._apply(span)
        except BaseException:
            for span, claims_before in before.items():
                span.claims = claims_before
                with contextlib.suppress(OSError):
                    self._apply(span)
            raise
        finally:
            self._forget_idle()

    def _marked(self, span: Span, claims: tuple[Claim, ...]) -> bool:
        wanted = claims[-1].want if claims else span.found
        return _process_wide() if wanted is None else wanted

    def _apply(self, span: Span) -> None:
        advise(span.start, span.end, self._marked(span, span.claims))

    def _forget_idle(self) -> None:
        self._spans = [span for span in self._spans if span.claims]

    def _prove(self, claims: list[Claim]) -> None:
        """Look for ``mg``: the kernel answers 0 to much that it does not do."""
        ranges = sorted(one for claim in claims for one in claim.ranges)
        for mapping in read_mappings("/proc/self/smaps", ranges[0][0], ranges[-1][1]):
            if not mapping.mergeable and _overlap_any(ranges, mapping.start, mapping.end):
                self.end(claims)
                raise NotSupported(
                    f"madvise(MADV_MERGEABLE) answered 0 but {mapping.start:#x}-{mapping.end:#x} "
                    f"is not marked (no mg in VmFlags: {' '.join(sorted(mapping.flags))})",
                    hint="Please report this mapping to pyksm",
                )

    # ---- deaths and forks ----

    def _owner_died(self, claim: Claim) -> None:
        """Unmark memory that is about to be freed, or its heap would be merged unasked."""
        if claim.ended:
            return
        if self._holder == threading.get_ident():
            self._orphans.append(claim)
            for start, end in claim.ranges:
                with contextlib.suppress(OSError):
                    advise(start, end, _process_wide())
            return
        with self._locked():
            with contextlib.suppress(OSError):  # unmapped already
                self._change([claim], _without, force=True)  # death cannot be refused
            self._strike(claim)

    def _sweep(self) -> None:
        """Do the book-keeping of deaths and of thrown-away Undos."""
        while self._orphans:
            self._strike(self._orphans.pop())

    def _strike_gone(self, spans: list[Span]) -> list[memoryview | bool]:
        """Strike the claims whose memory was closed or moved; hold that of the others."""
        claims = {claim for span in spans for claim in span.claims}
        held = {claim: claim.hold() for claim in claims}
        for claim, hold in held.items():
            if hold is False:
                self._strike(claim)
        return list(held.values())

    def _strike(self, claim: Claim) -> None:
        """Take a claim out of the book without a word to the kernel: its memory has gone."""
        for span in self._spans:
            if claim in span.claims:
                span.claims = _without(span.claims, claim)
        self._forget_idle()
        claim.ended = True
        claim.reference = claim.owner = None

    def _after_fork(self) -> None:
        """In the child: the marks are its own now, and no Undo of the parent's can reach them."""
        self._lock = threading.RLock()
        self._holder = None
        for span in self._spans:
            for claim in span.claims:
                claim.kept = True
        for switch in self.switches:
            switch.kept = True


class Switch:
    """One request to switch the whole process on or off."""

    __slots__ = ("kept", "on")

    def __init__(self, on: bool) -> None:
        self.on = on
        self.kept = False

    def keep(self) -> None:
        """Note that nobody can undo this any more."""
        self.kept = True


def _with(claims: tuple[Claim, ...], claim: Claim) -> tuple[Claim, ...]:
    """Add a claim; one that was kept can never hold again below a later kept one, so it goes."""
    left = [
        older
        for index, older in enumerate(claims)
        if not (older.kept and any(c.kept and c.same_owner(older) for c in claims[index + 1 :]))
    ]
    return (*left, claim)


def _without(claims: tuple[Claim, ...], claim: Claim) -> tuple[Claim, ...]:
    return tuple(other for other in claims if other is not claim)


def _found(marked: bool, by_process: bool) -> bool | None:
    """Tell whether somebody asked for the state found, or the process-wide switch made it."""
    return None if marked == by_process else marked


def _process_wide() -> bool:
    try:
        return _sys.get_memory_merge()
    except OSError:  # before Linux 6.4
        return False


def _own_memory() -> list[Range]:
    """Return the marked memory that pyksm itself has mapped: Buffers and numpy's arena."""
    arena = sys.modules.get("pyksm._numpy")  # loading it would load numpy
    slabs = arena.slabs() if arena else []
    return [(address, address + nbytes) for address, nbytes in [*_buffer.live(), *slabs]]


def keep_small() -> None:
    """Switch pyksm's own memory to MADV_NOHUGEPAGE, now that it is filled and is to be merged.

    khugepaged gathers ranges of up to 256 shared pages into a huge page, un-sharing them
    (max_ptes_shared; mm/khugepaged.c).
    """
    for start, end in _own_memory():
        with contextlib.suppress(OSError):  # freed by another thread
            _sys.madvise(start, end - start, _sys.NOHUGEPAGE)


def _minus(start: int, end: int, taken: list[Range]) -> list[Range]:
    """Return the pieces of [start, end) outside the sorted ranges taken."""
    pieces = []
    for taken_start, taken_end in taken:
        if taken_end <= start or taken_start >= end:
            continue
        if taken_start > start:
            pieces.append((start, taken_start))
        start = max(start, taken_end)
    if start < end:
        pieces.append((start, end))
    return pieces


def _inside(mappings: list[Mapping], start: int, end: int) -> list[Mapping]:
    first = bisect_right(mappings, start, key=lambda mapping: mapping.end)
    return mappings[first : bisect_left(mappings, end, lo=first, key=lambda m: m.start)]


def _overlap_any(ranges: list[Range], start: int, end: int) -> bool:
    """Tell whether [start, end) meets one of the sorted, disjoint ranges."""
    index = bisect_right(ranges, (start, start))
    before = index > 0 and ranges[index - 1][1] > start
    return before or (index < len(ranges) and ranges[index][0] < end)


def _eligible(mappings: list[Mapping], start: int, end: int) -> tuple[list[Range], list[Skipped]]:
    """Split [start, end) into what the kernel merges and what it skips, and why."""
    ranges: list[Range] = []
    skipped: list[Skipped] = []
    at = start
    for mapping in _inside(mappings, start, end):
        piece = max(mapping.start, start), min(mapping.end, end)
        if piece[0] > at:
            skipped.append(_hole(at, piece[0]))
        at = piece[1]
        never = why_never(mapping)
        if never is None:
            ranges.append(piece)
        else:
            code, reason, hint = never
            skipped.append(
                Skipped(
                    address=piece[0],
                    nbytes=piece[1] - piece[0],
                    code=code,
                    reason=reason,
                    hint=hint,
                )
            )
    if at < end:
        skipped.append(_hole(at, end))
    return ranges, skipped


def _hole(start: int, end: int) -> Skipped:
    return Skipped(
        address=start, nbytes=end - start, code="unmapped", reason="nothing is mapped there"
    )


def _refusal(skipped: list[Skipped]) -> NotSupported:
    first = skipped[0]
    more = f" (and {len(skipped) - 1} more pieces)" if len(skipped) > 1 else ""
    return NotSupported(
        f"nothing here can merge: {first.reason}{more}",
        hint=first.hint[:1].upper() + first.hint[1:],
    )


ledger = Ledger()
