"""``pyksm status``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pyksm import _sys
from pyksm.cli import Exit
from pyksm.cli._output import console, is_terminal, json_option, print_json, show, table
from pyksm.errors import NotSupported
from pyksm.host import Host, HostCounters, HostStats
from pyksm.process import Process, ProcessStats
from pyksm.result import Result, human_bytes

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["command"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessLine(Result):
    """One process: who it is and what is merged in it."""

    pid: int
    user: str | None
    name: str | None
    marked_bytes: int
    """Resident and marked for merging."""
    stats: ProcessStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates(Result):
    """Pages a second between two looks."""

    seconds: float
    broken: float | None
    """Merged pages that a write copied (``cow_ksm`` of /proc/vmstat)."""
    merged: float | None
    """Pages that came into ``pages_shared`` and ``pages_sharing``, less those that left."""

    @property
    def storm(self) -> bool:
        """Whether merged memory is broken faster than it is merged."""
        return bool(self.broken) and (self.broken or 0) > max(0.0, self.merged or 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot(Result):
    """All that ``pyksm status`` shows."""

    host: HostStats
    processes: tuple[ProcessLine, ...]
    unreadable: int
    """Processes that may not be read."""
    rates: Rates | None


@click.command("status")
@click.argument("pids", metavar="[PID]...", nargs=-1, type=click.IntRange(min=1))
@click.option("--watch", is_flag=True, help="Keep showing it, with rates, until interrupted.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.05),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks of --watch.",
)
@json_option
def command(pids: tuple[int, ...], watch: bool, interval: float, as_json: bool) -> int:
    """Show what is merged, what it saves and what it costs.

    Without a PID: every process that you may read and that has anything marked. "saved" of a
    process is the physical memory it saves now, net of what tracking costs; the host's figures
    are the kernel's counters, as old as ksmd's last visit. --watch --json prints one line a look.
    """
    if watch:
        _watch(pids, interval, as_json)
    snapshot = look(Host(), pids)
    if as_json:
        print_json(snapshot)
    else:
        show(_page(snapshot))
    return Exit.OK


def look(host: Host, pids: tuple[int, ...] = (), rates: Rates | None = None) -> Snapshot:
    """Read the host and the processes named, or all that have something marked or merged."""
    if pids:
        lines, unreadable = [_line(Process(pid)) for pid in pids], 0
    else:
        lines, unreadable = _everyone()
    return Snapshot(host=host.stats(), processes=tuple(lines), unreadable=unreadable, rates=rates)


def _everyone() -> tuple[list[ProcessLine], int]:
    import psutil

    lines, unreadable = [], 0
    for pid in psutil.pids():
        try:
            process = Process(pid)
            if _is_marked(process.stats()):
                lines.append(_line(process))
        except PermissionError:
            unreadable += 1
        except (ProcessLookupError, NotSupported):  # gone meanwhile; a kernel thread
            continue
    return sorted(lines, key=lambda line: line.stats.saved_bytes or 0, reverse=True), unreadable


def _is_marked(stats: ProcessStats) -> bool:
    told = (stats.ksm_merge_any, stats.ksm_mergeable, stats.ksm_rmap_items, stats.merged_bytes)
    return any(told)


def _line(process: Process) -> ProcessLine:
    user, name = _who(process.pid)
    stats = process.stats()
    return ProcessLine(
        pid=process.pid,
        user=user,
        name=name,
        marked_bytes=stats.mergeable_bytes,
        stats=stats,
    )


def _who(pid: int) -> tuple[str | None, str | None]:
    import psutil

    with contextlib.suppress(psutil.Error):
        found = psutil.Process(pid)
        return found.username(), found.name()
    return None, None


# ---- watching ----


def _watch(pids: tuple[int, ...], interval: float, as_json: bool) -> None:
    if as_json or not is_terminal():
        for snapshot in _looks(pids, interval):
            if as_json:
                print_json(snapshot, indent=None)
            else:
                show(_page(snapshot))
        return
    from rich.live import Live

    with Live(console=console(), auto_refresh=False, screen=True) as live:
        for snapshot in _looks(pids, interval):
            live.update(_page(snapshot), refresh=True)


def _looks(pids: tuple[int, ...], interval: float) -> Iterator[Snapshot]:
    """Look for ever, from the second time on with rates."""
    host = Host()
    before, then = _pages(host.counters()), time.monotonic()
    rates = None
    while True:
        yield look(host, pids, rates)
        time.sleep(interval)
        after, now = _pages(host.counters()), time.monotonic()
        rates = _rates(before, after, now - then)
        before, then = after, now


Pages = tuple[int | None, int | None]
"""Pages broken since boot, pages merged now."""


def _pages(counters: HostCounters, vmstat: str = "/proc/vmstat") -> Pages:
    merged = None
    if counters.pages_shared is not None and counters.pages_sharing is not None:
        merged = counters.pages_shared + counters.pages_sharing
    for line in Path(vmstat).read_text().splitlines():
        if line.startswith("cow_ksm "):  # Linux 5.19
            return int(line.split()[1]), merged
    return None, merged


def _rates(before: Pages, after: Pages, seconds: float) -> Rates:
    broken, merged = (
        None if old is None or new is None else (new - old) / seconds
        for old, new in zip(before, after, strict=True)
    )
    return Rates(seconds=seconds, broken=broken, merged=merged)


# ---- the page ----


def _page(snapshot: Snapshot) -> Group:
    from rich.console import Group
    from rich.text import Text

    parts = [Text(line) for line in _host_lines(snapshot.host)]
    if snapshot.rates is not None:
        parts += [Text(_rate_line(snapshot.rates))]
        if snapshot.rates.storm:
            warning = "Merged memory is being written faster than it is merged: each write copies."
            parts.append(Text(warning, style="bold yellow"))
    if snapshot.unreadable:
        parts.append(
            Text(f"{snapshot.unreadable} processes may not be read; sudo shows them.", style="dim")
        )
    if not snapshot.processes:
        return Group(*parts, Text("No process you may read has anything marked for merging."))
    columns = (
        "pid>", "user", "name", "marked>", "merged>", "saved>", "zero>", "overhead>", "PSS>",
    )  # fmt: skip
    return Group(*parts, table("", columns, [_row(line) for line in snapshot.processes]))


def _row(line: ProcessLine) -> tuple[object, ...]:
    stats = line.stats
    sizes = (
        line.marked_bytes,
        stats.merged_bytes,
        stats.saved_bytes,
        stats.zero_bytes,
        stats.overhead_bytes,
        stats.pss_bytes,
    )
    return (line.pid, line.user or "-", line.name or "-", *map(human_bytes, sizes))


def _host_lines(stats: HostStats) -> list[str]:
    counters = stats.counters
    state = {0: "stopped", 1: "running", 2: "stopped, everything unmerged"}
    advisor = f", advisor {counters.advisor_mode}" if counters.advisor_mode != "none" else ""
    smart = {None: "", 0: ", smart_scan off", 1: ", smart_scan on"}[counters.smart_scan]
    return [
        f"ksmd {state.get(counters.run or 0, '?')}: {counters.pages_to_scan} pages every "
        f"{counters.sleep_millisecs} ms{smart}{advisor if counters.advisor_mode else ''}; "
        f"{counters.full_scans} laps",
        f"Host saves {human_bytes(stats.saved_bytes)} net (tracking costs "
        f"{human_bytes(stats.overhead_bytes)}): {human_bytes(_size(counters.pages_shared))} "
        f"shared by {human_bytes(_size(counters.pages_sharing))} more, zeros "
        f"{human_bytes(stats.zero_bytes)}, unshared {human_bytes(_size(counters.pages_unshared))}, "
        f"volatile {human_bytes(_size(counters.pages_volatile))}",
    ]


def _size(pages: int | None) -> int | None:
    return None if pages is None else pages * _sys.PAGE_SIZE


def _rate_line(rates: Rates) -> str:
    def speed(pages: float | None) -> str:
        return "-" if pages is None else f"{human_bytes(pages * _sys.PAGE_SIZE)}/s"

    return f"Broken by writes {speed(rates.broken)}, merged {speed(rates.merged)} (net)"
