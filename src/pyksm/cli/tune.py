"""``pyksm tune``."""

from __future__ import annotations

import re

import click

from pyksm.cli import Exit
from pyksm.cli._output import json_option, print_json, show, table
from pyksm.host import Host
from pyksm.knobs import KNOBS, Value, check
from pyksm.lease import LeaseStatus

__all__ = ["command"]

_NUMBER = re.compile(r"[+-]?[0-9]+\Z")


def _setting(text: str) -> tuple[str, Value]:
    """Parse ``KNOB=VALUE``, the value a number or a word."""
    knob, equals, value = text.partition("=")
    if not (knob and equals and value):
        raise click.BadParameter(f"{text!r} is not KNOB=VALUE, as in pages_to_scan=1000")
    return knob, int(value) if _NUMBER.match(value) else value


@click.command("tune")
@click.argument("settings", metavar="[KNOB=VALUE]...", nargs=-1, type=_setting)
@click.option("--restore", is_flag=True, help="Put back what programs that died left changed.")
@click.option("--force", is_flag=True, help="With --restore: also what living programs hold.")
@json_option
def command(
    settings: tuple[tuple[str, Value], ...], restore: bool, force: bool, as_json: bool
) -> int:
    """Show KSM's knobs, set them, or put them back.

    The knobs are the files of /sys/kernel/mm/ksm, by their names; setting them needs root. All
    are set, for good, or none if one is refused. A program that holds a stronger request for the
    moment (settle does) keeps it; your value comes after it.
    """
    host = Host()
    _check_usage(settings, restore, force)
    if restore:
        host.restore(force=force)
    elif settings:
        host.keep(**dict(settings))
    knobs = {name: value for name, value in host.counters().to_dict().items() if name in KNOBS}
    lease = _lease(host)
    if as_json:
        print_json({"knobs": knobs, "lease": lease})
    else:
        _report(knobs, lease)
    return Exit.OK


def _check_usage(settings: tuple[tuple[str, Value], ...], restore: bool, force: bool) -> None:
    if restore and settings:
        raise click.UsageError("--restore puts knobs back; it takes no KNOB=VALUE")
    if force and not restore:
        raise click.UsageError("--force goes with --restore")
    names = [name for name, _ in settings]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"{name} is given twice")
    if settings:
        try:
            check(dict(settings))
        except (ValueError, TypeError) as error:
            raise click.UsageError(str(error)) from error


def _lease(host: Host) -> LeaseStatus | None:
    try:
        return host.lease_status()
    except PermissionError:  # root's file
        return None


def _report(knobs: dict[str, Value | None], lease: LeaseStatus | None) -> None:
    held = {name for request in lease.requests for name in request.knobs} if lease else set()
    original = lease.original if lease else {}
    rows = [
        (
            name,
            "-" if value is None else value,
            original.get(name, "") if name in held else "",
            "" if value is not None else f"not in this kernel (Linux {KNOBS[name].since})",
        )
        for name, value in knobs.items()
    ]
    show(table("", ("knob", "value>", "before>", ""), rows))
    if lease:
        for request in lease.requests:
            asked = " ".join(f"{name}={value}" for name, value in request.knobs.items())
            gone = "" if request.alive else " (gone: --restore puts it back)"
            show(f"Held by process {request.pid}{gone}: {asked}")
