"""Share duplicate memory through Linux KSM, and prove what it saved.

Three nouns: :class:`Region` (the whole pages inside a buffer), :class:`Process`, :class:`Host`.
Five verbs: ``merge``, ``unmerge``, ``stats``, ``estimate``, ``settle``. One :class:`Undo`.
Importing pyksm loads no numpy, starts nothing and changes nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # not from typing, whose import takes longer than all the rest of this one

if TYPE_CHECKING:
    from pyksm._buffer import Buffer
    from pyksm.allocating import allocator
    from pyksm.arrays import (
        array,
        empty,
        empty_like,
        full,
        full_like,
        ones,
        ones_like,
        zeros,
        zeros_like,
    )
    from pyksm.copying import copy
    from pyksm.diagnosis import Finding, doctor
    from pyksm.errors import KsmError, NotSupported
    from pyksm.host import Host, HostCounters, HostStats
    from pyksm.loading import load
    from pyksm.process import Process, ProcessStats
    from pyksm.region import Region, RegionStats
    from pyksm.result import Result, Skipped
    from pyksm.settling import SettleResult, Unmerged
    from pyksm.undo import Undo
    from pyksm.verbs import merge, settle, settle_async, unmerge

__all__ = [
    "Buffer",
    "Finding",
    "Host",
    "HostCounters",
    "HostStats",
    "KsmError",
    "NotSupported",
    "Process",
    "ProcessStats",
    "Region",
    "RegionStats",
    "Result",
    "SettleResult",
    "Skipped",
    "Undo",
    "Unmerged",
    "allocator",
    "array",
    "copy",
    "doctor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "load",
    "merge",
    "ones",
    "ones_like",
    "settle",
    "settle_async",
    "unmerge",
    "zeros",
    "zeros_like",
]

# Each room is imported when one of its names is first used (PEP 562). No room may be called like
# a public name: importing the submodule would put the module in the name's place.
_ROOMS = {
    "_buffer": ["Buffer"],
    "allocating": ["allocator"],
    "arrays": [
        "array",
        "empty",
        "empty_like",
        "full",
        "full_like",
        "ones",
        "ones_like",
        "zeros",
        "zeros_like",
    ],
    "copying": ["copy"],
    "diagnosis": ["Finding", "doctor"],
    "errors": ["KsmError", "NotSupported"],
    "host": ["Host", "HostCounters", "HostStats"],
    "loading": ["load"],
    "process": ["Process", "ProcessStats"],
    "region": ["Region", "RegionStats"],
    "result": ["Result", "Skipped"],
    "settling": ["SettleResult", "Unmerged"],
    "undo": ["Undo"],
    "verbs": ["merge", "settle", "settle_async", "unmerge"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> object:
    """Import the room of a public name."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'pyksm' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"pyksm.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
