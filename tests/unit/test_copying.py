"""copy(): equal, independent, page-aligned, and all that pickle keeps. Needs no KSM."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import spawn

import pyksm
from pyksm.arrays import buffer_of

PAGE = 4096
copy = partial(pyksm.copy, missing_ok=True)


def aligned(array: np.ndarray) -> bool:
    return buffer_of(array) is not None and array.ctypes.data % PAGE == 0


def sample_arrays() -> dict[str, np.ndarray]:
    grid = np.arange(60_000.0).reshape(200, 300)
    return {
        "c": grid,
        "f": np.asfortranarray(grid),
        "gaps": grid[::2, ::3],
        "backwards": grid[::-1, ::-1],
        "turned": grid.reshape(20, 50, 60).transpose(1, 2, 0),
        "structured": np.zeros(3000, [("a", "i1"), ("b", "f8")]),
        "dates": np.arange(5000).astype("M8[s]"),
        "swapped": np.arange(5000, dtype=">f8"),
        "text": np.array(["a", "bc"] * 2000),
        "broadcast": np.broadcast_to(np.arange(100), (50, 100)),
    }


@pytest.mark.parametrize("name", sample_arrays())
@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: [a]], ids=["bare", "inside"])
def test_arrays_come_back_equal_aligned_and_laid_out_as_numpy_would(name, wrap):
    source = sample_arrays()[name]
    copied = copy(wrap(source))
    copied = copied[0] if isinstance(copied, list) else copied
    np.testing.assert_array_equal(copied, source)
    assert copied.dtype == source.dtype
    assert copied.strides == source.copy(order="K").strides
    assert copied.flags.writeable == source.flags.writeable
    assert aligned(copied)
    assert not np.shares_memory(copied, source)


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: {"k": a}], ids=["bare", "inside"])
def test_readonly_stays_readonly(wrap):
    source = np.arange(2000.0)
    source.flags.writeable = False
    copied = copy(wrap(source))
    copied = copied["k"] if isinstance(copied, dict) else copied
    assert not copied.flags.writeable
    assert aligned(copied)


class Tagged(np.ndarray):
    def __array_finalize__(self, obj):
        self.tag = getattr(obj, "tag", None)


@pytest.mark.parametrize("size", [3, 5000])
def test_subclasses_keep_their_class_and_attributes(size):
    source = np.arange(float(size)).view(Tagged)
    source.tag = {"inner": np.arange(float(size))}
    copied = copy(source)
    assert type(copied) is Tagged
    np.testing.assert_array_equal(copied, source)
    np.testing.assert_array_equal(copied.tag["inner"], source.tag["inner"])
    assert copied.tag["inner"] is not source.tag["inner"]
    if size > 1000:
        assert aligned(copied)
        assert aligned(copied.tag["inner"])


def test_an_array_that_refers_to_itself():
    source = np.arange(5000.0).view(Tagged)
    source.tag = [source]
    copied = copy(source)
    assert copied.tag[0] is copied


def test_masked_arrays_and_records():
    masked = np.ma.masked_greater(np.arange(5000.0), 10)
    copied = copy(masked)
    np.testing.assert_array_equal(copied.mask, masked.mask)
    np.testing.assert_array_equal(copied.data, masked.data)
    assert aligned(copied.data)
    assert copy(np.ma.array(np.arange(5000.0))).mask is np.ma.nomask
    records = np.rec.fromarrays([np.arange(2000), np.arange(2000.0)], names="a,b")
    copied = copy(records)
    assert type(copied) is np.recarray
    np.testing.assert_array_equal(copied.b, records.b)


def test_a_memmap_becomes_an_array(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5000.0))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    for copied in (copy(mapped), copy([mapped])[0]):
        assert type(copied) is np.ndarray
        np.testing.assert_array_equal(copied, mapped)
        assert aligned(copied)


def test_shared_references_stay_shared_and_cycles_are_kept():
    array = np.arange(5000.0)
    source = {"a": array, "b": array, "list": [array.T]}
    source["self"] = source
    copied = copy(source)
    assert copied["a"] is copied["b"]
    assert copied["self"] is copied


def test_object_arrays_stay_and_their_contents_move():
    source = np.empty(1000, object)
    source[0] = np.arange(5000.0)
    source[1] = "text"
    copied = copy(source)
    assert copied.dtype == object
    assert aligned(copied[0])
    assert copied[1] == "text"


def test_small_arrays_need_no_memory_of_ours():
    assert buffer_of(copy([np.arange(3)])[0]) is None
    assert copy(np.zeros((0, 3))).shape == (0, 3)


def test_bytes_and_text_come_back_equal():
    source = {"b": b"x" * 300_000, "ba": bytearray(b"y" * 300_000), "s": "z" * 300_000}
    copied = copy(source)
    assert copied == source
    copied["ba"][0] = 0
    assert source["ba"][0] == ord("y")


@given(st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=9000)
    | st.binary(max_size=9000).map(bytearray),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
))  # fmt: skip
def test_any_plain_object_comes_back_equal(source):
    assert copy(source) == source


def test_many_arrays_share_mappings_but_not_pages():
    source = [np.full(700, float(n)) for n in range(300)]
    copied = copy(source)
    assert all(aligned(array) for array in copied)
    owners = {id(buffer_of(array)) for array in copied}
    assert len(owners) <= 3
    for before, after in zip(source, copied, strict=True):
        np.testing.assert_array_equal(before, after)
        page = np.frombuffer(buffer_of(after), "u1")
        end = after.ctypes.data - page.ctypes.data + after.nbytes
        assert not page[end : -(-end // PAGE) * PAGE].any()


@pytest.mark.parametrize(
    "thing", [lambda: 0, threading.Lock(), {"deep": [threading.Lock()]}, (n for n in "a")]
)
def test_what_cannot_be_pickled_is_named(thing):
    with pytest.raises(TypeError, match=f"this {type(thing).__name__}.*lambda|lock|generator"):
        copy(thing)


def test_data_frames():
    pd = pytest.importorskip("pandas")
    source = pd.DataFrame(
        {"x": np.arange(9000.0), "y": np.arange(9000.0), "n": range(9000), "s": ["t"] * 9000}
    )
    source["when"] = pd.date_range("2020", periods=9000, freq="h")
    copied = copy(source)
    pd.testing.assert_frame_equal(copied, source)
    assert aligned(copied["x"].to_numpy())
    assert aligned(copied["n"].to_numpy())
    copied.loc[0, "x"] = -1
    assert source.loc[0, "x"] == 0
    pd.testing.assert_frame_equal(copy(source[::3]), source[::3])


def test_fitted_estimators():
    pytest.importorskip("sklearn")
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    data = rng.random((2000, 20))
    labels = (data[:, 0] > 0.5).astype(int)
    nearest = KNeighborsClassifier(algorithm="brute").fit(data, labels)
    copied = copy(nearest)
    np.testing.assert_array_equal(copied.predict(data[:50]), nearest.predict(data[:50]))
    assert aligned(copied._fit_X)
    forest = RandomForestClassifier(3, random_state=0).fit(data, labels)
    copied = copy(forest)
    np.testing.assert_array_equal(copied.predict(data), forest.predict(data))
    # What the docstring says of trees: they fill memory of their own.
    assert buffer_of(copied.estimators_[0].tree_.value) is None


def test_no_more_than_object_and_copy_at_the_peak():
    def worker():
        import re
        from pathlib import Path

        import numpy as np

        import pyksm
        import pyksm.copying

        def kb(name):
            return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

        big = np.ones((64 << 20) // 8).reshape(-1, 1024)
        for source in ([big], [big.T], [big[::2]], {"b": b"x" * (64 << 20)}, big):
            pyksm.copy([np.arange(1000)], missing_ok=True)
            Path("/proc/self/clear_refs").write_text("5")
            before = kb("VmRSS")
            copied = pyksm.copy(source, missing_ok=True)
            say(kb("VmHWM") - before)  # noqa: F821
            del copied
        say("end")  # noqa: F821

    with spawn(worker) as child:
        grown = [int(child.reply()) for _ in range(5)]
    assert max(grown) < 64 * 1024 * 1.1, grown
