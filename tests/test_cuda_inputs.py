"""A call's inputs in memory that stays (phi3c/cuda/inputs.py), here on the CPU."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

import phi3c
from phi3c.cuda import inputs
from phi3c.cuda.inputs import Inputs
from phi3c.cuda.tensor_at import tensor_at

SHAPES = st.one_of(
    st.lists(st.integers(0, 40), min_size=1, max_size=2), st.just([]), st.just([3000])
)


@given(
    calls=st.lists(
        st.dictionaries(st.sampled_from("abc"), st.tuples(SHAPES, st.sampled_from(["i4", "f2"]))),
        max_size=8,
    )
)
def test_values_arrive(calls):
    there = Inputs(tvm.cpu())
    for i, call in enumerate(calls + calls):
        arrays = {
            name: (np.arange(np.prod(shape)) % 100 + i).reshape(shape).astype(dtype)
            for name, (shape, dtype) in call.items()
        }
        tensors = there.tensors(arrays)
        assert list(tensors) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(tensors[name].numpy(), array)
            assert tensors[name].data_ptr() % 64 == 0 or not array.size


def test_a_shape_that_comes_again_is_where_it_was():
    """CUDA graphs read there; also after so many other shapes that its description went."""
    there = Inputs(tvm.cpu())
    there.tensors({"x": np.zeros(10_000, np.int32)})
    first = there.tensors({"x": np.ones(5, np.int32)})["x"]
    address = first.data_ptr()
    for n in range(6, 6 + 2 * inputs._MOST_LAYOUTS):
        there.tensors({"x": np.zeros(n, np.int32)})
        assert len(there._layouts) <= inputs._MOST_LAYOUTS
    again = there.tensors({"x": np.full(5, 7, np.int32)})["x"]
    assert again.data_ptr() == address
    np.testing.assert_array_equal(first.numpy(), np.full(5, 7))


def test_a_compiled_function_takes_them(tmp_path):
    """It refuses a view at an offset."""
    made = phi3c.compile("configs/tiny.json", "cpu", "q0f32", tmp_path / "model")
    embed, model = phi3c.load(made.path)._functions["embed"], phi3c.load(made.path)
    base = tvm.runtime.empty((256,), "uint8")
    base.copyfrom(np.arange(64, dtype=np.int32).view(np.uint8))
    ids = tensor_at(base, 128, (3,), "int32")
    with pytest.raises(ValueError, match="byte_offset"):
        embed(base._create_view((3,), "int32", 128), *model._lasting("embed", None))
    del base
    gc.collect()
    found = embed(ids, *model._lasting("embed", None))
    np.testing.assert_array_equal(found.numpy(), model.embed([32, 33, 34]).numpy())
