"""numpy arrays in memory that KSM may merge: ``empty``, ``zeros``, ``full``, ``array`` and so on.

They are called as numpy's, and what they return is an ordinary array whose data starts on a page
of its own in a :class:`pyksm.Buffer`. The ``Buffer`` lives as long as any array made from it.

A page (4 KiB) is the smallest piece there is: an array of 10 bytes takes a whole page, and two of
them never share one. For many small arrays use ``pyksm.allocator()``, or let numpy have them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import index
from typing import TYPE_CHECKING, Any

from pyksm._buffer import Buffer
from pyksm._sys import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal, SupportsIndex, TypeAlias

    import numpy as np
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Allocator: TypeAlias = Callable[[int], "Buffer | memoryview"]
    Shape: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
    Order: TypeAlias = Literal["C", "F"]
    LikeOrder: TypeAlias = Literal["C", "F", "A", "K"]

__all__ = [
    "array",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "zeros",
    "zeros_like",
]

_SLAB = 1 << 20
_OWN_MAPPING = 1 << 16
"""From here on an array has a mapping to itself; below it shares a slab."""


def empty(
    shape: Shape, dtype: DTypeLike = float, order: Order = "C", *, missing_ok: bool = False
) -> NDArray[Any]:
    """Return a new array in mergeable memory, for you to fill.

    ``shape``, ``dtype`` and ``order`` are ``numpy.empty``'s. The memory is fresh from the kernel
    and so zero, whatever numpy promises. When you have filled 2 MiB or more of it, call
    ``pyksm.arrays.keep_small(array)``, or huge pages may come back over merged memory (``full``,
    ``array``, ``copy`` and ``load`` have done that when they return).

    >>> import pyksm
    >>> weights = pyksm.empty((1000, 300), "f4")
    >>> weights.shape, weights.ctypes.data % 4096
    ((1000, 300), 0)

    An array of size 0 is numpy's own. Raises ``TypeError`` for dtypes that hold Python objects
    (their bytes are addresses, equal in no two processes), and what :class:`pyksm.Buffer` raises:
    ``MemoryError``, and ``NotSupported`` without KSM unless ``missing_ok``.
    """
    return _new(*_described(shape, dtype), order, _allocator(missing_ok))


def zeros(
    shape: Shape, dtype: DTypeLike = float, order: Order = "C", *, missing_ok: bool = False
) -> NDArray[Any]:
    """Return a new array of zeros in mergeable memory; otherwise as :func:`pyksm.empty`.

    >>> import pyksm
    >>> pyksm.zeros(3)
    array([0., 0., 0.])
    """
    return _new(*_described(shape, dtype), order, _allocator(missing_ok))


def ones(
    shape: Shape, dtype: DTypeLike = float, order: Order = "C", *, missing_ok: bool = False
) -> NDArray[Any]:
    """Return a new array of ones in mergeable memory; otherwise as :func:`pyksm.empty`.

    >>> import pyksm
    >>> pyksm.ones((2, 2), int)
    array([[1, 1],
           [1, 1]])
    """
    return full(shape, 1, dtype, order, missing_ok=missing_ok)


def full(
    shape: Shape,
    fill_value: Any,
    dtype: DTypeLike | None = None,
    order: Order = "C",
    *,
    missing_ok: bool = False,
) -> NDArray[Any]:
    """Return a new array filled with one value; otherwise as :func:`pyksm.empty`.

    ``dtype`` is by default that of ``numpy.array(fill_value)``. Its pages are all equal, and so
    they merge with each other.

    >>> import pyksm
    >>> pyksm.full(3, 7)
    array([7, 7, 7])
    """
    import numpy as np

    if dtype is None:
        dtype = np.asarray(fill_value).dtype
    return _filled(_new(*_described(shape, dtype), order, _allocator(missing_ok)), fill_value)


def array(
    object: ArrayLike,
    /,
    dtype: DTypeLike | None = None,
    *,
    order: LikeOrder = "K",
    subok: bool = False,
    ndmin: int = 0,
    missing_ok: bool = False,
) -> NDArray[Any]:
    """Return a copy of an array, or of anything ``numpy.array`` takes, in mergeable memory.

    The parameters are ``numpy.array``'s, except that it always copies. From an array the data is
    copied once; from lists numpy builds a temporary array first. The result is writable.

    >>> import pyksm
    >>> pyksm.array([[1, 2], [3, 4]], "f4")
    array([[1., 2.],
           [3., 4.]], dtype=float32)

    Raises as :func:`pyksm.empty`.
    """
    import numpy as np

    wanted = None if dtype is None else np.dtype(dtype)
    if wanted is not None:
        _refuse_objects(wanted)
    if not isinstance(object, np.ndarray) or (wanted is not None and not wanted.itemsize):
        # numpy alone finds out the length of strings and the shape of nested lists.
        object = np.array(object, dtype=wanted, copy=None, subok=subok, ndmin=ndmin)
    source: NDArray[Any] = object if subok else np.asarray(object)
    if source.ndim < ndmin:
        source = source.reshape((1,) * (ndmin - source.ndim) + source.shape)
    kind = wanted if wanted is not None and wanted.itemsize else source.dtype
    made = _like(source, source.shape, kind, order, _allocator(missing_ok))
    np.copyto(made, source, casting="unsafe")
    keep_small(made)
    return as_subclass(made, source) if subok else made


def empty_like(
    prototype: ArrayLike,
    dtype: DTypeLike | None = None,
    order: LikeOrder = "K",
    subok: bool = True,
    shape: Shape | None = None,
    *,
    missing_ok: bool = False,
) -> NDArray[Any]:
    """Return a new array shaped and typed like another, in mergeable memory, for you to fill.

    The parameters are ``numpy.empty_like``'s: ``order="K"`` keeps the order of the axes in memory,
    ``subok`` the subclass. Otherwise as :func:`pyksm.empty`.

    >>> import numpy, pyksm
    >>> pyksm.empty_like(numpy.ones((2, 3), "f4", order="F")).flags.f_contiguous
    True
    """
    import numpy as np

    source = np.asanyarray(prototype)
    if shape is None and dtype is None:
        dims, kind = source.shape, source.dtype
    else:
        dims, kind = _described(
            source.shape if shape is None else shape, source.dtype if dtype is None else dtype
        )
    made = _like(source, dims, kind, order, _allocator(missing_ok))
    return as_subclass(made, source) if subok else made


def zeros_like(
    a: ArrayLike,
    dtype: DTypeLike | None = None,
    order: LikeOrder = "K",
    subok: bool = True,
    shape: Shape | None = None,
    *,
    missing_ok: bool = False,
) -> NDArray[Any]:
    """Return an array of zeros shaped and typed like another; otherwise as ``empty_like``.

    >>> import pyksm
    >>> pyksm.zeros_like([1, 2])
    array([0, 0])
    """
    return empty_like(a, dtype, order, subok, shape, missing_ok=missing_ok)


def ones_like(
    a: ArrayLike,
    dtype: DTypeLike | None = None,
    order: LikeOrder = "K",
    subok: bool = True,
    shape: Shape | None = None,
    *,
    missing_ok: bool = False,
) -> NDArray[Any]:
    """Return an array of ones shaped and typed like another; otherwise as ``empty_like``.

    >>> import pyksm
    >>> pyksm.ones_like([1.5, 2])
    array([1., 1.])
    """
    return full_like(a, 1, dtype, order, subok, shape, missing_ok=missing_ok)


def full_like(
    a: ArrayLike,
    fill_value: Any,
    dtype: DTypeLike | None = None,
    order: LikeOrder = "K",
    subok: bool = True,
    shape: Shape | None = None,
    *,
    missing_ok: bool = False,
) -> NDArray[Any]:
    """Return an array of one value shaped and typed like another; otherwise as ``empty_like``.

    >>> import pyksm
    >>> pyksm.full_like([1, 2], 9)
    array([9, 9])
    """
    made = empty_like(a, dtype, order, subok, shape, missing_ok=missing_ok)
    return _filled(made, fill_value)


def buffer_of(array: object) -> Buffer | None:
    """Return the ``Buffer`` an array's data lies in; None if it is not pyksm's.

    >>> import pyksm, pyksm.arrays
    >>> pyksm.arrays.buffer_of(pyksm.ones(5000)[1:])
    <pyksm.Buffer: 40000 bytes at ...>
    """
    owner = array
    while owner is not None and not isinstance(owner, Buffer):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    return owner


def keep_small(array: NDArray[Any] | memoryview | Buffer) -> None:
    """Keep huge pages out of an array that is now filled: see :meth:`pyksm.Buffer.keep_small`.

    Nothing is done for memory that is not pyksm's.

    >>> import pyksm, pyksm.arrays
    >>> weights = pyksm.empty((1 << 20,))
    >>> weights[:] = 1.5
    >>> pyksm.arrays.keep_small(weights)
    """
    owner = buffer_of(array)
    if owner is not None:
        owner.keep_small()


# What copying and loading need of this room.


class Packer:
    """Memory for many arrays: each from a page of its own, small ones together in one mapping.

    A mapping per array would run into vm.max_map_count (65,530) once every second one is freed.
    The price: the pages of a small array are freed when its whole slab is.
    """

    def __init__(self, *, missing_ok: bool = False) -> None:
        """Begin with no memory."""
        self._missing_ok = missing_ok
        self._slab: memoryview | None = None
        self._used = 0

    def room(self, nbytes: int) -> Buffer | memoryview:
        """Return zero-filled memory, page-aligned, nobody else in its last page."""
        if nbytes >= _OWN_MAPPING:
            return Buffer(nbytes, missing_ok=self._missing_ok)
        whole = -nbytes % PAGE_SIZE + nbytes
        if self._slab is None or self._used + whole > _SLAB:
            self._slab = memoryview(Buffer(_SLAB, missing_ok=self._missing_ok))
            self._used = 0
            keep_small(self._slab)  # smaller than a huge page, but its neighbours need not be
        start, self._used = self._used, self._used + whole
        return self._slab[start : start + nbytes]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], order: str = "C") -> NDArray[Any]:
        """Return an array to fill; numpy's own if it is smaller than a page."""
        import numpy as np

        if math.prod(shape) * dtype.itemsize < PAGE_SIZE:
            return np.empty(shape, dtype, "F" if order == "F" else "C")
        return _new(shape, dtype, order, self.room)

    def copy_of(self, source: NDArray[Any]) -> NDArray[Any]:
        """Return a copy, writable or not as the source is, with its axes in the same order."""
        import numpy as np

        if source.nbytes < PAGE_SIZE:
            made: NDArray[Any] = np.array(source, order="K", copy=True)
        else:
            made = _like(source, source.shape, source.dtype, "K", self.room)
            np.copyto(made, source)
            keep_small(made)
        made.flags.writeable = source.flags.writeable
        return made

    def copy_of_bytes(self, source: memoryview) -> Buffer | memoryview:
        """Return memory with the same bytes."""
        made = self.room(source.nbytes)
        with memoryview(made) as target:
            target[:] = source
        keep_small(made)
        return made


def lay_out(
    memory: Buffer | memoryview, shape: tuple[int, ...], dtype: np.dtype[Any], order: str = "C"
) -> NDArray[Any]:
    """Return an array over memory, holding an export of it for as long as it lives.

    ``numpy.ndarray(buffer=memory)`` would release its export at once, and the memory could be
    closed under the array.
    """
    import numpy as np

    bytes_of_memory = np.frombuffer(memoryview(memory), np.uint8)
    return np.ndarray(shape, dtype, buffer=bytes_of_memory, order="F" if order == "F" else "C")


def as_subclass(made: NDArray[Any], source: NDArray[Any]) -> NDArray[Any]:
    """View an array as another's subclass, with that one's attributes."""
    import numpy as np

    if type(source) is np.ndarray:
        return made
    made = made.view(type(source))
    made.__array_finalize__(source)  # view() passed on none of the attributes: made had none
    return made


def _allocator(missing_ok: bool) -> Allocator:
    return lambda nbytes: Buffer(nbytes, missing_ok=missing_ok)


def _new(
    shape: tuple[int, ...], dtype: np.dtype[Any], order: str, allocate: Allocator
) -> NDArray[Any]:
    import numpy as np

    if order not in ("C", "F"):
        raise ValueError(f"order must be 'C' or 'F', not {order!r}")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return np.empty(shape, dtype, "F" if order == "F" else "C")
    return lay_out(allocate(nbytes), shape, dtype, order)


def _like(
    source: NDArray[Any],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    order: str,
    allocate: Allocator,
) -> NDArray[Any]:
    _refuse_objects(dtype)
    axes = _axes_in_memory(source, order, len(shape))
    # Made C-contiguous in the order in which the axes lie in memory, then turned round.
    made = _new(tuple(shape[axis] for axis in axes), dtype, "C", allocate)
    return made.transpose([axes.index(axis) for axis in range(len(shape))])


def _filled(made: NDArray[Any], fill_value: Any) -> NDArray[Any]:
    import numpy as np

    np.copyto(made, fill_value, casting="unsafe")
    keep_small(made)
    return made


def _described(shape: Shape, dtype: DTypeLike) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype as numpy will have them, or raise before any memory is mapped."""
    import numpy as np

    dims = tuple(_dimension(each) for each in _sequence(shape))
    kind: np.dtype[Any] = np.dtype(dtype)
    _refuse_objects(kind)
    if kind.subdtype is not None:  # an array of arrays is an array of more dimensions
        kind, more = kind.subdtype
        dims += more
    if not kind.itemsize:  # "S" and "U" without a length are of length 1
        kind = np.empty(0, kind).dtype
    return dims, kind


def _sequence(shape: Shape) -> Iterable[SupportsIndex]:
    try:
        index(shape)  # type: ignore[arg-type]
    except TypeError:
        pass
    else:
        return (shape,)  # type: ignore[return-value]
    if isinstance(shape, Iterable) and not isinstance(shape, (str, bytes)):
        return shape
    raise TypeError(f"shape must be an int or a sequence of ints, not {type(shape).__name__}")


def _dimension(size: SupportsIndex) -> int:
    if isinstance(size, bool):
        raise TypeError("a dimension must be an int, not a bool")
    try:
        found = index(size)
    except TypeError:
        raise TypeError(f"a dimension must be an int, not {type(size).__name__}") from None
    if found < 0:
        raise ValueError(f"a dimension must not be negative: {found}")
    return found


def _refuse_objects(dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise TypeError(
            f"dtype {dtype} holds Python objects: an array of addresses, equal in no two "
            "processes, so there is nothing to merge. Use a dtype of plain data, or numpy"
        )


def _axes_in_memory(source: NDArray[Any], order: str, ndim: int) -> list[int]:
    """Return the axes from the slowest to the fastest in memory, as numpy's order asks for."""
    if order not in ("C", "F", "A", "K"):
        raise ValueError(f"order must be 'C', 'F', 'A' or 'K', not {order!r}")
    flags = source.flags
    axes = list(range(ndim))
    if order == "F" or (order in "AK" and flags.f_contiguous and not flags.c_contiguous):
        return axes[::-1]
    if order == "K" and not flags.c_contiguous and ndim == source.ndim:
        return sorted(axes, key=lambda axis: -abs(source.strides[axis]))
    return axes
