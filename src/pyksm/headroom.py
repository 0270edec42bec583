"""How much memory an un-sharing may take: of the host, and of this process's memory cgroups.

Giving merged pages their own copies back needs memory that the host may not have; the kernel then
kills somebody instead of answering an error (measured: madvise and prctl under a cgroup's limit).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyksm.result import human_bytes

__all__ = ["Headroom", "headroom", "require"]

UNLIMITED = 1 << 60
"""A limit as high as this is none (cgroup v1 shows a huge number of pages)."""


@dataclass(frozen=True, slots=True)
class Headroom:
    """Memory that can still be taken, in bytes, and what sets the bound."""

    nbytes: int
    bound: str


def require(nbytes: int, what: str, *, force: bool = False) -> None:
    """Raise MemoryError, naming both figures, unless ``nbytes`` more can be taken."""
    if force or nbytes <= 0:
        return
    room = headroom()
    if nbytes > room.nbytes:
        raise MemoryError(
            f"{what} would need {human_bytes(nbytes)} ({nbytes} bytes) for the copies, but "
            f"{room.bound} leaves {human_bytes(room.nbytes)} ({room.nbytes} bytes): the kernel "
            "would kill a process. Nothing was changed. Free memory first, or pass force=True"
        )


def headroom(
    proc: Path | str = "/proc/self", meminfo: Path | str = "/proc/meminfo",
    cgroups: Path | str = "/sys/fs/cgroup",
) -> Headroom:  # fmt: skip
    """Return the least of MemAvailable and what each memory cgroup above the process leaves."""
    rooms = [Headroom(_field(Path(meminfo), "MemAvailable") * 1024, "MemAvailable")]
    for folder in _memory_cgroups(Path(proc), Path(cgroups)):
        room = _cgroup_room(folder)
        if room is not None:
            rooms.append(Headroom(room, f"the memory limit of the cgroup {folder}"))
    return min(rooms, key=lambda room: room.nbytes)


def _memory_cgroups(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the folders of the process's memory cgroup and of those above it."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        mount = cgroups if controllers == "" else cgroups / "memory"
        folder = mount / path.lstrip("/")
        if not folder.is_dir():  # in a container the path may be the host's; the mount is ours
            folder = mount
        while True:
            yield folder
            if folder == mount or mount not in folder.parents:
                break
            folder = folder.parent


def _cgroup_room(folder: Path) -> int | None:
    """Return limit - usage, counting file pages that can go; None where there is no limit."""
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),  # v2
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # v1
    ):
        with contextlib.suppress(OSError, ValueError):
            limit = int((folder / limit_file).read_text())
            if limit >= UNLIMITED:
                return None
            usage = int((folder / usage_file).read_text())
            reclaimable = _field(folder / "memory.stat", "(?:total_)?inactive_file")
            return max(0, limit - usage + reclaimable)
    return None


def _field(path: Path, name: str) -> int:
    found = re.search(rf"^{name}:? +(\d+)", path.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
