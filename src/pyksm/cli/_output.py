"""What the commands print with: tables, JSON, bars. rich is loaded when something is printed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from pyksm.result import human_bytes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = [
    "bar",
    "console",
    "human_seconds",
    "is_terminal",
    "json_option",
    "print_json",
    "show",
    "table",
]

PIPED_WIDTH = 160
"""Columns of a table that goes into a file or a pipe, where rich would take 80."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, sizes in bytes.")


def is_terminal() -> bool:
    """Tell whether a person is watching standard output."""
    return sys.stdout.isatty()


def console() -> Console:
    """Return a console on standard output as it is now."""
    from rich.console import Console

    class Quiet(Console):
        """Leaves a closed pipe to ``main``; rich's own way is to exit with 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Quiet(
        file=sys.stdout,
        width=None if is_terminal() else PIPED_WIDTH,
        highlight=False,
        soft_wrap=not is_terminal(),
    )


def show(*parts: RenderableType) -> None:
    """Print text and tables; text is taken as it is, without markup."""
    target = console()
    for part in parts:
        target.print(part, markup=False)


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print one JSON document; what has ``to_dict()`` becomes a dict."""
    click.echo(json.dumps(value, indent=indent, default=_plain))


def _plain(value: Any) -> object:
    return value.to_dict()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Lay rows out; columns whose name ends in ``>`` are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        title=title or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    for column in columns:
        justify: Any = "right" if column.endswith(">") else "left"
        grid.add_column(column.rstrip(">"), justify=justify, overflow="fold")
    for row in rows:
        grid.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return grid


def human_seconds(seconds: float | None) -> str:
    """Write a time the way people read it.

    >>> human_seconds(0.0213), human_seconds(4.25), human_seconds(190), human_seconds(None)
    ('21 ms', '4.2 s', '3 min 10 s', '-')
    """
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


@contextlib.contextmanager
def bar(what: str, *, quiet: bool = False) -> Iterator[Callable[[float, float], None]]:
    """Show how far ``settle`` has come: a live bar on a terminal, a line elsewhere."""
    if quiet:
        yield lambda fraction, rate: None
        return
    if not is_terminal():
        click.echo(f"{what} ...")
        yield lambda fraction, rate: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console()) as progress:
        task = progress.add_task(what, total=1.0, rate="")
        yield lambda fraction, rate: progress.update(
            task, completed=fraction, rate=f"{human_bytes(rate)}/s merged" if rate else ""
        )
