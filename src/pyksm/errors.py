"""The few exceptions of pyksm: only where a caller would act differently.

Everything else is the built-in exception that fits: ``TypeError`` and ``ValueError`` for a bad
argument, ``OSError`` and its subclasses for what the kernel refused, ``MemoryError``.
"""

from __future__ import annotations

import errno as _errno

__all__ = ["KsmError", "NotSupported"]


class KsmError(Exception):
    """Base class of the exceptions that only pyksm raises."""


class NotSupported(KsmError, OSError):  # noqa: N818 - the name is API, like NotImplemented
    """Raised where this kernel, host or piece of memory cannot do what was asked.

    ``str(error)`` says what is missing, ``error.hint`` how to get it, and ``error.errno`` is the
    kernel's own answer where there was one (``EOPNOTSUPP`` where the kernel said nothing).
    """

    hint: str
    """What to do about it, in one sentence; empty where nothing can be done."""

    def __init__(self, message: str, *, hint: str = "", errno: int = _errno.EOPNOTSUPP) -> None:
        super().__init__(errno, message)
        self.hint = hint

    def __str__(self) -> str:
        """Return the sentence and the hint, without the errno number."""
        message = str(self.args[1])
        return f"{message}. {self.hint}" if self.hint else message

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by the three arguments (an exception crosses process pools)."""
        return (_rebuild, (str(self.args[1]), self.hint, self.errno))


def _rebuild(message: str, hint: str, errno: int) -> NotSupported:
    return NotSupported(message, hint=hint, errno=errno)


KsmError.__module__ = NotSupported.__module__ = "pyksm"
