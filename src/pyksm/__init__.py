"""Share duplicate memory through Linux KSM, and prove what it saved.

Three nouns: :class:`Region` (the whole pages inside a buffer), :class:`Process`, :class:`Host`.
Five verbs: ``merge``, ``unmerge``, ``stats``, ``estimate``, ``settle``. One :class:`Undo`.
Importing pyksm loads no numpy, starts nothing and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyksm._buffer import Buffer
from pyksm.errors import KsmError, NotSupported
from pyksm.process import Process, ProcessStats
from pyksm.region import Region, RegionStats
from pyksm.result import Result, Skipped
from pyksm.undo import Undo

if TYPE_CHECKING:
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
    from pyksm.loading import load

__all__ = [
    "Buffer",
    "KsmError",
    "NotSupported",
    "Process",
    "ProcessStats",
    "Region",
    "RegionStats",
    "Result",
    "Skipped",
    "Undo",
    "array",
    "copy",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "load",
    "ones",
    "ones_like",
    "zeros",
    "zeros_like",
]

_LATE = {"copy": "pyksm.copying", "load": "pyksm.loading"} | dict.fromkeys(
    [
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
    "pyksm.arrays",
)


def __getattr__(name: str) -> Any:
    """Import the rooms for arrays when they are first used (PEP 562)."""
    if name not in _LATE:
        raise AttributeError(f"module 'pyksm' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LATE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
