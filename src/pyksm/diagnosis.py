"""``doctor``: what keeps this host, this process or this memory from merging, and what mends it.

Each check looks at one thing and yields findings; none changes anything. The codes, their causes
and their mends are listed in the documentation (a test compares the two).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyksm import _sys
from pyksm.errors import NotSupported
from pyksm.host import Host, HostCounters
from pyksm.marks import ledger
from pyksm.process import Process
from pyksm.region import Region, require_ksm
from pyksm.result import Result, human_bytes
from pyksm.smaps import Mapping, read_mappings, why_never

__all__ = ["CODES", "SEVERITIES", "Finding", "doctor"]

SEVERITIES = ("error", "warning", "info")
"""Gravest first: nothing merges; less merges, or later, than it could; good to know."""

CODES: dict[str, str] = {
    "no-ksm": "error",
    "no-prctl": "warning",
    "ksmd-off": "error",
    "ksmd-unmerged": "error",
    "scan-stuck": "error",
    "scan-slow": "warning",
    "advisor-slow": "warning",
    "smart-scan": "info",
    "smart-scan-skips": "warning",
    "sysfs-read-only": "warning",
    "no-permission": "info",
    "sharing-chains": "info",
    "host-profit-negative": "warning",
    "swap-in-use": "info",
    "no-ksm-stat": "info",
    "not-dumpable": "warning",
    "not-readable": "warning",
    "nothing-marked": "info",
    "merge-any-inherited": "warning",
    "merge-any-leaks": "info",
    "profit-negative": "warning",
    "too-small": "error",
    "shared": "error",
    "shared-memory": "error",
    "memfd": "error",
    "secret": "error",
    "hugetlb": "error",
    "droppable": "error",
    "special": "error",
    "file": "error",
    "unmarked": "warning",
    "untouched": "info",
    "not-aligned": "warning",
    "huge-pages": "info",
    "huge-pages-return": "warning",
    "volatile": "warning",
    "mlocked": "info",
}
"""Every code there is, and how grave it is."""

LAPS = 3
"""A lap under way, one that notes checksums, one that merges (mm/ksm.c, cmp_and_merge_page)."""

PATIENCE = 60.0
"""Seconds to merge from which on a scan is called slow."""

NS_A_PAGE = 3000
"""CPU time of one visit of ksmd, measured on 6.18: 1.3 us the first time, 3 us a tree search."""

NEVER_SCANS_MILLISECS = 3_600_000

BIG = 1 << 20
"""Memory KSM skips is named in a process's findings from this size on."""

WATCH_SECONDS = 0.1
WATCHED_PAGES = 512
COMPARED_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding(Result):
    """One thing that keeps memory from merging, or makes it cost more than it saves."""

    code: str
    """Stable, one of ``pyksm.doctor``'s list in the documentation."""
    severity: str
    """``error``: nothing merges; ``warning``: less or later than could be; ``info``."""
    sentence: str
    mend: str
    """The command or the code that mends it; empty where nothing does."""
    subject: str
    """What it is about: ``host``, ``process 42``, or the object."""
    nbytes: int | None
    """How much memory it concerns, where that can be told."""


def doctor(
    *objects: object, host: Host | None = None, process: Process | None = None
) -> list[Finding]:
    """Say what keeps this host, this process and these objects from merging, gravest first.

    ``objects`` are memory (anything :class:`pyksm.Region` takes), regions and processes. Without
    any, the host and the calling process are examined; ``process`` names another one. Nothing is
    changed; watching for memory that is written all the time takes a tenth of a second.

    >>> for finding in pyksm.doctor():
    ...     print(finding.severity, finding.code, finding.sentence, finding.mend)  # doctest: +SKIP
    error ksmd-off ksmd does not run, so nothing merges sudo pyksm tune run=1
    """
    host = Host() if host is None else host
    processes = [o for o in objects if isinstance(o, Process)]
    if process is not None:
        processes.append(process)
    memory = [o for o in objects if not isinstance(o, (Process, Host))]
    if not processes:
        processes = [Process()]
    found = list(_about_host(host))
    if any(finding.code == "no-ksm" for finding in found):
        return found  # the rest would say it once more for every page
    found += _swap(processes[0].proc)
    for each in processes:
        found += _about_process(each)
    found += _about_memory(memory, host)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _finding(
    code: str, sentence: str, mend: str = "", *, subject: str, nbytes: int | None = None
) -> Finding:
    return Finding(
        code=code,
        severity=CODES[code],
        sentence=sentence,
        mend=mend,
        subject=subject,
        nbytes=nbytes,
    )


# ---- the host ----

_host_finding = functools.partial(_finding, subject="host")


def _about_host(host: Host) -> Iterator[Finding]:
    if not host.exists or not _kernel_merges(host):
        yield _host_finding(
            "no-ksm",
            "this kernel was built without KSM (CONFIG_KSM), so nothing can merge",
            "boot a kernel with CONFIG_KSM=y: grep CONFIG_KSM= /boot/config-$(uname -r)",
        )
        return
    counters = host.counters()
    for check in (_running, _speed, _smart_scan, _right_to_tune, _chains, _host_profit):
        yield from check(host, counters)
    yield from _prctl()


def _kernel_merges(host: Host) -> bool:
    """Ask madvise as well, where the folder is this kernel's own: some sandboxes only fake it."""
    if not _is_real(host):
        return True
    try:
        require_ksm()
    except NotSupported:
        return False
    return True


def _is_real(host: Host) -> bool:
    return os.path.realpath(host.root) == "/sys/kernel/mm/ksm"


def _running(host: Host, counters: HostCounters) -> Iterator[Finding]:
    if counters.run == 2:
        yield _host_finding(
            "ksmd-unmerged",
            "run is 2: everything was unmerged and ksmd stands still, so nothing merges",
            "sudo pyksm tune run=1",
        )
    elif counters.run != 1:
        yield _host_finding(
            "ksmd-off",
            "ksmd does not run, so nothing merges",
            "sudo pyksm tune run=1, or for a moment: sudo pyksm settle PID",
        )


def _speed(host: Host, counters: HostCounters) -> Iterator[Finding]:
    pages, sleep = counters.pages_to_scan, counters.sleep_millisecs
    if pages is None or sleep is None:
        return
    if pages == 0 or sleep >= NEVER_SCANS_MILLISECS:
        yield _host_finding(
            "scan-stuck",
            f"ksmd scans {pages} pages every {sleep / 1000:g} s, which is never",
            "sudo pyksm tune pages_to_scan=1000 sleep_millisecs=20",
        )
        return
    tracked = host.stats().nbytes or 0
    if counters.advisor_mode == "scan-time":
        yield from _advisor(counters, tracked)
        return
    seconds = merge_seconds(tracked, counters)
    if seconds > PATIENCE:
        yield _host_finding(
            "scan-slow",
            f"at {pages} pages every {sleep} ms, what is marked on this host "
            f"({human_bytes(tracked)}) takes about {_minutes(seconds)} to merge",
            "sudo pyksm settle, or for good: sudo pyksm tune pages_to_scan=5000 sleep_millisecs=10",
            nbytes=tracked,
        )


def merge_seconds(nbytes: int, counters: HostCounters) -> float:
    """Estimate the seconds until so many marked bytes on a host have merged, at its own pace.

    A lap takes ceil(pages / pages_to_scan) sleeps and the CPU time of each page.
    """
    pages = -(-nbytes // _sys.PAGE_SIZE)
    batches = -(-pages // max(1, counters.pages_to_scan or 1))
    sleep = (counters.sleep_millisecs or 0) / 1000
    return LAPS * (batches * sleep + pages * NS_A_PAGE / 1e9)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _advisor(counters: HostCounters, tracked: int) -> Iterator[Finding]:
    target = counters.advisor_target_scan_time or 0
    if LAPS * target > PATIENCE:
        yield _host_finding(
            "advisor-slow",
            f"the advisor aims at one lap in {target} s (now {counters.pages_to_scan} pages a "
            f"batch; advisor_min_pages_to_scan is no floor), so a page merges after "
            f"{_minutes(2 * target)} to {_minutes(LAPS * target)}",
            "sudo pyksm tune advisor_target_scan_time=10, or advisor_mode=none",
            nbytes=tracked,
        )


def _smart_scan(host: Host, counters: HostCounters) -> Iterator[Finding]:
    if not counters.smart_scan:
        return
    mend = "sudo pyksm settle, or for good: sudo pyksm tune smart_scan=0"
    if counters.pages_skipped and counters.run == 1:
        yield _host_finding(
            "smart-scan-skips",
            f"smart_scan has skipped {counters.pages_skipped} page visits: pages it skips in "
            "different laps never meet, so late duplicates may never merge",
            mend,
        )
    else:
        yield _host_finding(
            "smart-scan",
            "smart_scan is on: duplicates that come late may merge many laps later, or never",
            mend,
        )


def _right_to_tune(host: Host, counters: HostCounters) -> Iterator[Finding]:
    refusal = host.refusal
    if refusal is None:
        return
    if isinstance(refusal, OSError) and refusal.errno == errno.EROFS:
        yield _host_finding(
            "sysfs-read-only",
            f"{host.root} is read-only here (a container), so KSM cannot be started or sped up "
            "from inside; marking memory works",
            "on the container's host: sudo pyksm tune run=1",
        )
    else:
        yield _host_finding(
            "no-permission",
            "you may not change KSM's knobs; marking memory needs no permission",
            "sudo pyksm tune KNOB=VALUE",
        )


def _chains(host: Host, counters: HostCounters) -> Iterator[Finding]:
    if not counters.stable_node_chains:
        return
    copies = (counters.stable_node_dups or 0) * _sys.PAGE_SIZE
    yield _host_finding(
        "sharing-chains",
        f"{counters.stable_node_chains} contents are mapped over {counters.max_page_sharing} "
        f"times (max_page_sharing) and so kept in {counters.stable_node_dups} copies",
        "sudo pyksm tune use_zero_pages=1 if they are zeros; else sudo pyksm tune run=2, then "
        "sudo pyksm tune max_page_sharing=1024 run=1",
        nbytes=copies,
    )


def _host_profit(host: Host, counters: HostCounters) -> Iterator[Finding]:
    saved = host.stats().saved_bytes
    if saved is not None and saved < 0:
        yield _host_finding(
            "host-profit-negative",
            f"tracking costs this host {human_bytes(-saved)} more than merging saves (64 bytes a "
            "page): what is marked has too few duplicates",
            "mark less: pyksm status shows which process gains nothing",
            nbytes=-saved,
        )


def _prctl() -> Iterator[Finding]:
    try:
        _sys.get_memory_merge()
    except OSError:
        yield _host_finding(
            "no-prctl",
            "this kernel cannot merge whole processes (PR_SET_MEMORY_MERGE, Linux 6.4)",
            "mark named memory: pyksm.merge(obj)",
        )


def _swap(proc: Path) -> Iterator[Finding]:
    used = _swap_used(proc)
    if used:
        yield _host_finding(
            "swap-in-use",
            f"{human_bytes(used)} are in swap: a merged page that was swapped out comes back as "
            "a copy of its own for each process",
            "free memory, or keep merged memory in RAM: sudo swapoff -a",
            nbytes=used,
        )


def _swap_used(proc: Path) -> int:
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = (proc / "meminfo").read_text().splitlines()
        kilobytes = {line.partition(":")[0]: line.split()[1] for line in lines if ":" in line}
        return (int(kilobytes["SwapTotal"]) - int(kilobytes["SwapFree"])) * 1024
    return 0


# ---- a process ----


def _about_process(process: Process) -> Iterator[Finding]:
    say = functools.partial(_finding, subject=f"process {process.pid}")
    try:
        stats = process.stats()
    except PermissionError:
        yield from _not_readable(process, say)
        return
    mappings = list(read_mappings(process.proc / str(process.pid) / "smaps"))
    marked = [mapping for mapping in mappings if mapping.mergeable]
    if stats.ksm_rmap_items is None:
        yield say(
            "no-ksm-stat",
            "this kernel does not tell what merging costs a process (ksm_stat, Linux 6.1)",
        )
    if not marked and not stats.ksm_merge_any:
        yield say(
            "nothing-marked",
            "none of its memory is marked, so none of it merges",
            "pyksm.merge(obj) or pyksm.Process().merge() inside it",
        )
    if stats.ksm_merge_any:
        yield from _merge_any(process, say)
    if stats.saved_bytes is not None and stats.saved_bytes < 0:
        yield say(
            "profit-negative",
            f"tracking its pages costs {human_bytes(stats.overhead_bytes)}, and merging saves "
            f"{human_bytes(-stats.saved_bytes)} less than that",
            "mark only what has duplicates: pyksm.unmerge(obj)",
            nbytes=-stats.saved_bytes,
        )
    if stats.ksm_merge_any:
        yield from _never_in(mappings, say)
    yield from _huge_pages(marked, say)
    yield from _mlocked(marked, say)


Say = Callable[..., Finding]


def _not_readable(process: Process, say: Say) -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield say(
            "not-readable",
            "not even root may read it here (a container without CAP_SYS_PTRACE, or a security "
            "module)",
            "on the container's host: sudo pyksm doctor PID",
        )
    elif process.is_self or _owner(process) == os.geteuid():
        yield say(
            "not-dumpable",
            "it is not dumpable (set-uid, or prctl PR_SET_DUMPABLE 0), so its own user may not "
            "read its ksm_stat and smaps",
            "look at it as root: sudo pyksm status " + str(process.pid),
        )
    else:
        yield say(
            "not-readable",
            "it belongs to another user, so what is merged in it cannot be read",
            "sudo pyksm doctor " + str(process.pid),
        )


def _owner(process: Process) -> int | None:
    """Return the effective uid; the owner of the folder is root for a non-dumpable process."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (process.proc / str(process.pid) / "status").read_text().splitlines():
            if line.startswith("Uid:"):
                return int(line.split()[2])
    return None


def _merge_any(process: Process, say: Say) -> Iterator[Finding]:
    if process.is_self:
        asked = any(switch.on for switch in ledger.switches)
    else:
        asked = not _parent_merges(process)
    if not asked:
        yield say(
            "merge-any-inherited",
            "all its memory is opted in although nobody in it asked: the flag came over fork and "
            "exec from its parent (set-uid programs inherit it too)",
            "pyksm.Process().unmerge() inside it, and in the parent start children without it",
        )
    else:
        yield say(
            "merge-any-leaks",
            "all its memory is opted in, and so will be that of every program it starts",
            "pyksm.Process().unmerge() before exec in a child, or mark named memory instead",
        )


def _parent_merges(process: Process) -> bool:
    with contextlib.suppress(OSError, ValueError):
        fields = (process.proc / str(process.pid) / "stat").read_text().rpartition(") ")[2].split()
        text = (process.proc / fields[1] / "ksm_stat").read_text()
        return "ksm_merge_any: yes" in text
    return False


def _never_in(mappings: Iterable[Mapping], say: Say) -> Iterator[Finding]:
    """Name the memory of a wholly opted-in process that KSM skips all the same, by kind."""
    sizes: dict[str, int] = {}
    reasons: dict[str, tuple[str, str]] = {}
    for mapping in mappings:
        never = why_never(mapping)
        resident = mapping.bytes_of("Rss") or 0
        if never is None or never[0] in ("special", "file") or not resident:
            continue
        code = _kind(mapping, never[0])
        sizes[code] = sizes.get(code, 0) + resident
        reasons[code] = never[1], never[2]
    for code, nbytes in sizes.items():
        if nbytes >= BIG:
            reason, mend = reasons[code]
            yield say(code, f"{human_bytes(nbytes)}: {reason}", mend, nbytes=nbytes)


def _kind(mapping: Mapping, code: str) -> str:
    """Tell the kinds of shared memory apart, each of which has its own mend."""
    if code != "shared":
        return code
    if mapping.path.startswith("/memfd:"):
        return "memfd"
    if mapping.path.startswith("/secretmem"):
        return "secret"
    if mapping.path.startswith(("/dev/shm/", "/SYSV")):
        return "shared-memory"
    return "shared"


def _huge_pages(marked: list[Mapping], say: Say) -> Iterator[Finding]:
    huge = sum(m.bytes_of("AnonHugePages") or 0 for m in marked)
    if huge:
        yield say(
            "huge-pages",
            f"{human_bytes(huge)} of the marked memory are in huge pages, which ksmd has to "
            "split one by one",
            "allocate it with pyksm.Buffer, pyksm.empty or pyksm.load, or MADV_NOHUGEPAGE it",
            nbytes=huge,
        )
    merged = [m for m in marked if m.bytes_of("KSM") and "nh" not in m.flags and _collapsible(m)]
    if merged:
        nbytes = sum(m.bytes_of("KSM") or 0 for m in merged)
        yield say(
            "huge-pages-return",
            f"khugepaged may collapse {human_bytes(nbytes)} of merged memory back into huge "
            "pages, each with a copy of its own",
            "madvise it MADV_NOHUGEPAGE (pyksm.Buffer does), or: "
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
            nbytes=nbytes,
        )


def _collapsible(mapping: Mapping) -> bool:
    return mapping.nbytes >= 2 << 20 and ("hg" in mapping.flags or _huge_pages_everywhere())


def _huge_pages_everywhere() -> bool:
    with contextlib.suppress(OSError):
        return "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    return False


def _mlocked(marked: list[Mapping], say: Say) -> Iterator[Finding]:
    locked = sum(m.bytes_of("Rss") or 0 for m in marked if "lo" in m.flags)
    if locked:
        yield say(
            "mlocked",
            f"{human_bytes(locked)} of the marked memory are mlocked: merged they stay in RAM, "
            "but a write still has to copy, so they are no longer free of page faults",
            "pyksm.unmerge(obj) what must never fault",
            nbytes=locked,
        )


# ---- memory ----


def _about_memory(objects: list[object], host: Host) -> Iterator[Finding]:
    regions: list[Region] = []
    for obj in objects:
        try:
            regions.append(obj if isinstance(obj, Region) else Region(obj))
        except NotSupported as error:
            yield _finding(
                "too-small",
                str(error.args[1]),
                error.hint,
                subject=type(obj).__name__,
            )
    for region in regions:
        yield from _about_region(region, host)
    yield from _not_aligned(regions)
    yield from _volatile(regions)


def _about_region(region: Region, host: Host) -> Iterator[Finding]:
    say = functools.partial(_finding, subject=_name(region))
    start, end = region.address, region.address + region.nbytes
    mappings = list(read_mappings("/proc/self/smaps", start, end))
    for mapping in mappings:
        never = why_never(mapping)
        if never is not None:
            code, reason, mend = never
            nbytes = min(mapping.end, end) - max(mapping.start, start)
            yield say(_kind(mapping, code), reason, mend, nbytes=nbytes)
    could = [mapping for mapping in mappings if why_never(mapping) is None]
    unmarked = [mapping for mapping in could if not mapping.mergeable]
    if unmarked:
        nbytes = sum(min(m.end, end) - max(m.start, start) for m in unmarked)
        yield say(
            "unmarked",
            f"{human_bytes(nbytes)} are not marked for merging (no mg in smaps)",
            "pyksm.merge(obj)",
            nbytes=nbytes,
        )
    if could:
        yield from _untouched(region, say)
    marked = [mapping for mapping in could if mapping.mergeable]
    yield from _huge_pages(marked, say)
    yield from _mlocked(marked, say)


def _untouched(region: Region, say: Say) -> Iterator[Finding]:
    stats = region.stats()
    absent = stats.nbytes - stats.resident_bytes
    if absent:
        yield say(
            "untouched",
            f"{human_bytes(absent)} were never written: there is no page to merge, and no memory "
            "in use",
            nbytes=absent,
        )


def _not_aligned(regions: list[Region]) -> Iterator[Finding]:
    """Find equal objects that lie at different offsets in their pages: no page of them is equal."""
    page = _sys.PAGE_SIZE
    for index, region in enumerate(regions):
        for other in regions[:index]:
            mine, theirs = region.view, other.view
            here, there = _sys.address_of(mine) % page, _sys.address_of(theirs) % page
            if here == there or mine.nbytes != theirs.nbytes:
                continue
            size = min(COMPARED_BYTES, mine.nbytes)
            middle = (mine.nbytes - size) // 2
            if _bytes(mine, middle, size) == _bytes(theirs, middle, size):
                yield _finding(
                    "not-aligned",
                    f"it holds the same bytes as {_name(other)}, but {here} bytes into a page "
                    f"instead of {there}, so no two pages of them are equal",
                    "pyksm.copy(obj), pyksm.load(file) or pyksm.allocator() put data at the start "
                    "of a page; pyksm.Process().merge(align_heap=True) does for malloc",
                    subject=_name(region),
                    nbytes=mine.nbytes,
                )


def _bytes(view: memoryview, start: int, size: int) -> bytes:
    return bytes(_flat(view)[start : start + size])


def _flat(view: memoryview) -> memoryview:
    # Fortran order cannot be cast to bytes; its transpose is what lies in memory.
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes("A"))


def _volatile(regions: list[Region]) -> Iterator[Finding]:
    """Look twice at the same pages; ksmd merges a page only if two laps find it unchanged."""
    first = [_checksums(region) for region in regions]
    if not any(first):
        return
    time.sleep(WATCH_SECONDS)
    for region, before in zip(regions, first, strict=True):
        after = _checksums(region)
        changed = sum(before[page] != after.get(page) for page in before)
        if changed:
            share = changed / len(before)
            yield _finding(
                "volatile",
                f"{share:.0%} of its pages changed within {WATCH_SECONDS:g} s: a page merges only "
                "if it stays the same for two laps, and a write to a merged page costs a copy",
                "keep what is written apart from what is shared, and pyksm.unmerge() the former",
                subject=_name(region),
                nbytes=round(region.nbytes * share),
            )


def _checksums(region: Region) -> dict[int, int]:
    """Return a checksum of up to WATCHED_PAGES present pages, evenly spread, by offset."""
    page = _sys.PAGE_SIZE
    stats = region.stats()
    if stats.resident_bytes != stats.nbytes:
        return {}  # looking would make the pages: reading maps the zero page
    view = _flat(region.view)
    lead = region.address - _sys.address_of(region.view)
    step = max(1, region.nbytes // page // WATCHED_PAGES) * page
    return {
        offset: zlib.crc32(view[lead + offset : lead + offset + page])
        for offset in range(0, region.nbytes, step)
    }


def _name(region: Region) -> str:
    """Name an object by its type, size and address."""
    kind = type(region.obj).__name__
    return f"{kind} of {human_bytes(region.nbytes)} at {region.address:#x}"


doctor.__module__ = Finding.__module__ = "pyksm"
