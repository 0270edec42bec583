"""The verbs over any mix of buffers, regions, processes and the host."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable
from typing import TypeAlias

from pyksm.errors import NotSupported
from pyksm.host import Host
from pyksm.process import Process
from pyksm.region import Region, ask
from pyksm.result import Skipped
from pyksm.settling import Progress, SettleResult
from pyksm.settling import settle as settle_targets
from pyksm.undo import Undo

__all__ = ["merge", "settle", "settle_async", "unmerge"]

Noun: TypeAlias = Region | Process | Host


def merge(obj: object) -> Undo:
    """Let the kernel merge the memory of an object, or of each in a list or tuple.

    Short for ``Region(obj).merge()``; regions, processes and the host may be among them. All or
    nothing: if one is refused, the others are undone. What is too small or of a kind that KSM
    skips is in the ``skipped`` of the Undo; NotSupported is raised if that is everything.

    >>> weights = bytearray(1 << 20)
    >>> with pyksm.merge(weights) as undo:
    ...     undo.skipped
    ()
    """
    return _ask_all(obj, want=True)


def unmerge(obj: object, *, force: bool = False) -> Undo:
    """Keep the memory of an object, or of each in a list or tuple, from merging.

    Short for ``Region(obj).unmerge()``. Pages already merged get their own copies back, at about
    half a second a GiB; MemoryError is raised, with nothing changed, if they would not fit, and
    ``force=True`` tries all the same.
    """
    return _ask_all(obj, want=False, force=force)


def settle(
    obj: object,
    *,
    timeout: float | None = None,
    cpu: float = 1.0,
    progress: Progress | None = None,
    host: Host | None = None,
    stop: threading.Event | None = None,
) -> SettleResult:
    """Make merging happen now; return when it has.

    ``obj`` is memory, a region, a process, the host, or a list or tuple of such. Raises ksmd's
    speed within ``cpu`` (a share of one core, 0 to 1), switches ``smart_scan`` off meanwhile,
    watches live figures and returns within a lap of the last merge; every knob is back then.
    ``timeout`` is in seconds; running out of it is a result (``converged`` is False), not an
    error. ``progress`` is called now and then with the fraction done and bytes merged a second;
    ``stop`` ends it early, as a timeout does.

    Without the right to write /sys/kernel/mm/ksm it waits at the host's own pace, if ksmd runs;
    NotSupported if it does not. Raises ValueError for a cpu share or timeout out of range.
    """
    host = Host() if host is None else host
    return settle_targets(_nouns(obj), host, timeout=timeout, cpu=cpu, progress=progress, stop=stop)


async def settle_async(
    obj: object,
    *,
    timeout: float | None = None,
    cpu: float = 1.0,
    progress: Progress | None = None,
    host: Host | None = None,
) -> SettleResult:
    """Settle without blocking the event loop; cancelling puts the knobs back before it returns."""
    stop = threading.Event()
    work = asyncio.ensure_future(
        asyncio.to_thread(
            settle, obj, timeout=timeout, cpu=cpu, progress=progress, host=host, stop=stop
        )
    )
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(Exception):
            await work
        raise


def _nouns(obj: object) -> list[Noun]:
    return [o if isinstance(o, Noun) else Region(o) for o in _each(obj)]


def _each(obj: object) -> Iterable[object]:
    return obj if isinstance(obj, (list, tuple)) else (obj,)


def _ask_all(obj: object, *, want: bool, force: bool = False) -> Undo:
    if not isinstance(obj, (list, tuple)):
        return _one(obj, want, force)
    if not obj:
        raise ValueError("an empty list: expected at least one object with memory")
    regions, others, too_small = _sort(obj)
    undos: list[Undo] = []
    try:
        if regions:
            undos.append(ask(regions, want=want, force=force))
        undos += [_one(other, want, force) for other in others]
        if not undos:
            raise NotSupported(too_small[0].reason, hint=too_small[0].hint)
    except BaseException:
        Undo.all(undos).undo()
        raise
    joined = Undo.all(undos)
    joined.skipped += tuple(too_small)
    return joined


def _one(obj: object, want: bool, force: bool) -> Undo:
    noun = obj if isinstance(obj, Noun) else Region(obj)
    return noun.merge() if want else noun.unmerge(force=force)


def _sort(objects: Iterable[object]) -> tuple[list[Region], list[Noun], list[Skipped]]:
    """Part regions from other nouns and from what holds no whole page."""
    regions: list[Region] = []
    others: list[Noun] = []
    too_small: list[Skipped] = []
    for obj in objects:
        if isinstance(obj, (Process, Host)):
            others.append(obj)
            continue
        try:
            regions.append(obj if isinstance(obj, Region) else Region(obj))
        except NotSupported as error:
            too_small.append(
                Skipped(
                    address=None,
                    nbytes=0,
                    code="too-small",
                    reason=str(error.args[1]),
                    hint=error.hint,
                )
            )
    return regions, others, too_small
