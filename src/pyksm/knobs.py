"""What the knobs of KSM are: types, ranges, which request is the stronger, in which order to write.

Pure: nothing here reads or writes a file, so that the rules the lease lives by can be tested as
functions. The facts are those of ``mm/ksm.c``.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

__all__ = ["KNOBS", "Knob", "Value", "Values", "check", "from_file", "plan", "resolve"]

Value: TypeAlias = int | str
Values: TypeAlias = dict[str, Value]

_U32: Final = 2**32 - 1
_U64: Final = 2**64 - 1
_ADVISORS: Final = ("none", "scan-time")
# What ksmd sleeps by default; see resolve().
_DEFAULT_SLEEP: Final = 20


def _last(asked: Sequence[Any]) -> Any:
    return asked[-1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """One writable file of ``/sys/kernel/mm/ksm``."""

    low: int = 0
    high: int = _U32
    """Ends of the range a caller may ask for."""
    stored_high: int = 0
    """Largest value the kernel may already hold, where it is more forgiving than ``high``."""
    strongest: Callable[[Sequence[Any]], Any]
    """Which of several requests, in the order they were asked for, wins."""
    switch: bool = False
    """Takes ``True`` and ``False`` as well."""
    words: tuple[str, ...] = ()
    """The words it takes instead of numbers."""
    since: str
    """First Linux that has it."""


# The table of "the strongest request wins": the one that merges more or sooner, except that an
# unmerge (run=2) beats a merge and the advisor has no order, so its last asker wins.
KNOBS: Final[dict[str, Knob]] = {
    "run": Knob(high=2, strongest=max, since="2.6.32"),
    "pages_to_scan": Knob(strongest=max, since="2.6.32"),
    "sleep_millisecs": Knob(strongest=min, since="2.6.32"),
    "smart_scan": Knob(high=1, strongest=min, switch=True, since="6.7"),
    "use_zero_pages": Knob(high=1, strongest=max, switch=True, since="4.11"),
    "merge_across_nodes": Knob(
        high=1, strongest=max, switch=True, since="3.9, built with CONFIG_NUMA"
    ),
    "max_page_sharing": Knob(low=2, high=2**31 - 1, strongest=max, since="4.13"),
    "stable_node_chains_prune_millisecs": Knob(strongest=min, since="4.13"),
    # Parsed as 64 bits and stored in 32: 2**32 + 1 would read back as 1.
    "advisor_max_cpu": Knob(low=1, high=100, stored_high=_U32, strongest=max, since="6.8"),
    "advisor_min_pages_to_scan": Knob(stored_high=_U64, strongest=max, since="6.8"),
    "advisor_max_pages_to_scan": Knob(stored_high=_U64, strongest=max, since="6.8"),
    "advisor_target_scan_time": Knob(low=1, stored_high=_U64, strongest=min, since="6.8"),
    "advisor_mode": Knob(words=_ADVISORS, strongest=_last, since="6.8"),
}


def check(wanted: Mapping[str, object]) -> Values:
    """Return the wanted knobs as the kernel takes them, or say which one is wrong and why."""
    if not wanted:
        raise ValueError(f"no knob was named; the knobs are {', '.join(KNOBS)}")
    values = {name: _check_one(name, value) for name, value in wanted.items()}
    if values.get("advisor_mode") == "scan-time" and "pages_to_scan" in values:
        raise ValueError(
            "advisor_mode='scan-time' sets pages_to_scan by itself, so they cannot be asked for "
            "together; use advisor_min_pages_to_scan and advisor_max_pages_to_scan, or "
            "advisor_mode='none'"
        )
    if spins(values):
        raise ValueError(
            "pages_to_scan=0 with sleep_millisecs=0 makes ksmd burn a whole core and scan "
            "nothing; to stop it use run=0"
        )
    return values


def _check_one(name: str, value: object) -> Value:
    knob = KNOBS.get(name)
    if knob is None:
        close = difflib.get_close_matches(name, KNOBS, n=1)
        guess = f"Did you mean {close[0]}? " if close else ""
        raise ValueError(f"{name!r} is not a knob of KSM. {guess}The knobs are {', '.join(KNOBS)}")
    if knob.words:
        if not isinstance(value, str):
            raise TypeError(f"{name} is one of {_quoted(knob.words)}, not {value!r}")
        if value not in knob.words:
            raise ValueError(f"{name} is one of {_quoted(knob.words)}, not {value!r}")
        return value
    if isinstance(value, bool) and not knob.switch:
        raise TypeError(f"{name} is a number of {knob.low} to {knob.high}, not {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} is an int of {knob.low} to {knob.high}, not {type(value).__name__} {value!r}"
        ) from None
    if not knob.low <= number <= knob.high:
        raise ValueError(f"{name} is {knob.low} to {knob.high}, not {number}")
    return number


def _quoted(words: Iterable[str]) -> str:
    return " or ".join(repr(word) for word in words)


def from_file(name: object, value: object) -> bool:
    """Tell whether a value that was stored in a file could ever have been this knob's."""
    knob = KNOBS.get(name) if isinstance(name, str) else None
    if knob is None:
        return False
    if knob.words:
        return value in knob.words
    # An administrator may have set what we would not: the kernel's range counts, not ours.
    return type(value) is int and 0 <= value <= max(knob.high, knob.stored_high)


def spins(values: Mapping[str, object]) -> bool:
    """Tell whether ksmd would run flat out and scan nothing."""
    return values.get("pages_to_scan") == 0 and values.get("sleep_millisecs") == 0


def resolve(original: Mapping[str, Value], requests: Sequence[Mapping[str, Value]]) -> Values:
    """Return what the knobs should be: the strongest request, or the original where none is left.

    ``requests`` are in the order they were made. Every requested knob has an original. Where the
    advisor rules ``pages_to_scan`` it is left out, because the kernel refuses to be told.
    """
    target: Values = {}
    for name, before in original.items():
        asked = [request[name] for request in requests if name in request]
        target[name] = KNOBS[name].strongest(asked) if asked else before
    if spins(target) and not spins(original):
        # One asked for no sleep and another for no pages; neither asked for a spinning core.
        target["sleep_millisecs"] = original["sleep_millisecs"] or _DEFAULT_SLEEP
    mode = target.get("advisor_mode")
    if mode is not None and "pages_to_scan" in target:
        mode_asked = any("advisor_mode" in request for request in requests)
        pages_asked = any("pages_to_scan" in request for request in requests)
        if mode == "scan-time" and mode_asked:
            del target["pages_to_scan"]
        elif mode == "none" and original["advisor_mode"] != "none" and not pages_asked:
            # The original number was the advisor's; without it the kernel's default stands.
            del target["pages_to_scan"]
    return target


def plan(current: Mapping[str, Value], target: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """Return the writes that lead from the current values to the target, in a safe order.

    ``current`` holds at least the knobs of ``target``, and the advisor's where a mode is changed.
    ksmd is stopped before anything else and started after it. Changing the advisor's mode
    overwrites ``pages_to_scan`` (``set_advisor_defaults``), and while it is on the kernel refuses
    a write there, so that order matters too.
    """
    run = target.get("run")
    run_write = [("run", run)] if run is not None and run != current["run"] else []
    writes: list[tuple[str, Value]] = list(run_write) if run != 1 else []
    writes += [
        (name, target[name])
        for name in KNOBS
        if name in target and name not in _PLANNED_APART and target[name] != current[name]
    ]
    writes += _plan_speed(current, target)
    return writes + (run_write if run == 1 else [])


_PLANNED_APART: Final = ("run", "advisor_mode", "pages_to_scan")


def _plan_speed(
    current: Mapping[str, Value], target: Mapping[str, Value]
) -> list[tuple[str, Value]]:
    mode_now = current.get("advisor_mode", "none")
    mode = target.get("advisor_mode", mode_now)
    pages = target.get("pages_to_scan")
    if mode == mode_now:
        if pages is None or mode == "scan-time" or pages == current["pages_to_scan"]:
            return []
        return [("pages_to_scan", pages)]
    if mode == "none":
        writes: list[tuple[str, Value]] = [("advisor_mode", mode)]
        return writes if pages is None else [*writes, ("pages_to_scan", pages)]
    if pages is None:
        return [("advisor_mode", mode)]
    # Going back to an advisor that had worked its way to this number: the kernel starts it from
    # advisor_min_pages_to_scan, which nothing else reads.
    start = "advisor_min_pages_to_scan"
    after = target.get(start, current[start])
    return [(start, pages), ("advisor_mode", mode), (start, after)]
