"""An unpickler that lets the data of arrays go straight to mergeable memory.

Python's own ``pickle.Unpickler`` in C first makes a ``bytes`` of an array's data, and keeps it in
its memo to the end. The one in Python (``pickle._Unpickler``, on which joblib builds, too) lets us
see what a piece of data is for when its length has been read and the data has not.
"""

from __future__ import annotations

import functools
import math
import pickle
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pyksm._buffer import Buffer
from pyksm._sys import PAGE_SIZE
from pyksm.arrays import Packer, keep_small, lay_out

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    from pyksm.source import Source

    PythonUnpickler: TypeAlias = Any  # typeshed takes pickle._Unpickler for the one in C
else:
    PythonUnpickler = pickle._Unpickler

__all__ = ["Unpickler"]


class Payload:
    """The data of an array on the unpickler's stack, already where it belongs."""

    def __init__(self, memory: Buffer | memoryview, *, readonly: bool) -> None:
        """Take filled memory."""
        self.memory = memory
        self.readonly = readonly
        keep_small(memory)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], order: str) -> NDArray[Any]:
        """Return the array the data is of."""
        if math.prod(shape) * dtype.itemsize != len(self.memory):
            raise pickle.UnpicklingError(f"{len(self.memory)} bytes for an array {shape} {dtype}")
        return lay_out(self.memory, shape, dtype, order)


def from_buffer(numpys: Callable[..., NDArray[Any]], data: Any, *rest: Any) -> NDArray[Any]:
    """Stand for numpy's ``_frombuffer``, by which pickles of protocol 5 make arrays."""
    if isinstance(data, Payload):
        data = memoryview(data.memory).toreadonly() if data.readonly else data.memory
    return numpys(data, *rest)


class _Feed:
    """What the unpickler reads from; hands over memory it was given in place of ``bytes``."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.readline = source.readline
        self.target: Buffer | memoryview | None = None

    def read(self, count: int) -> Any:
        if self.target is None:
            return self._source.read_exactly(count, "the pickle")
        target, self.target = self.target, None
        self._source.fill(target, "the data of an array")
        return target


class Unpickler(PythonUnpickler):  # type: ignore[misc]
    """Loads pickle and joblib streams; arrays of a page or more get memory of the packer."""

    dispatch: ClassVar[dict[int, Any]] = dict(PythonUnpickler.dispatch)

    def __init__(self, source: Source, packer: Packer) -> None:
        """Read from a source, and lay arrays into memory of a packer."""
        self._feed = _Feed(source)
        self._source = source
        self._packer = packer
        super().__init__(self._feed)

    def find_class(self, module: str, name: str) -> Any:
        """Put our own in the place of the function that makes arrays."""
        if name == "_frombuffer" and module in ("numpy.core.numeric", "numpy._core.numeric"):
            return functools.partial(from_buffer, super().find_class("numpy._core.numeric", name))
        return super().find_class(module, name)

    def _load_bytes(self, length: str, readonly: bool) -> None:
        (nbytes,) = struct.unpack(length, self.read(struct.calcsize(length)))
        if self._source.size is not None and nbytes > self._source.size:
            self._source.fail(f"a string of {nbytes} bytes is more than the file holds")
        if nbytes < PAGE_SIZE or not self._is_for_array():
            data = self.read(nbytes)
            self.append(data if readonly else bytearray(data))
            return
        memory = self._feed.target = self._packer.room(nbytes)
        data = self.read(nbytes)
        if self._feed.target is not None:  # it was in a frame, which has been read already
            self._feed.target = None
            memoryview(memory)[:] = data
        self.append(Payload(memory, readonly=readonly))

    def _is_for_array(self) -> bool:
        """Look at the stack: ``array MARK 1 shape dtype order`` or ``_frombuffer MARK``."""
        if not self.metastack or not self.metastack[-1]:
            return False
        receiver = self.metastack[-1][-1]
        if isinstance(receiver, functools.partial):
            return receiver.func is from_buffer and not self.stack
        return len(self.stack) == 4 and self.stack[0] == 1 and _takes_numpys_state(receiver)

    def load_binbytes(self) -> None:
        """Load bytes of up to 4 GiB."""
        self._load_bytes("<I", readonly=True)

    def load_binbytes8(self) -> None:
        """Load bytes of any length."""
        self._load_bytes("<Q", readonly=True)

    def load_bytearray8(self) -> None:
        """Load a bytearray."""
        self._load_bytes("<Q", readonly=False)

    def load_build(self) -> None:
        """Give an object its state: an array its data, and joblib's wrapper the array itself."""
        state, receiver = self.stack[-1], self.stack[-2]
        if isinstance(state, tuple) and len(state) == 5 and _takes_numpys_state(receiver):
            data = state[4]
            if isinstance(data, bytes) and len(data) >= PAGE_SIZE:  # of protocol 2, by way of str
                data = Payload(self._packer.copy_of_bytes(memoryview(data)), readonly=True)
            if isinstance(data, Payload):
                self.stack.pop()
                made = data.array(state[1], state[2], "F" if state[3] else "C")
                self._replace(receiver, _native(made).view(type(receiver)))
                return
        super().load_build()
        if type(receiver).__module__ == "joblib.numpy_pickle":
            if type(receiver).__name__ == "NumpyArrayWrapper":
                self.stack[-1] = self._read_joblib_array(receiver)
        elif type(receiver).__name__ in ("NDArrayWrapper", "ZNDArrayWrapper"):
            raise pickle.UnpicklingError("a joblib file from before joblib 0.10; save it anew")

    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.BUILD[0]] = load_build

    def _replace(self, empty: NDArray[Any], made: NDArray[Any]) -> None:
        """Let the array that was made first, still empty, be another one."""
        self.stack[-1] = made
        for number in reversed(self.memo):
            if self.memo[number] is empty:
                self.memo[number] = made
                return

    def _read_joblib_array(self, wrapper: Any) -> Any:
        """Read the data that joblib puts behind the pickled description of an array."""
        if wrapper.dtype.hasobject:
            return Unpickler(self._source, self._packer).load()
        if getattr(wrapper, "numpy_array_alignment_bytes", None) is not None:  # joblib 1.2
            padding = self._source.read_exactly(1, "the padding of an array")[0]
            self._source.read_exactly(padding, "the padding of an array")
        array = self._source.read_array(
            self._packer, tuple(wrapper.shape), wrapper.dtype, wrapper.order, "the data of an array"
        )
        import numpy as np

        array = _native(array)
        plain = wrapper.subclass in (np.ndarray, np.memmap)
        return array if plain else array.view(wrapper.subclass)


def _native(array: NDArray[Any]) -> NDArray[Any]:
    """Swap the bytes of foreign numbers in place, as numpy and joblib do when they unpickle."""
    if array.dtype.isnative or array.dtype.names is not None:
        return array
    return array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))


def _takes_numpys_state(receiver: Any) -> bool:
    import numpy as np

    return (
        isinstance(receiver, np.ndarray)
        and type(receiver).__setstate__ is np.ndarray.__setstate__
        and receiver.size == 0
    )
