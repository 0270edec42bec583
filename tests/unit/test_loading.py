"""load(): every format into page-aligned memory, one copy at the peak, damage named."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import spawn

import pyksm
from pyksm.arrays import buffer_of

load = partial(pyksm.load, missing_ok=True)
trusting = partial(load, allow_pickle=True)
RNG = np.random.default_rng(0)


def aligned(array: np.ndarray) -> bool:
    return buffer_of(array) is not None and array.ctypes.data % 4096 == 0


def samples() -> dict[str, np.ndarray]:
    return {
        "c": RNG.random((300, 400)),
        "f": np.asfortranarray(RNG.random((30, 400))),
        "structured": np.zeros(1000, [("a", "f4"), ("b", "S3")]),
        "swapped": np.arange(2000, dtype=">i4"),
        "scalar": np.array(3.5),
        "none": np.zeros((0, 4), "f4"),
        "few": np.arange(3),
        "dates": np.arange(3000).astype("M8[s]"),
    }


def check(loaded: dict, expected: dict) -> None:
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
        assert not array.size or loaded[name].strides == array.strides
        assert loaded[name].flags.writeable
        assert aligned(loaded[name]) == (array.nbytes >= 4096), name


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("name", samples())
def test_npy(tmp_path, name, version):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, samples()[name], version=version)
    check({name: load(path)}, {name: np.load(path)})
    check({name: load(str(path))}, {name: np.load(path)})


def test_npy_with_a_name_of_a_field_outside_latin1(tmp_path):
    array = np.zeros(1000, [("μ→", "f8")])
    with pytest.warns(UserWarning, match="format 3"):
        np.save(tmp_path / "a.npy", array)
    assert load(tmp_path / "a.npy").dtype == array.dtype


def test_several_npy_in_one_file_are_read_one_after_another():
    file = io.BytesIO()
    for n in (2000, 3):
        np.save(file, np.arange(n))
    file.seek(0)
    assert [len(load(file)), len(load(file))] == [2000, 3]


def test_files_that_cannot_seek_or_readinto():
    data = io.BytesIO()
    np.save(data, np.arange(200_000))
    read_end, write_end = os.pipe()
    if not os.fork():
        os.close(read_end)
        with open(write_end, "wb") as file:
            file.write(data.getvalue())
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb", buffering=0) as file:
        np.testing.assert_array_equal(load(file), np.arange(200_000))
    os.wait()

    class OnlyRead:
        def __init__(self):
            self.data = io.BytesIO(data.getvalue())

        def read(self, count=-1):
            return self.data.read(min(count, 1000) if count > 0 else count)

    np.testing.assert_array_equal(load(OnlyRead()), np.arange(200_000))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    save(tmp_path / "a.npz", **samples())
    check(load(tmp_path / "a.npz"), samples_of(np.load(tmp_path / "a.npz")))
    with (tmp_path / "a.npz").open("rb") as file:
        assert load(file).keys() == samples().keys()


def samples_of(archive) -> dict[str, np.ndarray]:
    with archive:
        return {name: archive[name] for name in archive.files}


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    expected = {
        name: np.ascontiguousarray(array) for name, array in samples().items()
        if array.dtype.kind in "fi" and array.dtype.isnative and array.ndim
    }  # fmt: skip
    safetensors.save_file(expected, tmp_path / "a.safetensors", metadata={"made": "here"})
    check(load(tmp_path / "a.safetensors"), expected)


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_safetensors_kinds_numpy_lacks():
    header = {
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        "e": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [4, 5]},
    }
    loaded = load(io.BytesIO(safetensors_bytes(header, b"\x80\x3f\x00\x40\x38")))
    try:
        import ml_dtypes
    except ImportError:
        assert loaded["b"].dtype == np.uint16
    else:
        assert loaded["b"].dtype == ml_dtypes.bfloat16
        assert loaded["b"].astype(float).tolist() == [1.0, 2.0]
        assert loaded["e"].astype(float).tolist() == [1.0]


def test_safetensors_kinds_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    header = {"b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    loaded = load(io.BytesIO(safetensors_bytes(header, b"\x80\x3f\x00\x40")))
    assert loaded["b"].tolist() == [0x3F80, 0x4000]


def one(**change):
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "no JSON"),
        (b"{\xff}", b"", "no JSON"),
        (b'{"a":1,"a":2}', b"", "twice"),
        (b'{"t": 3}', b"", "'t' must have"),
        (b'{"__metadata__": {"a": 1}}', b"", "__metadata__"),
        (one(dtype="F33"), bytes(8), "F33"),
        (one(dtype=4), bytes(8), "dtype 4"),
        (one(shape=[-2]), bytes(8), "shape"),
        (one(shape=[2.0]), bytes(8), "shape"),
        (one(shape=[True]), bytes(8), "shape"),
        (one(shape=[1 << 40]), bytes(8), "is 4398046511104 bytes"),
        (one(data_offsets=[0]), bytes(8), "two numbers"),
        (one(data_offsets=[8, 0]), bytes(8), "-8"),
        (one(data_offsets=[4, 12]), bytes(12), "begins at 4, not at 0"),
        (one(extra=1), bytes(8), "must have"),
        (one(), bytes(7), "7 are left"),
        (one(), bytes(9), "1 bytes behind"),
        (one() | {"u": one()["t"]}, bytes(8), "begins at 0, not at 8"),
    ],
)
def test_malformed_safetensors(header, data, message):
    with pytest.raises(ValueError, match=message):
        load(io.BytesIO(safetensors_bytes(header, data)))


def test_a_safetensors_header_of_a_lie_takes_no_memory():
    with pytest.raises(ValueError, match="header"):
        load(io.BytesIO(struct.pack("<Q", 90_000_000) + b"{" + b" " * 99))
    tera = {"t": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}
    with pytest.raises(ValueError, match="are left"):
        load(io.BytesIO(safetensors_bytes(tera, bytes(100))))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles(tmp_path, protocol):
    source = samples() | {"turned": RNG.random((100, 50)).T[::2]}
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"arrays": source, "again": source["c"], "text": "x"}, protocol))
    loaded = trusting(path)
    plain = pickle.loads(path.read_bytes())
    assert loaded["again"] is loaded["arrays"]["c"]
    assert loaded["text"] == "x"
    check(loaded["arrays"], plain["arrays"])


def test_a_pickled_array_stays_readonly_and_bytes_stay_bytes(tmp_path):
    source = np.arange(20_000.0)
    source.flags.writeable = False
    blobs = {"b": b"1" * 9000, "ba": bytearray(b"2" * 90_000), "inside": (b"3" * 70_000,)}
    loaded = trusting(io.BytesIO(pickle.dumps([source, blobs, np.ma.arange(5000)], 5)))
    assert not loaded[0].flags.writeable
    assert aligned(loaded[0])
    assert loaded[1] == blobs
    assert type(loaded[1]["ba"]) is bytearray
    assert loaded[2].tolist() == list(range(5000))


@given(st.recursive(
    st.none() | st.integers() | st.text() | st.binary(max_size=9000)
    | st.integers(0, 3000).map(np.arange).map(lambda a: a.tolist()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
), st.integers(2, 5))  # fmt: skip
def test_any_plain_pickle(source, protocol):
    assert trusting(io.BytesIO(pickle.dumps(source, protocol))) == source


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("xz", 1), ("lzma", 1)])
def test_joblib(tmp_path, compress):
    joblib = pytest.importorskip("joblib")
    source = samples() | {"objects": np.array([{"a": 1}, None])}
    joblib.dump(source, tmp_path / "a.joblib", compress=compress)
    loaded = trusting(tmp_path / "a.joblib")
    assert loaded.pop("objects").tolist() == source.pop("objects").tolist()
    source["swapped"] = source["swapped"].astype("i4")  # joblib, too, swaps what is foreign
    check(loaded, source)


def test_pickle_of_an_estimator(tmp_path):
    pytest.importorskip("sklearn")
    from sklearn.ensemble import RandomForestClassifier

    data = RNG.random((500, 5))
    forest = RandomForestClassifier(3, random_state=0).fit(data, data[:, 0] > 0.5)
    loaded = trusting(io.BytesIO(pickle.dumps(forest)))
    np.testing.assert_array_equal(loaded.predict(data), forest.predict(data))


def bomb() -> bytes:
    class Bomb:
        def __reduce__(self):
            return (os.abort, ())

    return pickle.dumps(Bomb())


def test_pickles_are_refused_unless_allowed(tmp_path):
    objects = np.array([None, 1])
    np.save(tmp_path / "o.npy", objects)
    np.savez(tmp_path / "o.npz", o=objects)
    for name, data in (("p", bomb()), ("z", gzip.compress(bomb()))):
        (tmp_path / name).write_bytes(data)
    for name in ("p", "z", "o.npy", "o.npz"):
        with pytest.raises(ValueError, match="allow_pickle=True"):
            load(tmp_path / name)
    file = io.BytesIO(bomb())
    with pytest.raises(ValueError, match="allow_pickle=True"):
        load(file)
    assert file.tell() == 0
    assert trusting(tmp_path / "o.npy").tolist() == [None, 1]
    assert trusting(tmp_path / "o.npz")["o"].tolist() == [None, 1]


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
    with pytest.raises(TypeError):
        load(3.5)


@pytest.mark.parametrize("data", [b"", b"hello, world, this is text", b"\0" * 100, b"\x80"])
def test_garbage_names_the_file(tmp_path, data):
    (tmp_path / "rubbish.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"rubbish\.bin"):
        trusting(tmp_path / "rubbish.bin")


def whole_files() -> dict[str, bytes]:
    arrays = {"a": np.arange(3000.0), "b": np.arange(10)}
    files = {}
    for name, save in (
        ("npy", lambda f: np.save(f, arrays["a"])),
        ("npz", lambda f: np.savez(f, **arrays)),
        ("deflated", lambda f: np.savez_compressed(f, **arrays)),
        ("pickle4", lambda f: pickle.dump(arrays, f, 4)),
        ("pickle5", lambda f: pickle.dump(arrays, f, 5)),
        ("gzip", lambda f: f.write(gzip.compress(pickle.dumps(arrays)))),
    ):
        file = io.BytesIO()
        save(file)
        files[name] = file.getvalue()
    header = {"a": {"dtype": "F64", "shape": [3000], "data_offsets": [0, 24000]}}
    files["safetensors"] = safetensors_bytes(header, arrays["a"].tobytes())
    return files


@pytest.mark.parametrize("kind", whole_files())
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_files_name_the_file(tmp_path, kind, share):
    data = whole_files()[kind]
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: max(1, int(len(data) * share))])
    with pytest.raises(ValueError, match=r"cut\.bin"):
        trusting(path)


@pytest.mark.parametrize(
    "header",
    [
        "{",
        "[]",
        "{'descr': '<f8', 'fortran_order': False}",
        "{'descr': '<f8', 'fortran_order': 0, 'shape': (1,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': [1]}",
        "{'descr': 'what', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999,)}",
        "__import__('os').abort()",
    ],
)
def test_malformed_npy_headers(header):
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + bytes(8)
    with pytest.raises(ValueError, match="<BytesIO>"):
        load(io.BytesIO(data))
    with pytest.raises(ValueError, match=r"version 9\.9"):
        load(io.BytesIO(b"\x93NUMPY\x09\x09" + data[8:]))


def zipped(name: str, data: bytes) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file


def test_malformed_npz():
    good = io.BytesIO()
    np.save(good, np.arange(2000))
    flipped = bytearray(zipped("a.npy", good.getvalue()).getvalue())
    flipped[5000] ^= 1
    for file, message in (
        (io.BytesIO(flipped), "CRC"),
        (zipped("archive/data.pkl", b"x"), "PyTorch"),
        (zipped("readme.txt", b"x"), "readme.txt"),
        (zipped("a.npy", good.getvalue() + b"more"), "more data"),
        (zipped("a.npy", good.getvalue()[:-1]), "left"),
    ):
        file.seek(0)
        with pytest.raises(ValueError, match=message):
            load(file)


def test_one_copy_at_the_peak(tmp_path):
    joblib = pytest.importorskip("joblib")
    size = 48 << 20
    half = RNG.random((2, size // 16))
    np.save(tmp_path / "a.npy", half)
    np.save(tmp_path / "f.npy", half.T)
    np.savez(tmp_path / "a.npz", a=half)
    np.savez_compressed(tmp_path / "z.npz", a=half)
    for protocol in (3, 4, 5):
        (tmp_path / f"p{protocol}").write_bytes(pickle.dumps({"a": half, "b": 1}, protocol))
    joblib.dump(half, tmp_path / "j")
    joblib.dump(half, tmp_path / "jz", compress=("zlib", 1))
    header = {"a": {"dtype": "F64", "shape": list(half.shape), "data_offsets": [0, size]}}
    (tmp_path / "s").write_bytes(safetensors_bytes(header, half.tobytes()))

    def worker(folder):
        import re
        from pathlib import Path

        import pyksm

        def kb(name):
            return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

        paths = sorted(Path(folder).iterdir())
        for path in [*paths, *paths]:  # the first time loads modules
            Path("/proc/self/clear_refs").write_text("5")
            before = kb("VmRSS")
            loaded = pyksm.load(path, allow_pickle=True, missing_ok=True)
            say(path.name, kb("VmHWM") - before)  # noqa: F821
            del loaded
        say("end")  # noqa: F821

    with spawn(worker, str(tmp_path)) as child:
        said = [child.reply().split() for _ in range(20)]
    grown = {name: int(kb) / (size >> 10) for name, kb in said[10:]}
    assert len(grown) == 10
    assert all(share < 1.15 for share in grown.values()), grown
