"""``copy``: the same object again, with its data in memory that KSM may merge."""

from __future__ import annotations

import pickle
import sys
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from pyksm._sys import PAGE_SIZE
from pyksm.arrays import Packer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["copy"]

T = TypeVar("T")


def copy(obj: T, *, missing_ok: bool = False) -> T:
    """Return a deep copy of any object with its large buffers laid into mergeable memory.

    Arrays, DataFrames, fitted estimators, dicts and lists of them: whatever can be pickled. Each
    buffer of a page (4 KiB) or more starts on a page of its own and the rest of its last page is
    zero, so that copies of equal data have equal pages in every process; smaller ones stay
    ordinary memory. At no time is there more than the object and its copy.

    >>> import numpy as np, pyksm
    >>> model = {"weights": np.ones((1000, 10), "f4"), "name": "a"}
    >>> twin = pyksm.copy(model)
    >>> np.array_equal(twin["weights"], model["weights"]), twin["weights"].ctypes.data % 4096
    (True, 0)

    Kept: dtype, shape, order of the axes in memory (gaps between elements are closed), writable
    or read-only, subclasses of ndarray with their attributes, two references to one object. A
    ``numpy.memmap`` becomes an ndarray.

    Not moved, because their memory cannot be chosen: ``bytes``, ``bytearray``, ``str``; arrays
    with Python objects (what is in them is copied, and moved if it can be); torch tensors; and
    what a compiled class keeps in memory of its own, which it fills from what it is given:
    scikit-learn's decision trees (RandomForest: all of ``tree_.nodes`` and ``tree_.value``, which
    is all there is of size) do; its neighbour, support-vector, neural-network and histogram
    gradient boosting models do not. ``Process().merge(align_heap=True)`` is for those.

    Raises ``TypeError`` for what cannot be pickled, and what :class:`pyksm.Buffer` raises.
    """
    if "numpy" in sys.modules:
        import numpy as np

        source: Any = obj
        if type(source) is np.ndarray and not source.dtype.hasobject:
            return Packer(missing_ok=missing_ok).copy_of(source)  # type: ignore[return-value]
    stream = _Stream()
    outside = _Outside()
    try:
        _Pickler(stream, outside).dump(obj)
    except (pickle.PicklingError, AttributeError, TypeError, BufferError) as error:
        raise TypeError(
            f"pyksm.copy cannot copy this {type(obj).__name__}, because part of it cannot be "
            f"pickled: {error}"
        ) from error
    copies = outside.copies(Packer(missing_ok=missing_ok))
    twin: T = pickle.Unpickler(stream, buffers=copies).load()
    return twin


class _Stream:
    """A pickle on its way from pickler to unpickler: pieces, not copied, dropped when read."""

    def __init__(self) -> None:
        self._pieces: deque[memoryview] = deque()

    def write(self, piece: Any) -> int:
        # A large bytes or bytearray arrives here as the object itself.
        view = memoryview(piece).cast("B")
        if view.nbytes:
            self._pieces.append(view)
        return view.nbytes

    def readinto(self, target: Any) -> int:
        wanted = memoryview(target).cast("B")
        done = 0
        while done < wanted.nbytes and self._pieces:
            piece = self._pieces[0]
            count = min(piece.nbytes, wanted.nbytes - done)
            wanted[done : done + count] = piece[:count]
            done += count
            if count == piece.nbytes:
                self._pieces.popleft()
            else:
                self._pieces[0] = piece[count:]
        return done

    def read(self, count: int) -> bytes:
        target = bytearray(count)
        return bytes(memoryview(target)[: self.readinto(target)])

    def readline(self) -> bytes:
        line = b""
        while not line.endswith(b"\n") and (character := self.read(1)):
            line += character
        return line


class _Outside:
    """What goes beside the stream: arrays and buffers, in the order the stream asks for them."""

    def __init__(self) -> None:
        self._taken: deque[NDArray[Any] | memoryview] = deque()
        self._arrays: dict[int, tuple[pickle.PickleBuffer, NDArray[Any]]] = {}

    def ticket(self, array: NDArray[Any]) -> pickle.PickleBuffer:
        """Return what stands for an array in the stream.

        numpy itself takes only contiguous arrays of no subclass out of band, and in-band data
        would be copied once more and end up anywhere. The unpickler hands on whatever object its
        ``buffers`` give it, so that object is the array.
        """
        ticket = pickle.PickleBuffer(bytearray(1))  # a writable one: READONLY_BUFFER makes a view
        self._arrays[id(ticket)] = ticket, array
        return ticket

    def take(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a buffer out of band; True: leave it in (``buffer_callback``)."""
        if id(buffer) in self._arrays:
            self._taken.append(self._arrays.pop(id(buffer))[1])
            return False
        raw = buffer.raw()
        if raw.nbytes < PAGE_SIZE:
            return True
        self._taken.append(raw)
        return False

    def copies(self, packer: Packer) -> Iterator[Any]:
        """Yield the copies one by one, so that nothing is mapped before it is filled."""
        while self._taken:
            taken = self._taken.popleft()
            if isinstance(taken, memoryview):
                yield packer.copy_of_bytes(taken)
            else:
                yield packer.copy_of(taken)


class _Pickler(pickle.Pickler):
    """Pickles arrays as tickets."""

    def __init__(self, stream: _Stream, outside: _Outside) -> None:
        super().__init__(stream, protocol=5, buffer_callback=outside.take)
        self._outside = outside

    def reducer_override(self, obj: Any) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(obj, numpy.ndarray) or obj.dtype.hasobject:
            return NotImplemented
        kind = type(obj)
        if kind is numpy.memmap:
            kind = numpy.ndarray
        if kind is numpy.ndarray:
            if obj.nbytes < PAGE_SIZE:
                return NotImplemented
            return _same, (self._outside.ticket(obj.view(numpy.ndarray)),)
        if not _pickles_as_ndarray(kind, numpy):
            return NotImplemented
        ticket = self._outside.ticket(obj.view(numpy.ndarray))
        # numpy drops a subclass's attributes, and calls __setstate__ with its own kind of state.
        attributes = getattr(obj, "__dict__", None) or None
        return _as_class, (kind, ticket), attributes, None, None, _set_attributes


def _pickles_as_ndarray(kind: type, numpy: Any) -> bool:
    """Say whether a subclass leaves pickling to ndarray (or is masked: data, and attributes)."""
    masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", numpy.ndarray)
    return any(
        kind.__reduce_ex__ is base.__reduce_ex__
        and kind.__reduce__ is base.__reduce__
        and kind.__setstate__ is base.__setstate__  # type: ignore[attr-defined]
        for base in (numpy.ndarray, masked)
    )


def _same(array: NDArray[Any]) -> NDArray[Any]:
    return array


def _as_class(kind: type[np.ndarray[Any, Any]], array: NDArray[Any]) -> NDArray[Any]:
    return array.view(kind)


def _set_attributes(array: NDArray[Any], attributes: dict[str, Any]) -> None:
    array.__dict__.update(attributes)
