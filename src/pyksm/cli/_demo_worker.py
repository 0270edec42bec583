"""One worker of ``pyksm demo``: a fresh process that loads the model by itself.

It takes commands, one JSON object a line, on standard input, and answers each with one line. It
ends when its input does, so that it never outlives the command that started it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyksm.loading import load
from pyksm.undo import Undo
from pyksm.verbs import merge, unmerge

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Worker", "digest", "file_digest", "main"]


def digest(arrays: Iterable[tuple[str, memoryview]]) -> str:
    """Return one SHA-256 over all names and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name, view in sorted(arrays, key=lambda item: item[0]):
        total.update(f"{name}\0{view.nbytes}\0".encode())
        total.update(view)
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """Return the digest of a model file, read without pyksm's loader and into no memory of ours."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] == b"\x93NUMPY" or data[:2] == b"PK":
            return _numpy_digest(path)
        with memoryview(data) as view:
            # The layout of safetensors: length of the header, header (JSON), data.
            start = 8 + int.from_bytes(view[:8], "little")
            header = json.loads(bytes(view[8:start]))
            header.pop("__metadata__", None)
            places = {name: tensor["data_offsets"] for name, tensor in header.items()}
            pieces = {name: view[start + a : start + b] for name, (a, b) in places.items()}
            try:
                return digest(pieces.items())
            finally:
                for piece in pieces.values():
                    piece.release()


def _numpy_digest(path: Path) -> str:
    import numpy as np

    return digest(_views(np.load(path, mmap_mode="r")))


def _views(model: NDArray[Any] | Mapping[str, NDArray[Any]]) -> list[tuple[str, memoryview]]:
    return [(name, _bytes(array)) for name, array in _named(model).items()]


def _named(model: NDArray[Any] | Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return dict(model) if isinstance(model, Mapping) else {"": model}


def _bytes(array: NDArray[Any]) -> memoryview:
    """View an array's bytes in the order in which they lie in memory."""
    flat = array.reshape(-1, order="A").view("u1")
    return flat.data if flat.size else memoryview(b"")


class Worker:
    """The model of this process, and what the command line may ask about it."""

    arrays: dict[str, NDArray[Any]]
    kept_apart: Undo

    def load(self, path: str) -> dict[str, object]:
        """Load the file, and keep its memory from merging until ``merge`` is asked for."""
        model = load(path)
        if not isinstance(model, Mapping) and not hasattr(model, "nbytes"):
            raise ValueError(f"{path} holds neither an array nor a dict of arrays")
        self.arrays = _named(model)
        # load() marks its memory. ksmd may be at work on this host already, and "before" has to
        # show a copy for each worker.
        self.kept_apart = unmerge(self._large())
        return {"tensors": len(self.arrays), "nbytes": sum(a.nbytes for a in self.arrays.values())}

    def merge(self) -> dict[str, object]:
        """Opt in: let the kernel merge the model's memory."""
        self.kept_apart.undo()
        return {"nbytes": merge(self._large()).nbytes}

    def unmerge(self) -> dict[str, object]:
        """Take a copy of its own again."""
        self.kept_apart = unmerge(self._large())
        return {"nbytes": self.kept_apart.nbytes}

    def digest(self) -> dict[str, object]:
        """Hash all weights as they are in memory now."""
        return {"digest": digest(_views(self.arrays))}

    def flip(self) -> dict[str, object]:
        """Change every bit of one byte; a second call changes them back."""
        largest: NDArray[np.uint8] = max(self.arrays.values(), key=lambda array: array.nbytes)
        flat = largest.reshape(-1, order="A").view("u1")
        flat[flat.size // 2] ^= 0xFF
        return {}

    def _large(self) -> list[NDArray[Any]]:
        """Return the arrays that fill a page at least; smaller ones never merge."""
        return [array for array in self.arrays.values() if array.nbytes >= 4096]


def main() -> int:
    """Answer commands until there are no more."""
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        action: Callable[..., dict[str, object]] = getattr(worker, request.pop("do"))
        try:
            answer = action(**request)
        except Exception as error:  # noqa: BLE001 - the other side prints it
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
