"""The CUDA kernels, in every layout, against float64. Skipped without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.shards import fused_layer
from tests.strategies import PUBLIC_FORMATS, spec_extras
from tests.test_conditioned import between_0_and_1
from vllm_vptq import gpu
from vllm_vptq.format import LayerSpec, dequantize, parse_format
from vllm_vptq.layouts import choice, compact, stationary, streams
from vllm_vptq.layouts.passes import SLICE_ROWS
from vllm_vptq.parameters import cut_module

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYOUTS = ["compact", "aligned", "stationary"]
DEVICE = torch.device("cuda")
DTYPES = [torch.float16, torch.bfloat16]
TOKENS = [1, 2, 3, 4, 5, 8, 9, 13, 16, 17, 32, 40, 64, 65, 128, 140, 300]

FORMATS = {
    "v8-k65536": dict(vector_len=8, num_centroids=65536),
    "v8-k65536-256": dict(vector_len=8, num_centroids=65536, num_res_centroids=256),
    "v8-k65536-65536": dict(vector_len=8, num_centroids=65536, num_res_centroids=65536),
    "v8-k65536-16": dict(vector_len=8, num_centroids=65536, num_res_centroids=16),
    "v8-k32768-64": dict(vector_len=8, num_centroids=32768, num_res_centroids=64),
    "v8-k256-256": dict(vector_len=8, num_centroids=256, num_res_centroids=256),
    "v8-k4096": dict(vector_len=8, num_centroids=4096),
    "v8-k2-8192": dict(vector_len=8, num_centroids=2, num_res_centroids=8192),
    "v4-k2-65536": dict(vector_len=4, num_centroids=2, num_res_centroids=65536),
    "v6-k4096": dict(vector_len=6, num_centroids=4096),
    "v12-k4096-4096": dict(vector_len=12, num_centroids=4096, num_res_centroids=4096),
    "v16-k65536-65536": dict(vector_len=16, num_centroids=65536, num_res_centroids=65536),
    "v16-k65536-1024": dict(vector_len=16, num_centroids=65536, num_res_centroids=1024),
    "v12-k65536": dict(vector_len=12, num_centroids=65536),
    "v16-k16384-32": dict(vector_len=16, num_centroids=16384, num_res_centroids=32),
    "v4-k16-8": dict(vector_len=4, num_centroids=16, num_res_centroids=8),
    # Short vectors are what `vptq-quantize --bits` writes.
    "v2-k256": dict(vector_len=2, num_centroids=256),
    "v3-k2048": dict(vector_len=3, num_centroids=2048),
    "v5-k256": dict(vector_len=5, num_centroids=256),
    "v3-k256-256": dict(vector_len=3, num_centroids=256, num_res_centroids=256),
    "v7-k256-256": dict(vector_len=7, num_centroids=256, num_res_centroids=256),
    "v5-k1024": dict(vector_len=5, num_centroids=1024),
    "v20-k512-4": dict(vector_len=20, num_centroids=512, num_res_centroids=4),
}
# Public checkpoints' others, which are as those above but for the sizes of their books.
OTHERS = {
    name: dict(zip(("vector_len", "num_centroids", "num_res_centroids"), parse_format(name), strict=True))
    for name in PUBLIC_FORMATS
    if name.removesuffix("-0") not in FORMATS
}
EXTRAS = spec_extras(num_outlier_centroids=700)


def in_each_layout(formats: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    """Where no book needs lists, the aligned layout is the stationary one."""
    listed = {name for name, sizes in formats.items() if max(sizes.values()) > SLICE_ROWS}
    return [(name, layout) for name in formats for layout in LAYOUTS if layout != "aligned" or name in listed]


EACH = in_each_layout(FORMATS)


@pytest.fixture(scope="module", autouse=True)
def extension():
    from vllm_vptq.build import cuda_extension

    cuda_extension()


def require(layout: str) -> None:
    if layout not in choice.available(DEVICE):
        pytest.skip(f"this GPU has no {layout} layout")


class Layer:
    """A fused layer of the given modules (None: a dense one of 24 rows) and its weight in float64."""

    def __init__(
        self,
        specs: list[LayerSpec | None],
        dtype: torch.dtype,
        layout: str,
        rows=None,
        columns=None,
        hardware: stationary.Gpu | None = None,
    ) -> None:
        if hardware is None:
            require(layout)
        self.dtype = dtype
        self.shards, self.weight = fused_layer(specs, dtype, rows, columns, DEVICE)
        hardware = hardware or stationary.Gpu.of(DEVICE)
        self.in_features = self.shards[0].in_features
        if layout == "compact":
            small = compact.build(self.shards, dtype, DEVICE)
            self.layout = streams.build(small, self.in_features, hardware.processors, 16)
        else:
            lists = layout == "stationary"
            self.layout = stationary.build(self.shards, dtype, DEVICE, hardware, 160, lists)
        self.plan = gpu.name_of(self.layout.plan)
        self.bias = torch.randn(len(self.weight), device=DEVICE).to(dtype)
        self.run = self._look_up

    def _look_up(self, x: Tensor, bias: Tensor) -> Tensor:
        return gpu.lookup_linear(x, **self.layout.tensors(), bias=bias, plan=self.plan)

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, self.bias)

    def tokens(self, count: int) -> Tensor:
        gen = torch.Generator("cuda").manual_seed(count)
        return torch.randn(count, self.in_features, generator=gen, device="cuda").to(self.dtype)

    def check(self, x: Tensor) -> None:
        """At most 1.3 times as far from the exact product as torch's product with the rounded weight.

        If outputs are few, 3 times, or as far as one rounding of the result.
        """
        exact = x.double() @ self.weight.T + self.bias.double()
        dense = torch.nn.functional.linear(x, self.weight.to(self.dtype), self.bias)
        poison(exact.numel(), self.dtype)
        y = self(x)
        assert y.shape == exact.shape and y.dtype == self.dtype
        error, theirs = rms(y.double() - exact), rms(dense.double() - exact)
        slack, rounding = 1.3, 0.0
        if exact.numel() <= 500:  # one of few may round badly, and all of torch's by chance not at all
            slack, rounding = 3, rms(exact) * torch.finfo(self.dtype).eps
        assert error <= max(slack * theirs, rounding) + 1e-12, (error, theirs, rms(exact))


def poison(numel: int, dtype: torch.dtype) -> None:
    """Leaves NaN in the memory that torch hands out next."""
    for size in (numel, 1 << 20):
        torch.full((size,), torch.nan, dtype=dtype, device="cuda")


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("name", "layout"), EACH)
def test_formats(name, layout, extra):
    for dtype in DTYPES:
        extras = EXTRAS[extra]
        in_features = 300 + extras.get("outlier_size", 0)
        layer = Layer([LayerSpec(in_features, 117, **FORMATS[name], **extras)], dtype, layout)
        for count in TOKENS:
            layer.check(layer.tokens(count))


@pytest.mark.parametrize(("name", "layout"), in_each_layout(OTHERS))
def test_other_public_formats(name, layout):
    layer = Layer([LayerSpec(264, 72, **OTHERS[name], **EXTRAS["column norm"])], torch.bfloat16, layout)
    for count in (1, 8, 13, 60, 140, 300):
        layer.check(layer.tokens(count))
    weight = gpu.lookup_weight(**layer.layout.tensors(), plan=layer.plan)
    torch.testing.assert_close(weight.double(), layer.weight, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kib", [99, 163])
@pytest.mark.parametrize("extra", ["column norm", "groups"])
@pytest.mark.parametrize(
    "name", ["v8-k256-256", "v8-k4096", "v6-k4096", "v3-k2048", "v12-k4096-4096", "v4-k16-8", "v20-k512-4"]
)
def test_less_shared_memory(name, extra, kib):
    """As on cards before Hopper, without warp groups."""
    hardware = stationary.Gpu(stationary.Gpu.of(DEVICE).processors, False, kib << 10)
    for dtype in DTYPES:
        layer = Layer([LayerSpec(300, 117, **FORMATS[name], **EXTRAS[extra])], dtype, "stationary", hardware=hardware)
        for count in TOKENS:
            layer.check(layer.tokens(count))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused(layout, dtype):
    plain = LayerSpec(520, 96, **FORMATS["v8-k65536"])
    normed = LayerSpec(520, 50, **FORMATS["v6-k4096"], **EXTRAS["column norm"])
    rows = LayerSpec(520, 33, **FORMATS["v8-k256-256"], **EXTRAS["row norm"])
    layer = Layer([plain, None, normed, rows], dtype, layout)
    for count in TOKENS:
        layer.check(layer.tokens(count))


@pytest.mark.parametrize("layout", ["compact", "stationary"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extra", ["plain", "column norm"])
def test_fused_of_three_vector_lengths(layout, dtype, extra):
    """q, k and v as `vptq-quantize --bits` writes them: each with the books that suit it."""
    names = {"v3-k128-0": 96, "v4-k512-0": 50, "v8-k512-512": 33}
    specs = [LayerSpec(520, rows, *parse_format(name), **EXTRAS[extra]) for name, rows in names.items()]
    layer = Layer(specs, dtype, layout)
    for count in TOKENS:
        layer.check(layer.tokens(count))


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name, layout in EACH if layout != "compact"])
def test_as_a_model_is_served(name, layout):
    """Through ``choice``, which the plugin asks."""
    require(layout)
    for extra in ("column norm", "groups", "outliers"):
        extras = EXTRAS[extra]
        spec = LayerSpec(300 + extras.get("outlier_size", 0), 117, **FORMATS[name], **extras)
        layer = Layer([spec, None, spec], torch.bfloat16, "compact")
        layer.layout, tensors = choice.lay_out(layout, layer.shards, layer.dtype, DEVICE, 140)
        layer.run = lambda x, bias, made=layer.layout, tensors=tensors: made.apply(x, bias, **tensors)
        for count in (1, 8, 20, 80, 140, 141):
            layer.check(layer.tokens(count))
        torch.testing.assert_close(layer.layout.weight(**tensors).double(), layer.weight, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "slack"), [("v8-k65536", 1.3), ("v8-k256-256", 1.6), ("v8-k65536-256", 1.6)])
def test_entries_between_0_and_1(name, slack, layout):
    """As the reference's norms have them: see ``layouts.conditioned``."""
    require(layout)
    spec = LayerSpec(1024, 120, **FORMATS[name], **EXTRAS["column norm"])
    for dtype in DTYPES:
        tensors = between_0_and_1(spec, 0, dtype)
        shard = cut_module(tensors, spec, (0, 120), (0, 1024), DEVICE)
        layer, made = choice.build("layer", [shard], dtype, DEVICE, lambda: layout)
        weight = dequantize(tensors, spec, torch.float64).to(DEVICE)
        for count in (1, 8, 16, 64, 300):
            x = torch.randn(count, 1024, device="cuda").to(dtype)
            exact, dense = x.double() @ weight.T, torch.nn.functional.linear(x, weight.to(dtype))
            poison(exact.numel(), dtype)
            error, theirs = (rms(y.double() - exact) for y in (layer.apply(x, None, **made), dense))
            assert error <= (3 if count == 1 else slack) * theirs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_parts_than_fit_the_arguments_of_a_kernel(layout):
    spec = LayerSpec(256, 80, **FORMATS["v16-k65536-65536"], group_num=8, enable_perm=True)
    layer = Layer([spec, spec], torch.float16, layout)
    for count in (1, 8, 16, 40, 150):
        layer.check(layer.tokens(count))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["v8-k65536-256", "v8-k256-256", "v12-k4096-4096", "v6-k4096", "v3-k2048"])
def test_shards(name, layout):
    spec = LayerSpec(1024, 200, **FORMATS[name], **EXTRAS["column norm"])
    for rows, columns in [((37, 149), (0, 1024)), ((0, 200), (256, 512)), ((100, 101), (0, 1024))]:
        layer = Layer([spec], torch.float16, layout, rows, columns)
        for count in (1, 7, 16, 50, 200):
            layer.check(layer.tokens(count))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2), (9, 31), (2500, 33), (24, 9000), (8, 20000)], ids=str)
def test_shapes(shape, layout):
    """(out, in): tails of every kind, several tiles and spans of columns, one column, one row."""
    for name in ("v8-k65536", "v8-k256-256", "v6-k4096", "v8-k65536-256"):
        layer = Layer([LayerSpec(shape[1], shape[0], **FORMATS[name])], torch.float16, layout)
        for count in (1, 8, 16, 33, 100, 170):
            layer.check(layer.tokens(count))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_outputs_than_are_decoded_at_a_time(layout):
    layer = Layer([LayerSpec(20000, 3700, **FORMATS["v8-k256-256"], **EXTRAS["row norm"])], torch.float16, layout)
    layer.check(layer.tokens(300))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_of_few_tokens(name, extra, monkeypatch):
    """Also where wide.cuh would serve, as it does in the aligned layout at any count."""
    monkeypatch.setattr(stationary, "few_tokens", lambda *_: 16)
    extras = EXTRAS[extra]
    spec = LayerSpec(300 + extras.get("outlier_size", 0), 417, **FORMATS[name], **extras)
    layer = Layer([spec, spec], torch.float16, "stationary")
    for count in (1, 4, 5, 8, 9, 16, 31, 60):
        layer.check(layer.tokens(count))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["v8-k65536-256", "v8-k256-256", "v12-k4096-4096"])
def test_deterministic_and_rows_alone(name, layout):
    layer = Layer([LayerSpec(4500, 264, **FORMATS[name])], torch.float16, layout)
    for count in (1, 8, 16, 64, 128):
        x = layer.tokens(count)
        y = layer(x)
        for _ in range(5):
            assert torch.equal(layer(x), y)
        alone = torch.cat([layer(row[None]) for row in x])
        # Another order of sums: two roundings of the result apart at most, with room for cancellation.
        scale = y.double().abs().mean()
        assert ((alone.double() - y.double()).abs().max() / scale).item() < 0.02


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_shapes(layout):
    layer = Layer([LayerSpec(256, 48, **FORMATS["v8-k256-256"])], torch.float16, layout)
    x = layer.tokens(24)
    y = layer(x)
    assert torch.equal(layer(x.view(2, 3, 4, 256)), y.view(2, 3, 4, 48))
    assert layer(x[:0]).shape == (0, 48)
    wide = torch.cat([x, x], 1)
    assert torch.equal(layer(wide[:, 256:]), y)
    assert torch.equal(layer(x.T.contiguous().T), y)
    with pytest.raises(RuntimeError, match="256 input features"):
        layer(x[:, :8])
    with pytest.raises(RuntimeError, match="float16 or bfloat16"):
        layer(x.float())
    with pytest.raises(RuntimeError, match="no layer with this plan was laid out in this process: 48x256-0"):
        gpu.lookup_linear(x, **layer.layout.tensors(), bias=None, plan="48x256-0")
    for bias in (layer.bias[1:], layer.bias[None], layer.bias.cpu()):
        with pytest.raises(RuntimeError, match="expected a bias of 48 numbers"):
            layer.run(x, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_many_tokens_as_there_may_be(layout):
    layer = Layer([LayerSpec(264, 40, **FORMATS["v8-k65536-256"], **EXTRAS["column norm"])], torch.float16, layout)
    layer.check(layer.tokens(65536))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph(layout):
    layer = Layer([LayerSpec(600, 96, **FORMATS["v8-k65536-256"])], torch.float16, layout)
    for count in (1, 16, 50, 150):
        x = layer.tokens(count)
        expected = layer(x)
        static, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
        layer(static)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = layer(static)
        for _ in range(3):
            static.copy_(x)
            graph.replay()
            assert torch.equal(y, expected)
            static.copy_(2 * x)
            graph.replay()
            assert not torch.equal(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_compile(layout):
    layer = Layer([LayerSpec(256, 48, **FORMATS["v8-k256-256"])], torch.float16, layout)
    t = layer.layout.tensors()
    tensors = t["codes"], t["books"], t["norm"], t["columns"], t["dense"]
    for count in (5, 300):  # looked up, decoded
        arguments = (layer.tokens(count), *tensors, layer.bias, t["work"], layer.plan)
        torch.library.opcheck(torch.ops.vllm_vptq.lookup_linear.default, arguments)
    torch.library.opcheck(torch.ops.vllm_vptq.lookup_weight.default, (*tensors, t["work"], layer.plan))
    compiled = torch.compile(layer.__call__, fullgraph=True, dynamic=True)
    for count in (5, 33):
        x = layer.tokens(count)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(("name", "layout"), EACH)
def test_weight(name, layout):
    spec = LayerSpec(300, 117, **FORMATS[name], enable_norm=True)
    layer = Layer([spec, spec], torch.float16, layout)
    weight = gpu.lookup_weight(**layer.layout.tensors(), plan=layer.plan)
    torch.testing.assert_close(weight.double(), layer.weight, rtol=2e-3, atol=2e-3)


def test_packing_is_quick():
    """8192 x 28672, the largest linear of Llama-3.1-70B, in under a second."""
    gen = torch.Generator("cuda").manual_seed(0)
    from benchmarks.kernels import random_shard

    shard = random_shard(8, 65536, 256, 8192, 28672, torch.float16, gen)
    stationary.build([shard], torch.float16, torch.device("cuda"), stationary.Gpu(132, True), 32)
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    stationary.build([shard], torch.float16, torch.device("cuda"), stationary.Gpu(132, True), 32)
    end.record()
    torch.cuda.synchronize()
    assert begin.elapsed_time(end) < 1000
