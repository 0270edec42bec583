"""``pyksm settle``."""

from __future__ import annotations

import click

from pyksm.cli import Exit
from pyksm.cli._output import bar, human_seconds, json_option, print_json, show, table
from pyksm.host import Host
from pyksm.process import Process
from pyksm.result import human_bytes
from pyksm.settling import SettleResult
from pyksm.verbs import settle

__all__ = ["command"]


@click.command("settle")
@click.argument("pids", metavar="[PID]...", nargs=-1, type=click.IntRange(min=1))
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop waiting.")
@click.option(
    "--cpu",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="How much of one core the kernel's scanner may take.",
)
@json_option
def command(pids: tuple[int, ...], timeout: float | None, cpu: float, as_json: bool) -> int:
    """Merge now, say when it is done, and put the knobs back.

    Works on the marked memory of the processes named, or of the whole host. The scan is sped up
    for that time if you may write KSM's knobs (root); if not, it waits at the host's own pace.
    """
    host = Host()
    targets: list[Process | Host] = [Process(pid) for pid in pids] or [host]
    for target in targets:
        target.stats()  # one that may not be read is told in words before anything is changed
    with bar("Merging", quiet=as_json) as progress:
        result = settle(targets, timeout=timeout, cpu=cpu, progress=progress, host=host)
    if as_json:
        print_json(result)
    else:
        _report(result)
    return Exit.OK if result.converged else Exit.TIME_UP


def _report(result: SettleResult) -> None:
    state = "Merged" if result.converged else "The time ran out; so far merged"
    show(
        f"{state}: {human_bytes(result.merged_bytes)} of {human_bytes(result.nbytes)} marked, "
        f"saving {human_bytes(result.saved_bytes)}, in {human_seconds(result.seconds)} and "
        f"{result.laps} laps; ksmd took {human_seconds(result.ksmd_cpu_seconds)} of CPU."
    )
    if not result.burst:
        show("At the host's own pace: speeding the scan up needs root.")
    if result.unmerged:
        rows = [(item.code, human_bytes(item.nbytes), item.reason) for item in result.unmerged]
        show(table("Not merged", ("why", "size>", ""), rows))
