"""The intake of a layer's checkpoint tensors: any order, any naming of parts, and what is refused."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.shards import CPU, layout_dense, slow_dense
from tests.strategies import EVERYTHING, few, is_one_line_about, random_tensors, refusal
from vllm_vptq.format import LayerSpec, VPTQFormatError, dequantize, tensor_shapes
from vllm_vptq.layouts import compact
from vllm_vptq.layouts.plan import decode
from vllm_vptq.parameters import Intake, Source

K = 22
Q = EVERYTHING
KEY = LayerSpec(K, 8, 3, 16, enable_perm=True)
FUSED = LayerSpec(K, 30, 4, 8, 4, group_num=2, enable_norm=True)
"""One module on disk that serves three outputs of 12, 9 and 9 rows."""
PIECES = [(6, 12), (15, 18), (24, 27)]


class Layer:
    """An intake with a count of its ``on_ready`` calls."""

    def __init__(self, *sources: Source) -> None:
        self.ready_calls = 0
        self.intake = Intake(list(sources), CPU, self._ready)

    def _ready(self) -> None:
        self.ready_calls += 1

    def load(self, tensors: dict[str, Tensor], shard_id=None) -> None:
        for name, tensor in tensors.items():
            self.intake.load(name, tensor, shard_id)


def qkv(columns=(0, K)) -> list[Source]:
    """q quantized with everything, k with a plain book, v dense; this rank has a part of the rows of each."""
    return [
        Source("l.q_proj", Q, [(3, 9)], columns, (10, K), shard_ids=("q", ("q",))),
        Source("l.k_proj", KEY, [(1, 5)], columns, (8, K), shard_ids=("k", ("k",))),
        Source("l.v_proj", None, [(2, 4)], columns, (6, K), shard_ids=("v", ("v",))),
    ]


def qkv_tensors(seed: int) -> dict[str, dict[str, Tensor]]:
    dense = torch.randn(6, K, generator=torch.Generator().manual_seed(seed)).half()
    return {"q": random_tensors(Q, seed), "k": random_tensors(KEY, seed + 1), "v": {"weight": dense}}


def qkv_expected(tensors: dict[str, dict[str, Tensor]], columns=(0, K)) -> list[Tensor]:
    q, k = dequantize(tensors["q"], Q, torch.float64)[3:9], dequantize(tensors["k"], KEY, torch.float64)[1:5]
    return [w[:, slice(*columns)] for w in (q, k, tensors["v"]["weight"][2:4].double())]


def fused_source() -> Source:
    return Source("l.qkv_proj", FUSED, PIECES, (0, K), (30, K), shard_ids=("q", "k", "v", ("q", "k", "v")))


def assert_weights(intake: Intake, expected: list[Tensor]) -> None:
    assert intake.ready
    intake.require_ready()
    shards = intake.release()
    assert len(shards) == len(expected)
    layout = compact.build(shards, torch.float64, CPU)
    for shard, found, want in zip(shards, layout_dense(layout, want_columns(expected)), expected, strict=True):
        assert torch.equal(slow_dense(shard), want)
        assert torch.equal(found, want)


def want_columns(expected: list[Tensor]) -> int:
    return expected[0].shape[1]


@pytest.mark.parametrize("columns", [(0, K), (7, 16)])
@few(25)
@given(order=st.randoms(use_true_random=False), seed=st.integers(0, 1000))
def test_tensors_come_in_any_order(columns, order: random.Random, seed):
    layer, tensors = Layer(*qkv(columns)), qkv_tensors(seed)
    arriving = [(name, tensor, part) for part, of in tensors.items() for name, tensor in of.items()]
    order.shuffle(arriving)
    for i, (name, tensor, part) in enumerate(arriving):
        assert not layer.intake.ready
        assert layer.ready_calls == 0
        layer.intake.load(name, tensor, order.choice([part, (part,)]))
        assert layer.intake.ready == (i == len(arriving) - 1)
    assert layer.ready_calls == 1
    assert_weights(layer.intake, qkv_expected(tensors, columns))


@pytest.mark.parametrize("shard_id", [None, "q", "v", ("q", "k", "v")])
def test_one_module_on_disk_for_three_outputs(shard_id):
    layer, tensors = Layer(fused_source()), random_tensors(FUSED, seed=1)
    layer.load(tensors, shard_id)
    weight = dequantize(tensors, FUSED, torch.float64)
    assert_weights(layer.intake, [weight[slice(*rows)] for rows in PIECES])


def test_pieces_of_a_module_share_its_books_in_the_layout():
    layer = Layer(fused_source())
    layer.load(random_tensors(FUSED, seed=2))
    layout = compact.build(layer.intake.release(), torch.float16, CPU)
    shapes = tensor_shapes(FUSED)
    books = [shapes["centroids.weight"], shapes["res_centroids.weight"]]
    assert layout.codebooks.numel() == sum(groups * size for groups, size in books)
    for segments in zip(*(module.segments for module in decode(layout.plan)), strict=True):
        assert len({(s.book_offset, s.res_book_offset) for s in segments}) == 1


@pytest.mark.parametrize(
    ("ids", "used"),
    [((0, 1, (0, 1)), [0, 1]), ((0, 1, (0, 1)), [(0, 1)] * 2), (("q", "k", ("q", "k")), ["k", "q"])],
)
def test_a_part_that_is_fused_beside_one_that_is_not(ids, used):
    """As gate and up in one module, with a third output of its own."""
    both = replace(KEY, out_features=14)
    layer = Layer(
        Source("l.both", both, [(0, 4), (8, 11)], (0, K), (14, K), shard_ids=ids),
        Source("l.third", KEY, [(5, 8)], (0, K), (8, K), shard_ids=(2, (2,))),
    )
    tensors, third = random_tensors(both, seed=3), random_tensors(KEY, seed=4)
    for i, (name, tensor) in enumerate(tensors.items()):
        layer.intake.load(name, tensor, used[i % 2])
    layer.load(third, 2)
    weight = dequantize(tensors, both, torch.float64)
    assert_weights(layer.intake, [weight[0:4], weight[8:11], dequantize(third, KEY, torch.float64)[5:8]])


def test_the_names_of_all_tensors():
    assert Layer(*qkv()).intake.tensor_names() == {*tensor_shapes(Q), *tensor_shapes(KEY), "weight"}


@pytest.mark.parametrize("missing", [("q", name) for name in tensor_shapes(Q)] + [("k", "indices"), ("v", "weight")])
def test_missing_tensor(missing):
    layer = Layer(*qkv())
    part, name = missing
    for other, tensors in qkv_tensors(0).items():
        layer.load({n: t for n, t in tensors.items() if (other, n) != missing}, other)
    assert not layer.intake.ready
    with refusal("tensor", name, "missing", name=f"l.{part}_proj"):
        layer.intake.require_ready()


@pytest.mark.parametrize(("part", "name"), [("k", "res_indices"), ("k", "weight"), ("v", "indices"), ("q", "qweight")])
def test_tensor_its_module_does_not_have(part, name):
    """Among them tensors that another module of the layer does have."""
    with refusal("unknown tensor", name, "expects", name=f"l.{part}_proj"):
        Layer(*qkv()).intake.load(name, torch.zeros(1, 2, 3), part)


@pytest.mark.parametrize("shard_id", [None, 0, "o", ("q", "k"), ("q", "k", "v"), "qk"])
def test_unknown_part(shard_id):
    with pytest.raises(VPTQFormatError) as caught:
        Layer(*qkv()).intake.load("indices", torch.zeros(1), shard_id)
    assert repr(shard_id) in str(caught.value)
    assert "l.q_proj" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", tensor_shapes(Q))
def test_wrong_shape(name):
    layer, tensors = Layer(*qkv()), random_tensors(Q, seed=5)
    tensors[name] = torch.cat([tensors[name]] * 2)
    with pytest.raises(VPTQFormatError) as caught:
        layer.load(tensors, "q")
    assert is_one_line_about(caught.value, "l.q_proj")
    assert name in str(caught.value)
    assert str(list(tensors[name].shape)) in str(caught.value)


@pytest.mark.parametrize("shape", [(5, K), (7, K), (12, K), (6, K - 1), (6, K + 1), (6, 2 * K), (6 * K,), (1, 6, K)])
def test_wrong_shape_of_a_dense_module(shape):
    with refusal("weight", list(shape), name="l.v_proj"):
        Layer(*qkv()).intake.load("weight", torch.zeros(shape), "v")


def test_values_are_validated():
    layer, tensors = Layer(*qkv()), random_tensors(Q, seed=6)
    tensors["centroids.weight"][0, 0] = torch.nan
    with refusal("centroids.weight", "NaN", name="l.q_proj"):
        layer.load(tensors, "q")


def test_the_last_of_a_tensor_that_comes_twice_counts():
    layer, wrong, right = Layer(*qkv()), qkv_tensors(7), qkv_tensors(17)
    layer.load({"perm": wrong["q"]["perm"], "indices": wrong["q"]["indices"]}, "q")
    for part, tensors in right.items():
        layer.load(tensors, part)
    assert_weights(layer.intake, qkv_expected(right))


def test_loading_twice_before_release():
    layer = Layer(*qkv())
    for seed in (8, 18):
        for part, tensors in qkv_tensors(seed).items():
            layer.load(tensors, part)
    assert_weights(layer.intake, qkv_expected(qkv_tensors(18)))


def test_loading_again_after_release():
    layer = Layer(*qkv())
    for seed in (9, 19, 29):
        assert not layer.intake.ready
        for part, tensors in qkv_tensors(seed).items():
            layer.load(tensors, part)
        assert_weights(layer.intake, qkv_expected(qkv_tensors(seed)))
    assert layer.ready_calls == 3


def test_a_stale_tensor_is_not_mixed_with_those_of_the_next_load():
    layer, first, second = Layer(fused_source()), random_tensors(FUSED, seed=11), random_tensors(FUSED, seed=21)
    layer.load(first)
    layer.load({"indices": first["indices"]}, "k")
    layer.intake.release()
    order = [name for name in second if name != "indices"] + ["indices"]
    layer.load({name: second[name] for name in order})
    weight = dequantize(second, FUSED, torch.float64)
    assert_weights(layer.intake, [weight[slice(*rows)] for rows in PIECES])


def test_staged_tensors_are_dropped_once_a_module_is_complete():
    layer = Layer(*qkv((0, 9)))
    tensors = random_tensors(Q, seed=12)
    large = {name: weakref.ref(tensor) for name, tensor in tensors.items() if "indices" in name}
    name, last = tensors.popitem()
    layer.load(tensors, "q")
    tensors.clear()
    assert all(reference() is not None for reference in large.values())
    layer.intake.load(name, last, "q")
    assert not layer.intake.sources[0].staged
    assert not [n for n, reference in large.items() if reference() is not None]


@pytest.mark.parametrize("perm", [True, False])
def test_a_shard_does_not_keep_the_whole_indices_alive(perm):
    """As the intake promises: loading holds one whole module at a time beyond what the rank keeps."""
    spec = LayerSpec(64, 80, 4, 16, enable_perm=perm)
    layer = Layer(Source("l.up", spec, [(40, 50)], (0, 64), (80, 64)))
    layer.load(random_tensors(spec, seed=13))
    words = layer.intake.release()[0].segments[0].words
    assert words.untyped_storage().nbytes() == words.numel() * words.itemsize


def test_a_dense_piece_owns_its_memory():
    layer = Layer(*qkv())
    weight = torch.randn(6, K)
    before = weight[2:4].clone()
    layer.intake.load("weight", weight, "v")
    weight.zero_()
    assert torch.equal(layer.intake.sources[2].shards[0].dense, before)
