"""``load``: model files, read straight into memory that KSM may merge."""

from __future__ import annotations

import ast
import io
import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NoReturn

from pyksm.arrays import Packer
from pyksm.source import PIECE, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["load"]

_LARGEST_SAFETENSORS_HEADER = 100_000_000  # as in the safetensors library
_LARGEST_NPY_HEADER = 1 << 20
_DEFLATE_AT_BEST = 1032  # no deflated byte stands for more
_PICKLE_HINT = (
    "a pickle runs code of its author's choice when it is loaded. If you trust whoever wrote it, "
    "say pyksm.load(..., allow_pickle=True)"
)


def load(
    file: str | os.PathLike[str] | IO[bytes],
    *,
    allow_pickle: bool = False,
    missing_ok: bool = False,
) -> Any:
    """Read a file of arrays straight into mergeable memory.

    What it is, is told by its first bytes, not its name:

    ``.npy``: an array, as ``numpy.load`` returns it (all header versions).
    ``.npz``: a dict of arrays, all of them read (``numpy.load`` reads them one by one later).
    ``.safetensors``: a dict of arrays. numpy has no bfloat16 and no 8-bit floats: they come as
    dtypes of ``ml_dtypes`` if that is installed, else as uint16 and uint8 with the same bits.
    pickle and joblib files, also compressed (gzip, zlib, bz2, xz): only with
    ``allow_pickle=True``, because they can run anything. Arrays in them go into mergeable memory
    as in :func:`pyksm.copy`; objects are made by Python code and not by C, so that a file of
    millions of small objects loads some times slower than with ``pickle.load``.

    Each array of a page (4 KiB) or more starts on a page, so that every process that loads the
    file has equal pages. No second copy of the data is made on the way, only of one compressed
    block or one MiB at a time; what the file says of its sizes is checked before memory is taken.

    ``file``: a path, or a binary file object, which is read from where it stands (an ``.npz``
    must be seekable).

    >>> import io, numpy as np, pyksm
    >>> saved = io.BytesIO()
    >>> np.save(saved, np.arange(6.0).reshape(2, 3))
    >>> _ = saved.seek(0)
    >>> pyksm.load(saved)
    array([[0., 1., 2.],
           [3., 4., 5.]])

    Raises ``FileNotFoundError`` and other ``OSError``, ``ValueError`` with file and place for
    what is damaged, cut short, of no known kind or a pickle not allowed, and what
    :class:`pyksm.Buffer` raises.
    """
    if not hasattr(file, "read"):
        with open(os.fspath(file), "rb") as opened:
            return _load(Source(opened, os.fspath(file)), allow_pickle, missing_ok)
    name = getattr(file, "name", None)
    name = name if isinstance(name, str) else f"<{type(file).__name__}>"
    return _load(Source(file, name), allow_pickle, missing_ok)  # type: ignore[arg-type]


def _load(source: Source, allow_pickle: bool, missing_ok: bool) -> Any:
    packer = Packer(missing_ok=missing_ok)
    head = source.peek(16)
    if not head:
        raise ValueError(f"{source.name} is empty")
    if head.startswith(b"\x93NUMPY"):
        return _load_npy(source, packer, allow_pickle)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _load_npz(source, packer, allow_pickle)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_SAFETENSORS_HEADER:
        return _load_safetensors(source, packer)
    opener = next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None)
    if opener is None and not _looks_pickled(head):
        raise ValueError(
            f"{source.name} is no .npy, .npz, .safetensors, pickle or joblib file: it starts with "
            f"{head!r}"
        )
    if not allow_pickle:
        raise ValueError(f"{source.name} is a pickle, or a compressed one, and {_PICKLE_HINT}")
    if opener is None:
        return _load_pickle(source, packer)
    with opener(source) as unpacked:
        return _load_pickle(Source(unpacked, source.name, sized=False), packer, to_end=True)


def _looks_pickled(head: bytes) -> bool:
    # From protocol 2 (Python 2.3) on: PROTO and its number. Older ones begin with anything.
    return len(head) >= 2 and head[0] == 0x80 and 2 <= head[1] <= 5


# --- .npy and .npz -----------------------------------------------------------------------------


def _load_npy(source: Source, packer: Packer, allow_pickle: bool) -> NDArray[Any]:
    shape, fortran, dtype = _npy_header(source)
    if not dtype.hasobject:
        what = f"an array of {shape} {dtype}"
        return source.read_array(packer, shape, dtype, "F" if fortran else "C", what)
    if not allow_pickle:
        source.fail(f"it holds Python objects, that is a pickle, and {_PICKLE_HINT}")
    return _load_pickle(source, packer)  # type: ignore[no-any-return]


def _npy_header(source: Source) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read magic, version and header: numpy.lib.format's docstring is the definition."""
    import numpy as np

    major, minor = source.read_exactly(8, "the magic of .npy")[6:]
    if (major, minor) not in ((1, 0), (2, 0), (3, 0)):
        source.fail(f".npy version {major}.{minor} is not known; 1.0, 2.0 and 3.0 are")
    form = "<H" if major == 1 else "<I"
    (length,) = struct.unpack(
        form, source.read_exactly(struct.calcsize(form), "the length of the .npy header")
    )
    if length > _LARGEST_NPY_HEADER:
        source.fail(f"a .npy header of {length} bytes is more than {_LARGEST_NPY_HEADER}")
    text = source.read_exactly(length, "the .npy header")
    try:
        header = ast.literal_eval(text.decode("utf-8" if major == 3 else "latin-1").strip())
        if set(header) != {"descr", "fortran_order", "shape"}:
            raise ValueError(f"its keys are {sorted(header)}")
        shape, fortran = header["shape"], header["fortran_order"]
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"its shape is {shape!r}")
        if fortran is not True and fortran is not False:
            raise ValueError(f"its fortran_order is {fortran!r}")
        dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(header["descr"])
    except (ValueError, TypeError, SyntaxError, KeyError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{source.name}: a malformed .npy header (before byte {source.place}): {error}"
        ) from error
    return shape, fortran, dtype


def _load_npz(source: Source, packer: Packer, allow_pickle: bool) -> dict[str, NDArray[Any]]:
    import zipfile
    import zlib

    if source.size is None:
        raise ValueError(f"{source.name}: an .npz is read from its end, so it must be seekable")
    arrays = {}
    member = None
    try:
        with zipfile.ZipFile(source.file) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    _not_an_array(source.name, member.filename)
                name = f"{source.name}[{member.filename}]"
                if member.file_size > member.compress_size * _DEFLATE_AT_BEST + 1024 and (
                    member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                ):
                    raise ValueError(
                        f"{name}: {member.compress_size} bytes cannot unpack to {member.file_size}"
                    )
                with archive.open(member) as opened:
                    inner = Source(opened, name, sized=False)
                    inner.size = member.file_size
                    arrays[member.filename[:-4]] = _load_npy(inner, packer, allow_pickle)
                    if opened.read(1):  # reading on to the end also checks the CRC
                        inner.fail("more data than the array takes")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        where = f"{source.name}[{member.filename}]" if member else source.name
        raise ValueError(f"{where}: a damaged or unreadable .npz: {error}") from error
    return arrays


def _not_an_array(file: str, member: str) -> NoReturn:
    hint = ""
    if member.endswith("data.pkl"):
        hint = ". It looks like a PyTorch checkpoint: save it as .safetensors"
    raise ValueError(f"{file}: {member!r} in this zip file is no .npy, so it is no .npz{hint}")


# --- .safetensors ------------------------------------------------------------------------------

# Names of the format, and dtypes of numpy or (after a colon) of ml_dtypes and, failing that, numpy.
_SAFETENSORS = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
    "BF16": "bfloat16:<u2", "F8_E4M3": "float8_e4m3fn:u1", "F8_E5M2": "float8_e5m2:u1",
    "F8_E8M0": "float8_e8m0fnu:u1", "F8_E4M3FNUZ": "float8_e4m3fnuz:u1",
    "F8_E5M2FNUZ": "float8_e5m2fnuz:u1",
}  # fmt: skip


def _load_safetensors(source: Source, packer: Packer) -> dict[str, NDArray[Any]]:
    length = int.from_bytes(source.read_exactly(8, "the length of the header"), "little")
    header = _safetensors_header(source, source.read_exactly(length, "the safetensors header"))
    tensors = {name: _tensor(source, name, about) for name, about in header.items()}
    # Every byte of the data belongs to exactly one tensor; that is the format's own rule.
    end = 0
    for name, (shape, _, begin, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != end:
            source.fail(f"tensor {name!r} of shape {shape} begins at {begin}, not at {end}")
        end = stop
    source.need(end, "the data of all tensors")
    if source.size is not None and source.size - source.place != end:
        source.fail(f"{source.size - source.place - end} bytes behind the last tensor")
    arrays = {
        name: source.read_array(packer, shape, dtype, "C", f"tensor {name!r}")
        for name, (shape, dtype, _, _) in sorted(tensors.items(), key=lambda item: item[1][2:])
    }
    return {name: arrays[name] for name in tensors}  # in the order of the header


def _safetensors_header(source: Source, text: bytes) -> dict[str, Any]:
    import json

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("the same name twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source.name}: the safetensors header is no JSON: {error}") from error
    if not isinstance(header, dict):
        source.fail("the safetensors header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        source.fail("__metadata__ must map strings to strings")
    return header


def _tensor(
    source: Source, name: str, about: Any
) -> tuple[tuple[int, ...], np.dtype[Any], int, int]:
    """Return shape, dtype, begin and end of a tensor, once they are sure to fit together."""
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        source.fail(f"tensor {name!r} must have dtype, shape and data_offsets")
    shape, offsets = about["shape"], about["data_offsets"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            source.fail(f"tensor {name!r}: {what} must be numbers from 0 up, not {numbers!r}")
    if len(offsets) != 2:
        source.fail(f"tensor {name!r}: data_offsets must be two numbers, not {offsets!r}")
    if not isinstance(about["dtype"], str) or about["dtype"] not in _SAFETENSORS:
        source.fail(f"tensor {name!r}: dtype {about['dtype']!r} is not known")
    dtype = _safetensors_dtype(about["dtype"])
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        source.fail(
            f"tensor {name!r}: {shape} of {about['dtype']} is {nbytes} bytes, and data_offsets "
            f"{offsets} are {offsets[1] - offsets[0]}"
        )
    return tuple(shape), dtype, offsets[0], offsets[1]


def _safetensors_dtype(name: str) -> np.dtype[Any]:
    import numpy as np

    special, _, plain = _SAFETENSORS[name].rpartition(":")
    if special:
        try:
            import ml_dtypes

            plain = getattr(ml_dtypes, special)
        except (ImportError, AttributeError):
            pass
    found: np.dtype[Any] = np.dtype(plain)
    return found


# --- pickle and joblib -------------------------------------------------------------------------


def _open_gzip(source: Any) -> Any:
    import gzip

    return gzip.GzipFile(fileobj=source)


def _open_bz2(source: Any) -> IO[bytes]:
    import bz2

    return bz2.BZ2File(source)


def _open_lzma(source: Any) -> IO[bytes]:
    import lzma

    return lzma.LZMAFile(source)


@contextmanager
def _open_zlib(source: Any) -> Iterator[IO[bytes]]:
    yield io.BufferedReader(_Inflated(source), PIECE)


class _Inflated(io.RawIOBase):
    """A zlib stream unpacked piece by piece (joblib's default; the library has no such file)."""

    def __init__(self, source: Source) -> None:
        import zlib

        self._source = source
        self._inflate = zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._inflate.eof:
            packed = self._inflate.unconsumed_tail or self._source.read(PIECE)
            data = self._inflate.decompress(packed, len(target))
            if data:
                target[: len(data)] = data
                return len(data)
            if not packed:
                raise EOFError("the zlib stream ends before its end mark")
        return 0


_COMPRESSED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": _open_gzip,
    b"BZh": _open_bz2,
    b"\xfd7zXZ\x00": _open_lzma,
    b"\x5d\x00\x00": _open_lzma,
    b"\x78\x01": _open_zlib,
    b"\x78\x5e": _open_zlib,
    b"\x78\x9c": _open_zlib,
    b"\x78\xda": _open_zlib,
}


def _load_pickle(source: Source, packer: Packer, *, to_end: bool = False) -> Any:
    import lzma
    import pickle
    import zlib

    from pyksm.unpickling import Unpickler

    try:
        loaded = Unpickler(source, packer).load()
        if to_end:
            source.read(1)  # behind the pickle is the checksum of the compressed data
        return loaded
    except (
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        AssertionError,
        OSError,
        struct.error,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise ValueError(
            f"{source.name}: a damaged pickle, or one of something else (before byte "
            f"{source.place}): {type(error).__name__}: {error}"
        ) from error
    except Exception as error:
        if source.name not in str(error):
            error.add_note(f"pyksm.load was reading {source.name}, near byte {source.place}")
        raise
