"""``allocator()``: numpy arrays in memory that merges, by numpy's own data handlers (NEP 49)."""

from __future__ import annotations

import contextvars
import dataclasses
import errno
import functools
import operator
import sys
import threading
from typing import TYPE_CHECKING, SupportsIndex

from pyksm import _sys
from pyksm.errors import NotSupported
from pyksm.smaps import read_mappings
from pyksm.undo import Undo

if TYPE_CHECKING:
    from typing_extensions import CapsuleType

__all__ = ["allocator"]

_NO_KSM = "this kernel has no KSM: madvise(MADV_MERGEABLE) says EINVAL"
_NO_KSM_HINT = "It needs a kernel built with CONFIG_KSM=y, as the large distributions have"


def allocator(min_bytes: SupportsIndex = 65536, *, everywhere: bool = False) -> Undo:
    """Let numpy make its arrays in memory that merges, from now on or for a ``with`` block.

    Arrays of at least ``min_bytes`` bytes get whole pages of private memory marked
    MADV_MERGEABLE, at the start of a page, so that equal arrays of two processes merge whatever
    the rest of their heaps looks like; smaller ones come from the C library as ever. An array
    outlives the block it was made in. Anything that numpy allocates counts: results, temporaries,
    ``np.load``; what other libraries allocate (torch, Arrow, the bytes of an unpickled array)
    does not: see :func:`pyksm.copy`, :func:`pyksm.load`.

    numpy keeps the setting in the context (:mod:`contextvars`): asyncio tasks inherit it, a new
    thread starts with numpy's default, unless Python runs with ``thread_inherit_context``. For
    the threads of a pool:

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor(2, initializer=pyksm.allocator) as pool:
    ...     array = pool.submit(np.ones, 1 << 20).result()

    ``everywhere=True`` covers every thread and context that uses numpy's default, those that
    exist already too. It wraps numpy's default handler in place; the wrapper stays for the life
    of the process, as arrays may, and undoing only makes new arrays ordinary again.

    Freed memory is kept, marked, for the next array: at most 256 MiB (32 MiB once nothing is
    switched on) and an eighth of what is alive. While arrays are filled their memory uses huge
    pages; leaving the block switches it to MADV_NOHUGEPAGE, or the kernel would gather merged
    pages into huge ones again.

    Undo in the context that made the change: anywhere else, or while a foreign handler set later
    is still in force, undoing raises RuntimeError and changes nothing.

    Raises TypeError or ValueError for ``min_bytes`` that is no integer, below the page size or
    beyond the address space; NotSupported where the kernel has no KSM, and for ``everywhere``
    where numpy's default handler is not the one it comes with.

    >>> with pyksm.allocator():
    ...     weights = np.ones((1024, 1024), "f4")
    >>> pyksm.Region(weights).stats().mergeable_bytes
    4194304
    """
    threshold = _checked(min_bytes)
    if not isinstance(everywhere, bool):
        raise TypeError(f"everywhere must be True or False, not {type(everywhere).__name__}")
    _check_kernel()
    return _Everywhere.switch_on(threshold) if everywhere else _switch_on(threshold)


def _checked(min_bytes: SupportsIndex) -> int:
    if isinstance(min_bytes, bool):
        raise TypeError("min_bytes must be a number of bytes, not bool")
    try:
        threshold = operator.index(min_bytes)
    except TypeError:
        raise TypeError(
            f"min_bytes must be a whole number of bytes, not {type(min_bytes).__name__}"
        ) from None
    if threshold < _sys.PAGE_SIZE:
        raise ValueError(
            f"min_bytes={threshold}: memory merges in whole pages, so it must be at least "
            f"the page size, {_sys.PAGE_SIZE}"
        )
    if threshold > sys.maxsize:
        raise ValueError(f"min_bytes={threshold} is beyond the address space ({sys.maxsize})")
    return threshold


@functools.cache
def _check_kernel() -> None:
    """Look once whether a mark is really taken: the kernel may answer 0 and do nothing."""
    try:
        _sys.madvise(0, 0, _sys.MERGEABLE)  # checks the advice, touches nothing
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise NotSupported(_NO_KSM, hint=_NO_KSM_HINT, errno=errno.EINVAL) from error
    from pyksm import _numpy

    address, nbytes = _numpy.first_slab()
    found = list(read_mappings("/proc/self/smaps", address, address + nbytes))
    if not found or not all(mapping.mergeable for mapping in found):
        raise NotSupported(
            "the kernel accepted MADV_MERGEABLE for numpy's memory and did not mark it: "
            "VmFlags in /proc/self/smaps has no mg",
            hint="A sandbox (gVisor, a seccomp rule) may be answering for the kernel",
        )


# --- one context -------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False, slots=True)
class _Setting:
    """One allocator() of one context, and what was there before it."""

    handler: CapsuleType
    before: CapsuleType
    below: _Setting | None
    token: contextvars.Token[_Setting | None] | None = None
    undone: bool = False


# A Token of this variable knows the context it was made in, which a handler does not.
_top: contextvars.ContextVar[_Setting | None] = contextvars.ContextVar("pyksm_allocator")


def _switch_on(threshold: int) -> Undo:
    from pyksm import _numpy

    handler = _numpy.handler(threshold)
    setting = _Setting(handler, _numpy.set_current(handler), _top.get(None))
    setting.token = _top.set(setting)
    _numpy.switched_on(1)

    def revert() -> None:
        _restore(setting)
        _numpy.switched_on(-1)
        _numpy.keep_small()

    return Undo(revert)


def _restore(setting: _Setting) -> None:
    """Put the handler back that was there before ``setting``."""
    from pyksm import _numpy

    top = _top.get(None)
    assert setting.token is not None
    try:
        _top.reset(setting.token)
    except ValueError:
        raise RuntimeError(
            "this allocator() was switched on in another thread or context: "
            "undo it there, numpy keeps the handler in the context"
        ) from None
    if top is None or _numpy.current() is not top.handler:
        setting.token = _top.set(top)  # a token resets once: this one is for the next try
        raise RuntimeError(
            "another data handler was set after this allocator() and is still in force: "
            "put that one back first"
        )
    setting.undone = True
    # Undone below another one of ours: that one passes it by when its turn comes.
    while top is not None and top.undone:
        _numpy.set_current(top.before)
        top = top.below
    _top.set(top)


# --- every context -----------------------------------------------------------------------------


class _Everywhere:
    """The requests for ``everywhere=True``; the last one still standing is in force."""

    _lock = threading.Lock()
    _standing: list[tuple[object, int]] = []  # noqa: RUF012 - one for the process, on purpose

    @classmethod
    def switch_on(cls, threshold: int) -> Undo:
        from pyksm import _numpy

        if not _numpy.wrap_default():
            raise NotSupported(
                "numpy's default data handler is not the one numpy comes with",
                hint="Use allocator() without everywhere, in each thread",
            )
        request = object()
        with cls._lock:
            cls._standing.append((request, threshold))
            cls._apply()
        _numpy.switched_on(1)

        def revert() -> None:
            with cls._lock:
                cls._standing[:] = [one for one in cls._standing if one[0] is not request]
                cls._apply()
            _numpy.switched_on(-1)
            _numpy.keep_small()

        return Undo(revert)

    @classmethod
    def _apply(cls) -> None:
        from pyksm import _numpy

        _numpy.set_everywhere(cls._standing[-1][1] if cls._standing else _numpy.NOTHING)
