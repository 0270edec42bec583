"""``/proc/PID/smaps``: the mappings of a process, and which of them KSM will ever touch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mapping", "read_mappings", "read_rollup", "why_never"]

_HEADER = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ([-rwxsp]{4}) [0-9a-f]+ \S+ (\d+) *(.*)$", re.MULTILINE
)
_FIELD = re.compile(rb"^(\w+): +(\d+) kB$", re.MULTILINE)
_FLAGS = re.compile(rb"^VmFlags: (.*)$", re.MULTILINE)

# Flags (smaps' two letters) of the mappings that ksm_compatible() in mm/ksm.c refuses; madvise
# and prctl answer 0 for them and do nothing.
_REFUSED = {
    "ht": ("hugetlb", "hugetlb pages are not merged by KSM", "map it without MAP_HUGETLB"),
    "dp": ("droppable", "MAP_DROPPABLE memory is not merged by KSM", ""),
    "io": ("special", "device memory is not merged by KSM", ""),
    "pf": ("special", "PFN-mapped memory of a driver is not merged by KSM", ""),
    "mm": ("special", "mixed-mapped memory of a driver is not merged by KSM", ""),
    "de": ("special", "a mapping that must not expand (vdso, a driver's) is not merged", ""),
}
_USE_COPY = "put the data into private memory: pyksm.copy(obj), pyksm.load(file) or pyksm.Buffer"


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping (VMA): where it is, what backs it, and smaps' lines about it."""

    start: int
    end: int
    permissions: str
    inode: int
    path: str
    body: bytes

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def flags(self) -> frozenset[str]:
        """The two-letter VmFlags (proc(5)): ``mg`` is VM_MERGEABLE."""
        found = _FLAGS.search(self.body)
        return frozenset(found[1].decode().split()) if found else frozenset()

    @property
    def mergeable(self) -> bool:
        """Whether the kernel has marked it (VM_MERGEABLE)."""
        return "mg" in self.flags

    def bytes_of(self, field: str) -> int | None:
        """Return one of smaps' sizes in bytes, or None where this kernel does not tell it."""
        found = re.search(rb"^%s: +(\d+) kB$" % field.encode(), self.body, re.MULTILINE)
        return int(found[1]) * 1024 if found else None


def read_mappings(smaps: Path | str, start: int = 0, end: int | None = None) -> Iterator[Mapping]:
    """Yield the mappings that overlap [start, end), in order of address.

    Reading stops behind ``end``: the kernel walks page tables for every mapping it prints.
    """
    with open(smaps, "rb") as file:
        rest = b""
        while chunk := file.read(1 << 16):
            rest += chunk
            headers = list(_HEADER.finditer(rest))
            for header, following in itertools.pairwise(headers):
                mapping = _mapping(header, rest[header.end() : following.start()])
                if end is not None and mapping.start >= end:
                    return
                if mapping.end > start:
                    yield mapping
            if headers:
                rest = rest[headers[-1].start() :]
        header_left = _HEADER.match(rest)
        if header_left:
            mapping = _mapping(header_left, rest[header_left.end() :])
            if mapping.end > start and (end is None or mapping.start < end):
                yield mapping


def _mapping(header: re.Match[bytes], body: bytes) -> Mapping:
    return Mapping(
        start=int(header[1], 16),
        end=int(header[2], 16),
        permissions=header[3].decode(),
        inode=int(header[4]),
        path=header[5].decode("utf-8", "replace"),
        body=body,
    )


def read_rollup(path: Path | str) -> dict[str, int]:
    """Return the sizes in bytes of smaps_rollup (Linux 4.14), by its own names."""
    with open(path, "rb") as file:
        return {found[1].decode(): int(found[2]) * 1024 for found in _FIELD.finditer(file.read())}


def why_never(mapping: Mapping) -> tuple[str, str, str] | None:
    """Say why KSM will never merge a mapping: code, reason, mend; None if it will."""
    flags = mapping.flags
    if "ht" not in flags and flags & {"sh", "ms"}:
        return "shared", f"{_shared_kind(mapping)} is shared memory, which KSM skips", _USE_COPY
    for flag, reason in _REFUSED.items():
        if flag in flags:
            return reason
    if mapping.inode and not mapping.bytes_of("Anonymous"):
        return (
            "file",
            f"no page of this private mapping of {mapping.path} was written yet: its pages are "
            + "the page cache's, already one copy",
            "leave it mapped, or pyksm.load() it into memory that merges",
        )
    return None


def _shared_kind(mapping: Mapping) -> str:
    path = mapping.path
    if path.startswith("/memfd:"):
        return "a memfd"
    if path.startswith("/secretmem"):
        return "memfd_secret memory"
    if path.startswith("/SYSV"):
        return "a System V segment"
    if path.startswith("/dev/shm/"):
        return f"{path} (POSIX or multiprocessing shared memory)"
    if path.startswith("/dev/zero"):
        return "an anonymous MAP_SHARED mapping (the default of mmap.mmap(-1, n))"
    return f"a shared mapping of {path}" if path else "a MAP_SHARED mapping"
