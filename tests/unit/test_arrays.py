"""The numpy constructors answer as numpy's do, in memory of ours. Needs no KSM (missing_ok)."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyksm
from pyksm import arrays
from pyksm.arrays import buffer_of

DTYPES = ["f8", "f4", ">i4", "?", "c16", "U5", "S3", "M8[s]", [("a", "i1"), ("b", "f8", (2,))],
          ("f4", (3,)), "U"]  # fmt: skip
SHAPES = [(), 1, 7, (3,), (0,), (2, 0, 3), (3, 4, 5), [4, 4], np.int64(3), np.array([2, 3])]


def ours(array: np.ndarray) -> bool:
    return array.size * array.itemsize == 0 or (
        buffer_of(array) is not None and buffer_of(array).address == array.ctypes.data
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["empty", "zeros", "ones"])
def test_constructors_agree_with_numpy(name, shape, dtype, order):
    if name == "ones" and np.dtype(dtype).kind in "MV" and np.dtype(dtype).subdtype is None:
        dtype = "i2"
    expected = getattr(np, name)(shape, dtype, order)
    made = getattr(pyksm, name)(shape, dtype, order, missing_ok=True)
    assert (made.shape, made.dtype, made.strides) == (
        expected.shape, expected.dtype, expected.strides)  # fmt: skip
    assert type(made) is np.ndarray
    assert made.flags.writeable
    assert ours(made)
    if name != "empty":
        np.testing.assert_array_equal(made, expected)


def test_the_default_dtype_is_float():
    assert pyksm.empty(3, missing_ok=True).dtype == pyksm.zeros(3, missing_ok=True).dtype == float
    assert pyksm.full(3, 1, missing_ok=True).dtype == np.full(3, 1).dtype
    assert pyksm.full(2, [1.5, 2], missing_ok=True).tolist() == [1.5, 2]


@pytest.mark.parametrize("dtype", [object, [("a", "i4"), ("b", "O")], np.dtypes.StringDType()])
def test_python_objects_are_refused(dtype):
    for make in (
        lambda: pyksm.empty(3, dtype),
        lambda: pyksm.array([1, 2], dtype),
        lambda: pyksm.zeros_like([1], dtype),
        lambda: pyksm.full(3, 1, dtype),
    ):
        with pytest.raises(TypeError, match="Python objects"):
            make()
    with pytest.raises(TypeError, match="Python objects"):
        pyksm.array([None])


@pytest.mark.parametrize("shape", [1.0, (1, 2.0), "3", None, True, (True, 2), {"a": 1}])
def test_bad_shapes_are_type_errors(shape):
    with pytest.raises(TypeError):
        pyksm.empty(shape, missing_ok=True)


@pytest.mark.parametrize("shape", [-1, (2, -3), (1 << 40, 1 << 40), 1 << 64])
def test_impossible_shapes_are_value_errors(shape):
    with pytest.raises(ValueError, match=r"negative|address space"):
        pyksm.empty(shape, missing_ok=True)


@pytest.mark.parametrize("order", ["K", "X", ""])
def test_bad_orders_are_value_errors(order):
    with pytest.raises(ValueError, match="order"):
        pyksm.empty(3, order=order, missing_ok=True)
    if order != "K":
        with pytest.raises(ValueError, match="order"):
            pyksm.empty_like([3], order=order, missing_ok=True)


@st.composite
def layouts(draw) -> np.ndarray:
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    array = np.arange(np.prod(shape, dtype=int), dtype="i4").reshape(shape)
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    steps = st.sampled_from([slice(None), slice(None, None, -1), slice(None, None, 2)])
    array = array[tuple(draw(steps) for _ in range(array.ndim))]
    return np.broadcast_to(array, (draw(st.integers(1, 2)), *array.shape))


@given(layouts(), st.sampled_from("CFAK"))
def test_like_lays_axes_as_numpy_does(source, order):
    expected = np.empty_like(source, order=order)
    made = pyksm.empty_like(source, order=order, missing_ok=True)
    assert (made.shape, made.strides) == (expected.shape, expected.strides)
    copied = pyksm.array(source, order=order, missing_ok=True)
    assert copied.strides == np.array(source, order=order).strides
    np.testing.assert_array_equal(copied, source)


def test_like_takes_dtype_and_shape():
    source = np.asfortranarray(np.ones((3, 4)))
    for how in ({"dtype": "i2"}, {"shape": (5, 6)}, {"shape": 7}, {"dtype": "U"}):
        expected = np.zeros_like(source, **how)
        made = pyksm.zeros_like(source, **how, missing_ok=True)
        assert (made.shape, made.dtype, made.strides) == (
            expected.shape, expected.dtype, expected.strides)  # fmt: skip
    np.testing.assert_array_equal(pyksm.full_like(source, 3, missing_ok=True), np.full((3, 4), 3.0))
    np.testing.assert_array_equal(pyksm.ones_like(source, missing_ok=True), np.ones((3, 4)))


class Tagged(np.ndarray):
    def __array_finalize__(self, obj):
        self.tag = getattr(obj, "tag", "none")


def test_subclasses_are_kept_where_numpy_keeps_them():
    source = np.arange(5.0).view(Tagged)
    source.tag = "mine"
    like = pyksm.empty_like(source, missing_ok=True)
    assert (type(like), like.tag) == (Tagged, "mine")
    assert type(pyksm.empty_like(source, subok=False, missing_ok=True)) is np.ndarray
    assert type(pyksm.array(source, missing_ok=True)) is np.ndarray
    kept = pyksm.array(source, subok=True, missing_ok=True)
    assert (type(kept), kept.tag) == (Tagged, "mine")
    assert ours(kept)
    masked = np.ma.masked_greater(np.arange(6), 3)
    again = pyksm.array(masked, subok=True, missing_ok=True)
    np.testing.assert_array_equal(again.mask, masked.mask)
    again.mask[0] = True
    assert not masked.mask[0]


@pytest.mark.parametrize(
    ("thing", "how"),
    [
        ([[1, 2], [3, 4]], {}),
        (range(5), {"dtype": "f4"}),
        (3, {}),
        (["a", "bcd"], {}),
        (["a", "bcd"], {"dtype": "U2"}),
        (np.arange(3), {"dtype": "U"}),
        (np.arange(6).reshape(2, 3), {"ndmin": 4}),
        ([1], {"ndmin": 2}),
        (memoryview(b"abc"), {}),
        (np.arange(6.0).reshape(2, 3), {"dtype": "i4", "order": "F"}),
    ],
)
def test_array_takes_what_numpy_takes(thing, how):
    expected = np.array(thing, **how)
    made = pyksm.array(thing, **how, missing_ok=True)
    np.testing.assert_array_equal(made, expected)
    assert (made.dtype, made.strides) == (expected.dtype, expected.strides)
    assert ours(made)


def test_array_always_copies_and_is_writable():
    source = np.arange(10)
    source.flags.writeable = False
    made = pyksm.array(source, missing_ok=True)
    made[0] = 5
    assert source[0] == 0


def test_views_keep_the_memory_and_the_last_one_frees_it():
    made = pyksm.ones(10_000, missing_ok=True)
    gone = weakref.ref(buffer_of(made))
    view = made[100:200].reshape(10, 10).T
    del made
    gc.collect()
    assert gone() is not None
    assert view.sum() == 100
    del view
    assert gone() is None


def test_an_array_holds_an_export_so_its_memory_cannot_be_closed():
    made = pyksm.ones(10, missing_ok=True)
    with pytest.raises(BufferError):
        buffer_of(made).close()
    with pytest.raises(ValueError, match="own its data"):
        made.resize(20)


def test_buffer_of_knows_only_ours():
    assert buffer_of(np.ones(3)) is None
    assert buffer_of(b"abc") is None
    arrays.keep_small(np.ones(3))


def test_importing_pyksm_loads_no_numpy():
    code = "import pyksm, pyksm.arrays, sys; pyksm.Buffer; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_small_arrays_of_a_packer_share_a_mapping_and_no_page():
    packer = arrays.Packer(missing_ok=True)
    made = [packer.empty((n,), np.dtype("u1")) for n in (5000, 60_000, 4096)]
    assert len({id(buffer_of(array)) for array in made}) == 1
    addresses = sorted((a.ctypes.data, a.nbytes) for a in made)
    assert all(a % 4096 == 0 for a, _ in addresses)
    for (first, nbytes), (second, _) in itertools.pairwise(addresses):
        assert -(-(first + nbytes) // 4096) * 4096 <= second
    assert buffer_of(packer.empty((65536,), np.dtype("u1"))).nbytes == 65536
    many = [packer.room(60_000) for _ in range(40)]
    assert len({m.obj.address for m in many}) == 3
