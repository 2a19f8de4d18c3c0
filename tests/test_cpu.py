"""The native CPU kernels against the weight that ``format.dequantize`` gives, on every instruction set there is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from tests.shards import CPU
from tests.strategies import few, random_tensors, specs
from vllm_vptq import cpu, ops, reference
from vllm_vptq.build import BuildError
from vllm_vptq.format import LayerSpec, dequantize
from vllm_vptq.layouts import compact
from vllm_vptq.layouts.compact import CompactLayout
from vllm_vptq.parameters import cut_module

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [1, 2, 3, 7, 8, 17, 33, 300]
K = 552
"""Two blocks of columns and a part, and no multiple of eight in the last one's half."""
SPECS = {
    "v8": LayerSpec(K, 200, 8, 4096),
    "v6": LayerSpec(K, 200, 6, 256, 64, enable_norm=True),
    "v16": LayerSpec(K, 200, 16, 65536, 256, enable_norm=True, norm_dim=1),
    "v12": LayerSpec(K, 203, 12, 65536, 65536),
    "v3": LayerSpec(K, 205, 3, 32, 2, 2, 8, 5, 77, enable_perm=True, enable_norm=True),
}


@pytest.fixture(params=cpu.INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param):
        yield request.param


@contextmanager
def forced(name: str) -> Iterator[None]:
    """The kernels of one instruction set; skips the test where the processor does not have it."""
    cpu.instruction_set.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(cpu.INSTRUCTION_SET, raising=False)
        if cpu.INSTRUCTION_SETS.index(name) > cpu.instruction_set():
            pytest.skip(f"no {name} here")
        patch.setenv(cpu.INSTRUCTION_SET, name)
        cpu.instruction_set.cache_clear()
        yield
    cpu.instruction_set.cache_clear()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


class Layer:
    """A layer of one module, and its weight in float64."""

    def __init__(self, spec: LayerSpec, dtype: torch.dtype, seed: int = 0, rows: tuple[int, int] | None = None) -> None:
        tensors = random_tensors(spec, seed, dtype)
        out, columns = spec.shape
        rows = rows or (0, out)
        self.layout: CompactLayout = compact.build([cut_module(tensors, spec, rows, (0, columns))], dtype, CPU)
        self.weight = dequantize(tensors, spec, torch.float64)[slice(*rows)]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return cpu.linear(x, *self.layout.tensors().values(), bias, self.layout.plan)

    def reference(self, x: Tensor) -> Tensor:
        return reference.linear(x, *self.layout.tensors().values(), None, self.layout.plan)


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def check(layer: Layer, x: Tensor, y: Tensor) -> None:
    """Within the errors of float32 sums, and of the rounding to y's dtype."""
    exact = x.double() @ layer.weight.T
    # |x| @ |W|: what rounding errors are measured by; 10, because norm's two terms may cancel.
    bound = (x.double().abs() @ (layer.weight.abs().T + 10)) * torch.finfo(torch.float32).eps * 10
    bound += exact.abs() * torch.finfo(y.dtype).eps
    assert bool(((y - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@few(60)
@given(spec=specs(), seed=st.integers(0, 2**32), count=st.sampled_from(TOKENS), data=st.data())
def test_any_spec(dtype, spec, seed, count, data):
    first = data.draw(st.integers(0, spec.shape[0] - 1), "first row")
    layer = Layer(spec, dtype, seed, (first, data.draw(st.integers(first + 1, spec.shape[0]), "end row")))
    x = tokens(count, spec.shape[1], dtype=dtype)
    for name in cpu.INSTRUCTION_SETS[: cpu.instruction_set() + 1]:
        with forced(name):
            check(layer, x, layer(x))


@pytest.mark.parametrize("bits", range(1, 33))
def test_every_width_of_a_merged_index(isa, bits):
    main, residual = (bits + 1) // 2, bits // 2
    spec = LayerSpec(301, 24, 8, 1 << main, 1 << residual if residual else 0)
    layer = Layer(spec, torch.float16)
    for count in (1, 5):
        x = tokens(count, 301, dtype=torch.float16)
        check(layer, x, layer(x))


@pytest.mark.parametrize("vector_len", range(2, 17))
@pytest.mark.parametrize("residuals", [0, 16])
def test_every_vector_length(isa, vector_len, residuals):
    layer = Layer(LayerSpec(300, 5 * vector_len + 1, vector_len, 64, residuals), torch.bfloat16)
    for count in (1, 2, 3, 4, 5, 30):
        x = tokens(count, 300, dtype=torch.bfloat16)
        check(layer, x, layer(x))


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_as_exact_as_the_dense_product(name, dtype, count, isa):
    """The measure is torch's product of the same weight in the same dtype; the slack is for the order of sums."""
    layer, x = Layer(SPECS[name], dtype), tokens(count, K, dtype=dtype)
    exact = x.double() @ layer.weight.T
    theirs = dense_linear(x, layer.weight.to(dtype))
    slack = 4 if dtype == torch.float32 else 1.05
    assert rms(layer(x) - exact) <= slack * rms(theirs - exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_a_token_does_not_depend_on_those_beside_it(name, dtype, isa):
    layer, x = Layer(SPECS[name], dtype), tokens(300, K, dtype=dtype)
    alone = torch.cat([layer(row[None]) for row in x[:40]])
    for count in (2, 3, 4, 5, 17, 40, 300):
        assert torch.equal(layer(x[:count])[:40], alone[:count])


def test_as_many_tokens_as_there_may_be(isa):
    layer, x = Layer(LayerSpec(40, 24, 8, 2, 65536), torch.bfloat16), tokens(65536, 40, dtype=torch.bfloat16)
    y = layer(x)
    check(layer, x, y)
    assert torch.equal(y[-3:], layer(x[-3:]))


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("name", SPECS)
def test_threads_do_not_change_a_bit(name, count, isa):
    layer, x = Layer(replace(SPECS[name], out_features=3000), torch.bfloat16), tokens(count, K, dtype=torch.bfloat16)
    with threads(1):
        one = layer(x)
    for several in (2, 3, 8):
        with threads(several):
            assert torch.equal(layer(x), one)


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("name", SPECS)
def test_instruction_sets_agree(name, count, isa):
    layer, x = Layer(SPECS[name], torch.float32), tokens(count, K)
    torch.testing.assert_close(layer(x), layer.reference(x), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("name", SPECS)
def test_every_output_is_written(name, count, isa, monkeypatch):
    layer, x = Layer(SPECS[name], torch.float32), tokens(count, K)
    # The quantizer, in other tests of this process, turns it off.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        assert bool(x.new_empty(3).isnan().all())
        y = layer(x)
    finally:
        torch.use_deterministic_algorithms(False)
    check(layer, x, y)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, x_dtype, bias_dtype):
    layer, x = Layer(SPECS["v6"], dtype), tokens(5, K, dtype=x_dtype)
    bias = tokens(400, dtype=bias_dtype)[::2]
    y = layer(x, bias)
    assert y.dtype == x_dtype
    exact = x.double() @ layer.weight.T + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(x_dtype).eps, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 6e-8, 1e-40, 65520, -0.0])
def test_special_values_of_x(isa, dtype, value):
    """Infinities, overflow, subnormals: as in the torch implementation."""
    layer, x = Layer(SPECS["v8"], dtype), torch.zeros(2, K, dtype=dtype)
    x[1, 7] = value
    torch.testing.assert_close(layer(x), layer.reference(x), equal_nan=True)


def test_dtypes_the_kernels_do_not_know_go_to_torch(monkeypatch):
    layer = Layer(SPECS["v6"], torch.float32)
    monkeypatch.setattr(cpu, "linear", None)
    x = tokens(2, K, dtype=torch.float64)
    y = ops.linear(x, *layer.layout.tensors().values(), None, layer.layout.plan)
    torch.testing.assert_close(y, x @ layer.weight.T)


def test_without_a_compiler_torch_takes_over_and_says_so_once(monkeypatch, caplog):
    def no_compiler(name: str) -> None:
        raise BuildError("no C++ compiler found; install one")

    layer, x = Layer(SPECS["v8"], torch.float32), tokens(2, K)
    monkeypatch.setattr(cpu, "cpu_library", no_compiler)
    monkeypatch.setattr(cpu.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caches = (cpu.available, cpu._library)
    for cached in caches:
        cached.cache_clear()
    try:
        for _ in range(2):
            y = ops.linear(x, *layer.layout.tensors().values(), None, layer.layout.plan)
    finally:
        for cached in caches:
            cached.cache_clear()
    assert torch.equal(y, layer.reference(x))
    assert [record.getMessage().endswith("install one") for record in caplog.records] == [True]


@pytest.mark.parametrize("asked", ["avx1024", "AVX2 "])
def test_an_instruction_set_nobody_knows_is_refused(asked, monkeypatch):
    monkeypatch.setenv(cpu.INSTRUCTION_SET, asked)
    cpu.instruction_set.cache_clear()
    with pytest.raises(RuntimeError, match=f"{cpu.INSTRUCTION_SET}={asked}, expected portable"):
        cpu.instruction_set()
    cpu.instruction_set.cache_clear()
