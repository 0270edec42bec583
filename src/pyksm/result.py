"""What every result of pyksm has in common: plain data, a dict, a table for notebooks."""

from __future__ import annotations

import dataclasses
from html import escape
from typing import Any

__all__ = ["Result", "Skipped", "human_bytes"]

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: float | None) -> str:
    """Write a number of bytes the way people read it.

    >>> human_bytes(3 << 20), human_bytes(-512), human_bytes(None)
    ('3.0 MiB', '-512 B', '-')
    """
    if count is None:
        return "-"
    size = float(count)
    for unit in _BINARY_UNITS:
        if abs(size) < 1024 or unit == _BINARY_UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Base of the frozen results; a field the kernel does not tell is ``None``, never 0."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, nested results included, as plain types for ``json.dumps``."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(text)}</td></tr>"
            for name, text in self._rows()
        )
        return f"<table><caption>{escape(type(self).__name__)}</caption>{rows}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        """Return the name and the readable value of each field, for tables."""
        return [
            (field.name, _readable(field.name, getattr(self, field.name)))
            for field in dataclasses.fields(self)
        ]


def _readable(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool) and name.endswith("bytes"):
        return human_bytes(value)
    return str(value)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Skipped(Result):
    """A piece of memory the kernel will not merge, and why.

    ``code`` is one of ``shared``, ``hugetlb``, ``special``, ``droppable``, ``file``, ``unmapped``,
    ``too-small``, ``refused``; ``reason`` says it in a sentence, ``hint`` what to do instead.
    """

    address: int | None
    nbytes: int
    code: str
    reason: str
    hint: str = ""


Result.__module__ = Skipped.__module__ = "pyksm"
