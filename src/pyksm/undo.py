"""``Undo``: the one implementation of "what was there before"."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pyksm.result import Skipped

__all__ = ["Undo"]


def _nothing() -> None:
    """Keep nothing."""


class Undo:
    """A change already made, and the way back.

    Ignore it to keep the change; call :meth:`undo`, or leave a ``with`` block, to put back what
    was there before. It undoes once, from whichever thread comes first; in a forked child it does
    nothing, because the child did not make the change; and when a ``with`` body raises, an error
    of the undoing is added to that exception as a note and never replaces it.
    """

    __slots__ = ("__weakref__", "_keep", "_lock", "_pid", "_revert", "nbytes", "skipped")

    nbytes: int
    """Bytes the change applies to; 0 where a size makes no sense."""

    skipped: tuple[Skipped, ...]
    """What was asked for and cannot be done, each with its reason."""

    def __init__(
        self,
        revert: Callable[[], None],
        *,
        keep: Callable[[], None] = _nothing,
        nbytes: int = 0,
        skipped: Iterable[Skipped] = (),
    ) -> None:
        """Take the function that reverts, and one to call when the change is kept for good.

        ``keep`` runs from ``__del__``, at any moment and in any thread: it may set a flag and do
        nothing else.
        """
        self._revert: Callable[[], None] | None = revert
        self._keep = keep
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.nbytes = nbytes
        self.skipped = tuple(skipped)

    @classmethod
    def all(cls, undos: Iterable[Undo]) -> Undo:
        """Join several into one that undoes the last first, and all of them even if one fails."""
        undos = tuple(undos)

        def revert() -> None:
            errors = []
            for undo in reversed(undos):
                try:
                    undo.undo()
                except Exception as error:  # noqa: BLE001 - all are tried, then raised
                    errors.append(error)
            if len(errors) == 1:
                raise errors[0]
            if errors:
                raise ExceptionGroup("several changes could not be undone", errors)

        return cls(
            revert,
            nbytes=sum(undo.nbytes for undo in undos),
            skipped=[skipped for undo in undos for skipped in undo.skipped],
        )

    def undo(self) -> None:
        """Put back what was there before; a second call does nothing.

        If that fails the error is raised and the change stands, so that it can be tried again.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._revert is not None:
                self._revert()
                self._revert = None

    def __enter__(self) -> Self:
        """Return itself; what a ``with`` bounds is never taken for a change to be kept."""
        self._keep = _nothing
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Undo; an error of the body stays the error."""
        if error is None:
            self.undo()
            return
        try:
            self.undo()
        except Exception as failure:  # noqa: BLE001 - noted on the body's own error
            error.add_note(f"pyksm could not undo its change as well: {failure}")

    def __del__(self) -> None:
        """Keep the change for good if it was not undone."""
        if getattr(self, "_revert", None) is not None and os.getpid() == self._pid:
            self._keep()

    def __repr__(self) -> str:
        """Show whether it still stands."""
        state = "undone" if self._revert is None else "stands"
        return f"<pyksm.Undo: {state}, {self.nbytes} bytes>"


Undo.__module__ = "pyksm"
