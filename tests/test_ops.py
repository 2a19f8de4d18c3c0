"""``ops.linear`` against the dense product in float64, and the plan and layout it reads."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from tests.shards import CPU
from tests.strategies import few, random_tensors, specs
from vllm_vptq import ops
from vllm_vptq.format import LayerSpec, dequantize
from vllm_vptq.layouts import compact
from vllm_vptq.layouts.compact import CompactLayout
from vllm_vptq.layouts.plan import ABSENT, ModulePlan, SegmentPlan, decode, encode
from vllm_vptq.parameters import ModuleShard, cut_module

K = 96
PLAIN = LayerSpec(K, 40, 8, 256, 256)
GROUPS = LayerSpec(K, 33, 6, 64, group_num=2, enable_perm=True)
OUTLIERS = LayerSpec(K, 50, 12, 16, 128, 3, 6, 4, 5, enable_norm=True, norm_dim=1, enable_perm=True)
COLUMN_NORM = LayerSpec(K, 37, 16, 32, 4, enable_norm=True, enable_perm=True, is_indice_packed=False)
LAYERS = {
    "plain": [PLAIN],
    "dense": [None],
    "row norm": [OUTLIERS],
    "column norm": [COLUMN_NORM],
    "fused": [PLAIN, GROUPS, None, OUTLIERS, COLUMN_NORM],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOKENS = [0, 1, 2, 17, 300]


class Layer:
    """A layer of the given modules (None is a dense one of 29 rows), its dense weight and bias in float64."""

    def __init__(self, modules: list[LayerSpec | None], dtype: torch.dtype, seed: int = 0, bias: bool = True) -> None:
        gen = torch.Generator().manual_seed(seed)
        shards, weights = [], []
        book_dtype = torch.float32 if dtype == torch.float64 else dtype
        for i, spec in enumerate(modules):
            if spec is None:
                dense = torch.randn(29, K, generator=gen).to(dtype)
                shards.append(ModuleShard(29, K, dense=dense))
                weights.append(dense.double())
            else:
                out, cols = spec.shape
                tensors = random_tensors(spec, seed + i, book_dtype)
                shards.append(cut_module(tensors, spec, (0, out), (0, cols)))
                weights.append(dequantize(tensors, spec, torch.float64))
        self.weight = torch.cat(weights)
        self.bias = torch.randn(len(self.weight), generator=gen).to(dtype) if bias else None
        self.layout: CompactLayout = compact.build(shards, dtype, CPU)

    def arguments(self, x: Tensor) -> tuple:
        return (x, *self.layout.tensors().values(), self.bias, self.layout.plan)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(*self.arguments(x))

    def exact(self, x: Tensor) -> Tensor:
        return dense_linear(x.double(), self.weight, None if self.bias is None else self.bias.double())


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item() if error.numel() else 0.0


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("modules", LAYERS)
def test_as_exact_as_the_dense_product(modules, dtype, count):
    """The measure is torch's product of the same weight in the same dtype; the slack is for the order of sums."""
    layer, x = Layer(LAYERS[modules], dtype), tokens(count, K, dtype=dtype)
    y, exact = layer(x), layer.exact(x)
    assert y.dtype == dtype
    assert y.shape == exact.shape
    if dtype == torch.float64:
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
        return
    theirs = dense_linear(x, layer.weight.to(dtype), layer.bias)
    slack = 4 if dtype == torch.float32 else 1.05  # up to 2.8 was seen, with another BLAS than ours
    assert rms(y - exact) <= slack * rms(theirs - exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@few(50)
@given(spec=specs(), seed=st.integers(0, 2**32), count=st.integers(1, 5))
def test_any_spec(dtype, spec, seed, count):
    tensors = random_tensors(spec, seed)
    out, cols = spec.shape
    layout = compact.build([cut_module(tensors, spec, (0, out), (0, cols))], dtype, CPU)
    x = tokens(count, cols, dtype=dtype)
    y = ops.linear(x, *layout.tensors().values(), None, layout.plan)
    weight = dequantize(tensors, spec, torch.float64)
    # |x| @ |W|: what rounding errors are measured by
    bound = (x.double().abs() @ (weight.abs().T + 10)) * torch.finfo(dtype).eps * 10
    assert bool(((y - x.double() @ weight.T).abs() <= bound).all())


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (1, 1, 5, K), (0, K), (2, 0, K)], ids=str)
def test_leading_dimensions(shape):
    layer, x = Layer(LAYERS["fused"], torch.float32), tokens(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], len(layer.weight))
    torch.testing.assert_close(y.double(), layer.exact(x), rtol=1e-4, atol=1e-4)


def test_strided_input():
    layer, wide = Layer(LAYERS["fused"], torch.float32), tokens(2 * K, 14)
    for x in (wide.T[:, ::2], wide.T[::3, :K], tokens(1, K).expand(4, K)):
        torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # native, in torch
@pytest.mark.parametrize("width", [0, K - 8, K + 8])
def test_x_of_another_width_is_refused(width, dtype):
    layer = Layer([GROUPS], dtype)
    with pytest.raises(RuntimeError, match=rf"expected {K} input features, got x of shape \[3, {width}\]"):
        layer(tokens(3, width, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(32,), (1,), (1, 33), (34,)])
def test_a_bias_of_another_shape_is_refused(shape, dtype):
    layer = Layer([GROUPS], dtype)
    layer.bias = torch.zeros(shape, dtype=dtype)
    with pytest.raises(RuntimeError, match="expected a bias of 33 numbers"):
        layer(tokens(3, K, dtype=dtype))


def test_without_bias():
    layer, x = Layer(LAYERS["fused"], torch.float32, bias=False), tokens(3, K)
    torch.testing.assert_close(layer(x).double(), layer.exact(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_in_another_dtype_than_the_layer(dtype):
    layer, x = Layer(LAYERS["fused"], torch.bfloat16), tokens(3, K, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    torch.testing.assert_close(y.double(), layer.exact(x), rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("rows", [(0, 1500), (7, 1493)])
def test_more_weights_than_are_decoded_at_a_time(rows):
    spec = LayerSpec(1024, 1500, 12, 256, 16, enable_norm=True)
    tensors = random_tensors(spec, seed=1)
    layout = compact.build([cut_module(tensors, spec, rows, (0, 1024))], torch.float64, CPU)
    x = tokens(3, 1024, dtype=torch.float32)
    y = ops.linear(x, *layout.tensors().values(), None, layout.plan)
    exact = x.double() @ dequantize(tensors, spec, torch.float64)[slice(*rows)].T
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("count", [1, 17])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_deterministic_and_leaves_its_inputs_alone(dtype, count):
    layer, x = Layer(LAYERS["fused"], dtype), tokens(count, K, dtype=dtype)
    given_tensors = [t for t in layer.arguments(x) if isinstance(t, Tensor)]
    before = [t.clone() for t in given_tensors]
    first = layer(x)
    second = layer(x)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert all(torch.equal(t, b) for t, b in zip(given_tensors, before, strict=True))


@pytest.mark.parametrize("count", [1, 17])
@pytest.mark.parametrize("modules", ["plain", "fused"])
def test_opcheck(modules, count):
    layer, x = Layer(LAYERS[modules], torch.bfloat16), tokens(count, K, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.vllm_vptq.linear.default, layer.arguments(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_once_for_every_token_count(backend):
    layer = Layer(LAYERS["fused"], torch.float32)
    traced = []

    def block(x: Tensor) -> Tensor:
        traced.append(x.shape)
        return torch.relu(layer(x * 2)) + 1

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for count in (5, 2, 17, 300):
        x = tokens(count, K)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), torch.relu(layer(x * 2)) + 1, rtol=1e-5, atol=1e-5)
    assert len(traced) <= 1 or {len(shape) for shape in traced} == {2}


def test_two_layers_through_one_compiled_function():
    """The second layer's plan has other numbers, which dynamo may then want to make symbolic."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, tensors, bias, plan: ops.linear(x, *tensors, bias, plan), fullgraph=True, backend="aot_eager"
    )
    for modules in ([PLAIN], [COLUMN_NORM], [GROUPS], [OUTLIERS]):
        layer, x = Layer(modules, torch.float32), tokens(4, K)
        y = compiled(x, list(layer.layout.tensors().values()), layer.bias, layer.layout.plan)
        assert torch.equal(y, layer(x))


# ---------------------------------------------------------------------------------------------------------------
# Plan and layout

NUMBERS = st.integers(-1, 2**40)
SEGMENTS = st.builds(SegmentPlan, **{f.name: NUMBERS for f in fields(SegmentPlan)})
MODULES = st.builds(
    ModulePlan,
    **{f.name: NUMBERS for f in fields(ModulePlan) if f.name != "segments"},
    segments=st.lists(SEGMENTS, max_size=3).map(tuple),
)


@few(100)
@given(modules=st.lists(MODULES, max_size=4))
def test_a_plan_survives_its_encoding(modules):
    plan = encode(modules)
    assert all(type(number) is int for number in plan)
    assert decode(plan) == tuple(modules)
    assert decode(tuple(plan)) == decode(plan)
    assert encode(decode(plan)) == plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@few(20)
@given(modules=st.lists(st.sampled_from([PLAIN, GROUPS, None, OUTLIERS, COLUMN_NORM]), min_size=1, max_size=4))
def test_pieces_of_a_layout_are_aligned_and_inside(dtype, modules):
    layout = Layer(modules, dtype).layout
    for module in decode(layout.plan):
        for tensor, offset in ((layout.norm, module.norm_offset), (layout.dense, module.dense_offset)):
            assert offset == ABSENT or (offset * tensor.itemsize % 16 == 0 and 0 <= offset < tensor.numel())
        for s in module.segments:
            assert s.word_offset * 4 % 16 == 0
            assert s.word_offset + s.vector_rows * s.row_words <= layout.qweight.numel()
            for offset in {s.book_offset, s.res_book_offset} - {ABSENT}:
                assert offset * layout.codebooks.itemsize % 16 == 0
                assert offset < layout.codebooks.numel()
            assert (s.res_book_offset == ABSENT) == (s.res_bits == 0)
            if s.column_offset != ABSENT:
                assert s.column_offset * 4 % 16 == 0
                assert s.column_offset + s.num_columns <= layout.columns.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_a_layout(dtype):
    layout = Layer(LAYERS["fused"], dtype).layout
    dtypes = {name: tensor.dtype for name, tensor in layout.tensors().items()}
    assert dtypes == {
        "qweight": torch.int32,
        "codebooks": dtype,
        "norm": torch.float32,
        "columns": torch.int32,
        "dense": dtype,
    }
    assert all(tensor.ndim == 1 and tensor.is_contiguous() for tensor in layout.tensors().values())


def test_a_layout_has_no_tensors_it_does_not_need():
    plain = Layer([PLAIN], torch.float16).layout
    assert plain.norm is plain.columns is plain.dense is None
    dense = Layer([None], torch.float16).layout
    assert (dense.qweight.numel(), dense.codebooks.numel()) == (0, 0)


def test_equal_layers_have_equal_plans():
    assert Layer(LAYERS["fused"], torch.float16, seed=1).layout.plan == (
        Layer(LAYERS["fused"], torch.float16, seed=2).layout.plan
    )
