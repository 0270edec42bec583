"""Share duplicate memory through Linux KSM, and prove what it saved.

Three nouns: :class:`Region` (the whole pages inside a buffer), :class:`Process`, :class:`Host`.
Five verbs: ``merge``, ``unmerge``, ``stats``, ``estimate``, ``settle``. One :class:`Undo`.
Importing pyksm loads no numpy, starts nothing and changes nothing.
"""

from __future__ import annotations

from pyksm.errors import KsmError, NotSupported
from pyksm.process import Process, ProcessStats
from pyksm.region import Region, RegionStats
from pyksm.result import Result, Skipped
from pyksm.undo import Undo

__all__ = [
    "KsmError",
    "NotSupported",
    "Process",
    "ProcessStats",
    "Region",
    "RegionStats",
    "Result",
    "Skipped",
    "Undo",
]
