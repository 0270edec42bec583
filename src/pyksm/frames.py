"""Page frames: which are KSM's, who maps them, and which of that sharing is fork's doing.

KSM must not be credited with pages that fork had already shared: a parent that saved 8 MiB and
forks four children saves 8 MiB still, though every counter of the kernel grows. A mapping of a KSM
page counts as inherited when a living ancestor of the same fork family maps the same frame at the
same address. (Known limit: an ancestor and a child that each load the same data after the fork, at
the very same address, look alike; the saving is then understated.)
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyksm import _pages, _sys
from pyksm.smaps import Mapping, read_mappings, read_rollup

__all__ = ["FrameFiles", "fork_sharing", "frame_files", "frames_readable", "survey", "survey_host"]

Inherited = tuple[dict[int, int], set[int]]
"""How many mappings of each PFN came by fork; the addresses of those in one process."""


@dataclass(frozen=True, slots=True)
class FrameFiles:
    """Open files to survey pages with; without ``frames`` only pagemap tells anything."""

    pagemap: int
    flags: int
    counts: int
    frames: bool


@contextlib.contextmanager
def frame_files(folder: Path | str) -> Iterator[FrameFiles]:
    """Open the pagemap of the process in ``folder``, and kpageflags and kpagecount if allowed."""
    frames = frames_readable()
    with contextlib.ExitStack() as stack:

        def opened(path: str) -> int:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        yield FrameFiles(
            pagemap=opened(f"{folder}/pagemap"),
            flags=opened("/proc/kpageflags") if frames else -1,
            counts=opened("/proc/kpagecount") if frames else -1,
            frames=frames,
        )


def frames_readable() -> bool:
    """Tell whether this process sees page frame numbers (CAP_SYS_ADMIN), by looking at one."""
    return _frames_readable(os.geteuid())


@functools.cache
def _frames_readable(_uid: int) -> bool:
    page = bytearray(_sys.PAGE_SIZE)
    number = _sys.address_of(memoryview(page)) // _sys.PAGE_SIZE
    try:
        os.close(os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC))
        os.close(os.open("/proc/kpagecount", os.O_RDONLY | os.O_CLOEXEC))
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entry = os.pread(pagemap.fileno(), 8, number * 8)
    except OSError:
        return False
    return int.from_bytes(entry, "little") & ((1 << 55) - 1) != 0


@dataclass(frozen=True, slots=True)
class Survey:
    """Pages of some ranges by what they are to KSM; ``saved`` is a number of pages."""

    present: int
    shared: int
    ksm: int
    zero: int
    saved: float

    def __add__(self, other: Survey) -> Survey:
        """Sum two, field by field."""
        return Survey(
            self.present + other.present,
            self.shared + other.shared,
            self.ksm + other.ksm,
            self.zero + other.zero,
            self.saved + other.saved,
        )


def survey(
    files: FrameFiles, ranges: list[tuple[int, int]], inherited: Inherited = ({}, set())
) -> Survey:
    """Count the pages of the ranges, as :func:`pyksm._pages.survey` does for one."""
    total = Survey(0, 0, 0, 0, 0.0)
    for start, end in ranges:
        total += Survey(
            *_pages.survey(files.pagemap, files.flags, files.counts, start, end, *inherited)
        )
    return total


def survey_host(proc: Path | str = "/proc") -> Survey | None:
    """Survey the merged memory of every process; None without the right to see page frames."""
    if not frames_readable():
        return None
    inherited, by_process = _fork_sharing(proc)
    total = Survey(0, 0, 0, 0, 0.0)
    for pid in _pids(proc):
        folder = f"{proc}/{pid}"
        with contextlib.suppress(OSError):  # gone meanwhile
            if not read_rollup(f"{folder}/smaps_rollup").get("KSM", 1):
                continue
            ranges = [(m.start, m.end) for m in _merged_mappings(folder)]
            with frame_files(folder) as files:
                total += survey(files, ranges, (inherited, by_process.get(pid, set())))
    return total


def fork_sharing(pid: int, proc: Path | str = "/proc") -> Inherited:
    """Find the mappings of KSM pages, of every process, that a fork had shared already."""
    inherited, by_process = _fork_sharing(proc)
    return inherited, by_process.get(pid, set())


def _fork_sharing(proc: Path | str) -> tuple[dict[int, int], dict[int, set[int]]]:
    family = _fork_parents(proc)
    frames: dict[int, dict[int, int]] = {}

    def frames_of(member: int) -> dict[int, int]:
        if member not in frames:
            frames[member] = _ksm_frames(f"{proc}/{member}")
        return frames[member]

    inherited: Counter[int] = Counter()
    by_process: dict[int, set[int]] = {}
    for child in family:
        mine = frames_of(child).items()
        if not mine:
            continue
        shared: set[int] = set()
        ancestor: int | None = family[child]
        while ancestor is not None:
            theirs = frames_of(ancestor)
            shared.update(address for address, pfn in mine if theirs.get(address) == pfn)
            ancestor = family.get(ancestor)
        inherited.update(frames_of(child)[address] for address in shared)
        by_process[child] = shared
    return dict(inherited), by_process


def _fork_parents(proc: Path | str) -> dict[int, int]:
    """Return {child: parent} for the living pairs that share an address layout by fork.

    Two processes with the same start of stack and of code (proc_pid_stat(5), fields 26 and 28)
    have not called exec since they parted: both are random for every exec.
    """
    layouts: dict[int, tuple[int, tuple[bytes, bytes]]] = {}
    for pid in _pids(proc):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(proc, str(pid), "stat").read_bytes().rpartition(b") ")[2].split()
            if fields[25] != b"0":  # 0: a kernel thread, or not ours to see
                layouts[pid] = int(fields[1]), (fields[23], fields[25])
    return {
        pid: parent
        for pid, (parent, layout) in layouts.items()
        if parent in layouts and layouts[parent][1] == layout
    }


def _ksm_frames(folder: str) -> dict[int, int]:
    try:
        with frame_files(folder) as files:
            frames: dict[int, int] = {}
            for mapping in _merged_mappings(folder):
                frames |= _pages.ksm_frames(files.pagemap, files.flags, mapping.start, mapping.end)
            return frames
    except OSError:  # gone meanwhile, or not ours to read
        return {}


def _merged_mappings(folder: str) -> Iterator[Mapping]:
    """Yield the mappings that hold merged pages; before Linux 6.6 all marked ones."""
    for mapping in read_mappings(f"{folder}/smaps"):
        if mapping.mergeable and mapping.bytes_of("KSM") != 0:
            yield mapping


def _pids(proc: Path | str) -> list[int]:
    return [int(entry.name) for entry in os.scandir(proc) if entry.name.isdigit()]
