"""``pyksm doctor``."""

from __future__ import annotations

import click

from pyksm.cli import Exit
from pyksm.cli._output import json_option, print_json, show
from pyksm.diagnosis import Finding, doctor
from pyksm.host import Host
from pyksm.process import Process

__all__ = ["command"]

STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@click.command("doctor")
@click.argument("pids", metavar="[PID]...", nargs=-1, type=click.IntRange(min=1))
@json_option
def command(pids: tuple[int, ...], as_json: bool) -> int:
    """Say what keeps this host or a process from merging, and what mends it.

    Without a PID only the host is examined. The exit status is 0 if nothing is in the way, 3
    without KSM in the kernel, 4 if KSM is off, and 1 for another error found.
    """
    host = Host()
    findings = doctor(*(Process(pid) for pid in pids), host=host)
    if not pids:  # this process is only the messenger
        findings = [finding for finding in findings if finding.subject == "host"]
    if as_json:
        print_json(findings)
    else:
        _report(findings, host)
    return _status(findings)


def _status(findings: list[Finding]) -> int:
    codes = {finding.code for finding in findings if finding.severity == "error"}
    if "no-ksm" in codes:
        return Exit.NO_KSM
    if codes & {"ksmd-off", "ksmd-unmerged", "scan-stuck"}:
        return Exit.KSM_OFF
    return Exit.FAILURE if codes else Exit.OK


def _report(findings: list[Finding], host: Host) -> None:
    from rich.text import Text

    for finding in findings:
        about = "" if finding.subject == "host" else f"{finding.subject}: "
        show(
            Text.assemble(
                (f"{finding.severity:8}", STYLES[finding.severity]),
                (f"{finding.code}  ", "bold"),
                about + finding.sentence,
            )
        )
        if finding.mend:
            show(Text.assemble(("        mend  ", "dim"), finding.mend))
    if not any(finding.severity == "error" for finding in findings):
        show(f"Nothing keeps this host from merging: ksmd runs, {host.root} is there.")
