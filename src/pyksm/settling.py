"""Merge now: a burst of scanning within a CPU share, the knowing when it is done, the putting back.

KSM has no "merge now". A page is looked up in the trees only on the second lap that finds it
unchanged, so the least is two laps after the mark (mm/ksm.c, cmp_and_merge_page); and with
smart_scan, on by default since Linux 6.7, pages seen too often unmerged are looked at only every
ninth lap, in which two late duplicates may never meet (should_skip_rmap_item).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from pyksm.errors import NotSupported
from pyksm.result import Result
from pyksm.undo import Undo

__all__ = ["Progress", "SettleResult", "Target", "Unmerged", "explain", "settle"]

Progress = Callable[[float, float], None]
"""Called with the fraction done (0 to 1) and the rate so far, in bytes merged a second."""

FEWEST_LAPS = 3
"""The lap under way when we start may have passed our pages; then one lap notes their checksums
and one merges them."""

POLL_SECONDS = 0.002
LOOK_SECONDS = 0.05
"""Between two looks at the targets' own figures, which cost the kernel a walk of page tables."""

BURST_PAGES = 5000
"""Pages a batch with the whole core allowed: at 1.3-3 us a page a batch lasts about 10 ms, and
that is how long a write to ``run`` waits for ksmd's mutex (run_store in mm/ksm.c)."""

PAUSE_MILLISECS = 10
STEER_SECONDS = 0.1


class Target(Protocol):
    """What can be settled: a region, a process, the host."""

    def _scope(self) -> Scope:
        """Read the live figures that tell whether merging has ended."""

    def _unmerged(self) -> list[Unmerged]:
        """Say what did not merge, and why."""

    def stats(self) -> Saving:
        """Tell what merging saves."""

    def _keep_small(self) -> None:
        """Keep khugepaged from gathering what will be merged into huge pages again."""


class Scanner(Protocol):
    """What settle needs of :class:`pyksm.Host`, which settles too and so imports this room."""

    @property
    def running(self) -> bool:
        """Whether ksmd scans."""

    @property
    def writable(self) -> bool:
        """Whether this process may change knobs."""

    def counters(self) -> Laps:
        """Read the counters."""

    def tune(self, **knobs: int | str) -> Undo:
        """Set knobs until undone."""

    def ksmd_cpu_seconds(self) -> float | None:
        """Return ksmd's CPU time."""


class Laps(Protocol):
    """The counters and knobs that settle looks at."""

    @property
    def full_scans(self) -> int | None:
        """Laps ended."""

    @property
    def smart_scan(self) -> int | None:
        """None before Linux 6.7."""

    @property
    def advisor_mode(self) -> str | None:
        """None before Linux 6.8."""


class Saving(Protocol):
    """The one figure that settle needs of a target's stats."""

    @property
    def saved_bytes(self) -> int | None:
        """Physical memory saved, net."""


@dataclass(frozen=True, slots=True)
class Scope:
    """How far a target is, live: bytes that could merge (resident and marked), bytes merged."""

    candidates: int
    merged: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmerged(Result):
    """Memory that did not merge: how much, and why."""

    code: str
    nbytes: int
    reason: str


def explain(*, unmarked: int, untouched: int, single: int) -> list[Unmerged]:
    """Name the bytes that did not merge by the reason."""
    reasons = [
        ("unmarked", unmarked, "not marked for merging: merge() it first"),
        ("untouched", untouched, "never written, so there is no page to merge"),
        ("single", single, "no identical page was found, or the content kept changing"),
    ]
    return [
        Unmerged(code=code, nbytes=nbytes, reason=reason)
        for code, nbytes, reason in reasons
        if nbytes > 0
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class SettleResult(Result):
    """How far merging came, what it cost, and what did not merge."""

    converged: bool
    """False if the time ran out first."""
    nbytes: int
    """Bytes that could have merged: resident and marked."""
    merged_bytes: int
    saved_bytes: int | None
    """Physical memory the targets save now, net of 64 bytes a tracked page."""
    seconds: float
    laps: int
    """Scans of all marked memory of the host that ended meanwhile (``full_scans``)."""
    ksmd_cpu_seconds: float | None
    unmerged: tuple[Unmerged, ...]
    burst: bool
    """Whether the scan was sped up; without the right to write sysfs it runs at the host's pace."""


@dataclass(slots=True)
class Convergence:
    """Decide from what is merged at the end of each lap whether more laps would merge more."""

    before: int
    merged: list[int] = field(default_factory=list)

    def lap_ended(self, merged: int) -> bool:
        """Note a lap; True if it brought nothing, and enough laps have passed to tell.

        As long as nothing has merged at all one lap more is given: a process is put behind the
        cursor when it first marks memory, so the first lap may pass it by (__ksm_enter).

        Memory that others keep writing merges and breaks for ever: a gain below one part in two
        thousand of what is merged is taken for that.
        """
        self.merged.append(merged)
        if len(self.merged) < FEWEST_LAPS + (merged <= self.before):
            return False
        gain = merged - max(self.merged[:-1])
        return gain <= merged // 2000


def settle(
    targets: Iterable[Target],
    host: Scanner,
    *,
    timeout: float | None = None,
    cpu: float = 1.0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> SettleResult:
    """Make merging of the targets happen now; :func:`pyksm.settle` is this for any objects."""
    targets = list(targets)
    if not targets:
        raise ValueError("nothing to settle: expected at least one region, process or host")
    _validate(timeout, cpu)
    run = _Run(host, targets, timeout, progress, stop)
    for target in targets:
        target._keep_small()
    with _burst(host, cpu) as steer:
        run.wait(steer)
    return run.result(burst=steer is not None)


def _validate(timeout: float | None, cpu: float) -> None:
    if isinstance(cpu, bool) or not isinstance(cpu, (int, float)):
        raise TypeError(f"cpu is a share of one core, a number, not {type(cpu).__name__}")
    if not 0 < cpu <= 1:
        raise ValueError(f"cpu={cpu}: a share of one core is over 0 and at most 1 (ksmd is one)")
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout is in seconds, a number, not {type(timeout).__name__}")
    if not timeout >= 0:
        raise ValueError(f"timeout={timeout}: expected seconds, 0 or more")


class _Run:
    """One call of settle: the waiting and the counting."""

    def __init__(
        self,
        host: Scanner,
        targets: list[Target],
        timeout: float | None,
        progress: Progress | None,
        stop: threading.Event | None,
    ) -> None:
        self.host = host
        self.targets = targets
        self.progress = progress
        self.stop = stop
        self.started = time.monotonic()
        self.deadline = None if timeout is None else self.started + timeout
        self.cpu_before = host.ksmd_cpu_seconds()
        self.laps = 0
        self.converged = False
        self.before = self.look()

    def look(self) -> Scope:
        scopes = [target._scope() for target in self.targets]
        return Scope(
            sum(scope.candidates for scope in scopes), sum(scope.merged for scope in scopes)
        )

    def wait(self, steer: Steer | None) -> None:
        """Return when a lap brings nothing more, everything is merged, or the time is up."""
        convergence = Convergence(self.before.merged)
        lap = self.full_scans()
        next_look = time.monotonic() + LOOK_SECONDS
        while not self.is_time_up():
            time.sleep(POLL_SECONDS)
            ended = (now := self.full_scans()) != lap
            if not ended and time.monotonic() < next_look:
                continue
            scope = self.look()
            if ended:
                self.laps += max(1, now - lap)  # run=2 by somebody else resets it
                lap = now
            self.report(scope)
            if scope.merged >= scope.candidates > 0 or (
                ended and convergence.lap_ended(scope.merged)
            ):
                self.converged = True
                return
            if steer is not None:
                steer()
            next_look = time.monotonic() + LOOK_SECONDS

    def full_scans(self) -> int:
        return self.host.counters().full_scans or 0

    def is_time_up(self) -> bool:
        if self.stop is not None and self.stop.is_set():
            return True
        return self.deadline is not None and time.monotonic() >= self.deadline

    def report(self, scope: Scope) -> None:
        if self.progress is None:
            return
        seconds = time.monotonic() - self.started
        rate = max(0, scope.merged - self.before.merged) / seconds if seconds else 0.0
        by_laps = self.laps / (FEWEST_LAPS + 1)
        by_bytes = scope.merged / scope.candidates if scope.candidates else 1.0
        self.progress(min(1.0, max(by_laps, by_bytes)), rate)

    def result(self, *, burst: bool) -> SettleResult:
        seconds = time.monotonic() - self.started
        cpu_after = self.host.ksmd_cpu_seconds()
        cpu = None
        if self.cpu_before is not None and cpu_after is not None:
            cpu = cpu_after - self.cpu_before
        scope = self.look()
        if self.progress is not None and self.converged:
            self.progress(1.0, max(0, scope.merged - self.before.merged) / seconds)
        return SettleResult(
            converged=self.converged,
            nbytes=scope.candidates,
            merged_bytes=scope.merged,
            saved_bytes=_saved(self.targets),
            seconds=seconds,
            laps=self.laps,
            ksmd_cpu_seconds=cpu,
            unmerged=tuple(item for target in self.targets for item in target._unmerged()),
            burst=burst,
        )


def _saved(targets: list[Target]) -> int | None:
    total = 0
    for target in targets:
        saved = target.stats().saved_bytes
        if saved is None:
            return None
        total += saved
    return total


# ---- the burst ----

Steer = Callable[[], None]


@contextlib.contextmanager
def _burst(host: Scanner, cpu: float) -> Iterator[Steer | None]:
    """Speed ksmd up for the body; yields what holds it at its CPU share, None without the right."""
    if not host.writable:
        if not host.running:
            raise NotSupported(
                "ksmd is not running, and this process may not start it",
                hint="An administrator can: sudo pyksm tune run=1",
            )
        yield None
        return
    throttle = _Throttle(host, cpu)
    try:
        yield throttle.steer
    finally:
        throttle.release()


class _Throttle:
    """Hold ksmd at a share of one core by the size of its batches, measured as it goes."""

    def __init__(self, host: Scanner, cpu: float) -> None:
        self.host = host
        self.cpu = cpu
        self.pages = BURST_PAGES if cpu == 1 else max(1, round(BURST_PAGES * cpu))
        self.request = self._ask()
        self.measured = time.monotonic(), host.ksmd_cpu_seconds()

    def _ask(self) -> Undo:
        knobs: dict[str, int | str] = {
            "run": 1,
            "pages_to_scan": self.pages,
            "sleep_millisecs": 0 if self.cpu == 1 else PAUSE_MILLISECS,
        }
        counters = self.host.counters()
        if counters.smart_scan is not None:
            knobs["smart_scan"] = 0
        if counters.advisor_mode is not None:
            knobs["advisor_mode"] = "none"
        return self.host.tune(**knobs)

    def steer(self) -> None:
        """Correct the batch size by what ksmd has really used since the last correction."""
        if self.cpu == 1:
            return
        then, used_then = self.measured
        now, used = time.monotonic(), self.host.ksmd_cpu_seconds()
        if used is None or used_then is None or now - then < STEER_SECONDS:
            return
        share = (used - used_then) / (now - then)
        self.measured = now, used
        pages = max(1, round(self.pages * min(2.0, max(0.5, self.cpu / max(share, 1e-3)))))
        if pages != self.pages:
            self.pages = pages
            before, self.request = self.request, self._ask()  # never back to the host's own pace
            before.undo()

    def release(self) -> None:
        self.request.undo()


SettleResult.__module__ = Unmerged.__module__ = "pyksm"
