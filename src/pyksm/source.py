"""A file being read: what it is called, how far reading has come, and whole reads only."""

from __future__ import annotations

import io
import math
import os
from typing import IO, TYPE_CHECKING, Any, NoReturn

from pyksm.arrays import Packer, keep_small

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


__all__ = ["PIECE", "Source"]

PIECE = 1 << 20
"""Bytes to read at a time where the end is not known: room is made as data comes."""


class Source:
    """A file being read: its name and the place in it for error messages, and whole reads only."""

    def __init__(self, file: IO[bytes], name: str, *, sized: bool = True) -> None:
        self.file = file
        self.name = name
        self.place = 0
        self._ahead = b""
        self.size = _bytes_left(file) if sized else None
        """Bytes from the start of reading to the end; None where that cannot be known."""

    def fail(self, what: str) -> NoReturn:
        """Raise ValueError with the file and the place."""
        raise ValueError(f"{self.name}: {what} (at byte {self.place})")

    def peek(self, count: int) -> bytes:
        """Return the next bytes, fewer at the end, and leave the file where it was if it can."""
        head = _read_up_to(self.file, count)
        if self.size is not None:
            self.file.seek(-len(head), os.SEEK_CUR)
        else:
            self._ahead = head
        return head

    def need(self, nbytes: int, what: str) -> None:
        """Fail if the file is known to end before these many bytes more."""
        if self.size is not None and nbytes > self.size - self.place:
            self.fail(f"{what} takes {nbytes} bytes, and {self.size - self.place} are left")

    def read(self, count: int = -1) -> bytes:
        """Read what there is up to count bytes: the file protocol, for decompressors and pickle."""
        if count < 0:
            data = self._ahead + self.file.read()
            self._ahead = b""
        elif self._ahead:
            data, self._ahead = self._ahead[:count], self._ahead[count:]
        else:
            data = self.file.read(count) or b""
        self.place += len(data)
        return data

    def read_exactly(self, count: int, what: str) -> bytes:
        """Read count bytes or fail; never make room for more than the file holds."""
        self.need(count, what)
        data = self.read(count if self.size is not None else min(count, PIECE))
        if len(data) == count:
            return data
        pieces = [data]
        while data and (count := count - len(data)):
            data = self.read(min(count, PIECE))
            pieces.append(data)
        if not data:
            self.fail(f"the file ends within {what}")
        return b"".join(pieces)

    def readline(self) -> bytes:
        """Read up to the end of a line, as pickle's text opcodes want it."""
        line = b""
        while not line.endswith(b"\n") and (character := self.read(1)):
            line += character
        return line

    def fill(self, memory: Any, what: str) -> None:
        """Read into memory until it is full."""
        with memoryview(memory) as view, view.cast("B") as target:
            done = 0
            while done < target.nbytes:
                got = self._read_some_into(target[done:])
                if not got:
                    self.fail(f"the file ends within {what}: {target.nbytes - done} bytes missing")
                done += got
                self.place += got

    def read_array(
        self, packer: Packer, shape: tuple[int, ...], dtype: np.dtype[Any], order: str, what: str
    ) -> NDArray[Any]:
        """Read the bytes of an array."""
        import numpy as np

        self.need(math.prod(shape) * dtype.itemsize, what)
        array = packer.empty(shape, dtype, order)
        if array.nbytes:
            self.fill(array.reshape(-1, order="A").view(np.uint8), what)
            keep_small(array)
        return array

    def _read_some_into(self, target: memoryview) -> int:
        readinto = getattr(self.file, "readinto", None)
        if self._ahead or readinto is None:
            piece = self._ahead or self.file.read(min(target.nbytes, PIECE))
            count = min(len(piece), target.nbytes)
            target[:count] = piece[:count]
            self._ahead = self._ahead[count:]
            return count
        # BufferedIOBase.readinto (zip members, decompressors) reads it all aside first, so ask
        # them for little; a real file puts it where it belongs.
        whole = isinstance(self.file, (io.FileIO, io.BufferedReader, io.BytesIO))
        return readinto(target if whole else target[:PIECE]) or 0


def _bytes_left(file: IO[bytes]) -> int | None:
    try:
        here = file.tell()
        end = file.seek(0, os.SEEK_END)
        file.seek(here)
    except (OSError, AttributeError):  # a pipe; io.UnsupportedOperation is an OSError
        return None
    return end - here


def _read_up_to(file: IO[bytes], count: int) -> bytes:
    head = b""
    while len(head) < count and (piece := file.read(count - len(head))):
        head += piece
    return head
