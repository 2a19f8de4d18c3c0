"""What layers take in each layout, and which of them ``auto`` gives to a model."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tests.packers  # noqa: F401  # the packing ops, for the CPU
from tests.shards import CPU, fused_layer
from tests.strategies import few, spec_extras, specs
from vllm_vptq.format import LayerSpec, parse_format
from vllm_vptq.layouts import choice, compact, memory, stationary
from vllm_vptq.layouts.flat import Flat
from vllm_vptq.layouts.memory import ALIGNED, COMPACT, LAYOUTS, STATIONARY, Layer
from vllm_vptq.layouts.passes import SHARED_BYTES, pack, wide_kinds
from vllm_vptq.parameters import ModuleShard

GPU = torch.device("cuda")
HOPPER = stationary.Gpu(132, tensor_groups=True)


def packed_bytes(shards: list[ModuleShard], layout: str) -> int:
    """Of indices and books."""
    if layout == COMPACT:
        made = compact.build(shards, torch.float16, CPU)
        return made.qweight.nbytes + made.codebooks.nbytes
    packed = stationary.build(shards, torch.float16, CPU, HOPPER, 64, lists=layout == STATIONARY)
    return packed.codes.nbytes + packed.books.nbytes


@few(25)
@given(
    spec=specs(max_out=60, max_group_size=400),
    books=st.sampled_from([None, (8, 16384), (12, 16384, 256), (6, 16384), (16, 16384, 32768), (5, 32, 16384)]),
)
def test_measured_before_as_after_packing(spec, books):
    if books:
        spec = replace(spec, **dict(zip(("vector_len", "num_centroids", "num_res_centroids"), books, strict=False)))
    shards, _ = fused_layer([spec, None])
    layer = memory.measure(shards, LAYOUTS)
    assert layer.weights == sum(shard.out_features * shard.in_features for shard in shards)
    gaps = 4 * sum(len(shard.segments) for shard in shards) * 16 + 4  # parts begin at multiples of 16 bytes
    for layout, size in layer.nbytes.items():
        found = packed_bytes(shards, layout)
        if layout == STATIONARY and ALIGNED in layer.nbytes:
            continue  # the lists of so few indices are mostly padding; see below
        assert size <= found <= size + gaps
    if ALIGNED not in layer.nbytes:
        assert packed_bytes(shards, ALIGNED) == packed_bytes(shards, STATIONARY)


@few(25)
@given(
    spec=specs(max_out=60, max_group_size=400),
    books=st.sampled_from([None, (8, 256, 64), (8, 16384, 256), (16, 16384, 32768), (5, 32, 16384), (8, 4096, 256)]),
    outliers=st.sampled_from([0, 1, 6, 256, 257, 16384]),
)
def test_a_spec_tells_what_packing_makes(spec, books, outliers):
    """What a GPU holds without lists, which are estimated, and how it looks weights up."""
    if books:
        spec = replace(spec, **dict(zip(("vector_len", "num_centroids", "num_res_centroids"), books, strict=True)))
    if outliers:
        columns = spec.group_num * spec.group_size + 12
        spec = replace(spec, **spec_extras(outliers)["outliers"], in_features=columns)
    shards, _ = fused_layer([spec])
    packed = stationary.build(shards, torch.float16, CPU, HOPPER, 64, lists=False)
    found = memory.resident_bytes([spec, spec])
    gaps = (3 * len(shards[0].segments) + 4) * 16
    for layout, made in ((COMPACT, compact.build(shards, torch.float16, CPU)), (ALIGNED, packed)):
        tensors = [made.qweight] if layout == COMPACT else [made.codes]
        tensors += [made.codebooks if layout == COMPACT else made.books, made.norm, made.columns]
        held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        assert 0 <= held - found[layout] // 2 <= gaps
    made = [pack(segment, Flat(torch.int32), None, Flat(torch.float16), SHARED_BYTES) for segment in shards[0].segments]
    for segment, own, passes in zip(shards[0].segments, memory.module_of(spec).segments, made, strict=True):
        assert wide_kinds(segment) == wide_kinds(own) == {pass_.kind for pass_ in passes.wide}


@pytest.mark.parametrize("name", ["v8-k65536", "v8-k65536-256", "v16-k65536-65536", "v8-k256-65536", "v6-k16384"])
def test_lists_are_estimated(name):
    v, k, r = parse_format(name)
    shards, _ = fused_layer([LayerSpec(4096, 256, v, k, r)])
    size = memory.measure(shards, LAYOUTS).nbytes
    lists = size[STATIONARY] - size[ALIGNED]
    assert packed_bytes(shards, STATIONARY) - packed_bytes(shards, ALIGNED) == pytest.approx(lists, rel=0.02)


@pytest.mark.parametrize(
    ("name", "on_disk", "aligned"),
    [
        ("v8-k65536", 2, 2),
        ("v8-k65536-256", 3, 3),
        ("v8-k65536-65536", 4, 4),
        ("v16-k65536-65536", 2, 2),
        ("v8-k256-256", 2, 2),
        ("v6-k4096", 2, 16 / 6),
        ("v12-k4096-4096", 2, 32 / 12),
        ("v8-k16384", 1.75, 2),
        ("v8-k16-16", 1, 2),
    ],
)
def test_bits_of_an_index(name, on_disk, aligned):
    """As docs/serving.md has them; books apart."""
    v, k, r = parse_format(name)
    shards, _ = fused_layer([LayerSpec(4096, 48 * v, v, k, r)])
    books = (k + r) * -(-v // 8) * 8 * 2
    weights = 48 * v * 4096
    small = memory.measure(shards, [COMPACT]).nbytes[COMPACT]
    assert (small - (k + r) * v * 2) * 8 / weights == pytest.approx(on_disk)
    codes = stationary.build(shards, torch.float16, CPU, HOPPER, 64, lists=False)
    assert codes.codes.nbytes * 8 / weights == pytest.approx(aligned)
    assert codes.books.nbytes == books


@pytest.mark.parametrize("extra", spec_extras(300))
def test_the_aligned_layout_has_no_lists(extra):
    extras = spec_extras(300)[extra]
    spec = LayerSpec(300 + extras.get("outlier_size", 0), 64, 8, 65536, 16384, **extras)
    shards, _ = fused_layer([spec])
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(stationary.pack.__globals__["_Packer"], "_sliced")
        stationary.build(shards, torch.float16, CPU, HOPPER, 64, lists=False)
    with pytest.raises(ValueError, match="aligned layout takes a GPU with tensor groups"):
        stationary.build(shards, torch.float16, CPU, stationary.Gpu(132, tensor_groups=False), 64, lists=False)


layers = st.lists(
    st.builds(
        lambda weights, names, bits: Layer(
            weights, {n: int(weights * b) for n, b in zip(names, itertools.accumulate(bits), strict=False)}
        ),
        weights=st.integers(1, 1000),
        names=st.sampled_from([LAYOUTS, (COMPACT, STATIONARY), (COMPACT,)]),
        bits=st.tuples(st.floats(1, 4), st.floats(-0.1, 1), st.floats(0, 8)),
    ),
    min_size=1,
    max_size=12,
)


@few(300)
@given(layers=layers, budget=st.floats(-100, 20000))
def test_memory_is_not_exceeded_nor_wasted(layers, budget):
    found = memory.distribute(layers, budget)
    smallest = [next(iter(layer.nbytes.values())) for layer in layers]
    more = [layer.nbytes[kind] - small for layer, kind, small in zip(layers, found, smallest, strict=True)]
    left = budget - sum(more)
    assert left >= min(budget, 0)
    for layer, kind in zip(layers, found, strict=True):
        names = list(layer.nbytes)
        for faster in names[names.index(kind) + 1 :][:1]:
            assert layer.nbytes[faster] - layer.nbytes[kind] > max(left, 0)


def test_what_goes_first():
    """Codes of whole bytes before lists, cheap ones before dear ones, large layers before small ones."""
    large, small = (Layer(n, {COMPACT: 2 * n, ALIGNED: 2 * n, STATIONARY: 6 * n}) for n in (1000, 10))
    dear = Layer(100, {COMPACT: 200, STATIONARY: 300})
    for budget, expected in [
        (0, [ALIGNED, ALIGNED, COMPACT]),
        (100, [ALIGNED, ALIGNED, STATIONARY]),
        (140, [ALIGNED, STATIONARY, STATIONARY]),
        (4100, [STATIONARY, ALIGNED, STATIONARY]),
        (4140, [STATIONARY, STATIONARY, STATIONARY]),
    ]:
        assert memory.distribute([large, small, dear], budget) == expected


def fake_gpu(monkeypatch, major: int, free: int, total: int = 1000) -> None:
    """Free and total memory in KiB."""
    properties = SimpleNamespace(
        shared_memory_per_block_optin=227 * 1024 if major in (9, 10) else 99 * 1024,
        multi_processor_count=132, major=major, minor=0,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((free - 50) * 1024, total * 1024))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 150 * 1024)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100 * 1024)


@pytest.mark.parametrize(
    ("major", "expected"),
    [(8, (COMPACT,)), (9, (COMPACT, ALIGNED, STATIONARY)), (10, (COMPACT, STATIONARY)), (12, (COMPACT,))],
)
def test_available(major, expected, monkeypatch):
    fake_gpu(monkeypatch, major, 500)
    assert choice.available(GPU) == expected


@pytest.fixture
def model(monkeypatch):
    """Three layers, of which in KiB of indices and books: 270, 272 aligned, 304.5 with lists; 24 or 24; 76 or 80."""
    monkeypatch.delenv(choice.LAYOUT, raising=False)
    kinds = [LayerSpec(4096, 16, 8, 16384), LayerSpec(4096, 16, 8, 256, 256), LayerSpec(4096, 16, 8, 4096)]
    made = choice.Layers()
    for i, spec in enumerate(kinds):
        shards, _ = fused_layer([spec])
        made.expect(f"l.{i}", partial(list, shards))
    return made


@pytest.mark.parametrize(
    ("major", "free", "share", "expected"),
    [
        (9, 900, 1.0, [STATIONARY, STATIONARY, STATIONARY]),
        (9, 900, 0.175, [ALIGNED, STATIONARY, COMPACT]),  # 100 KiB are used of the 175 that vLLM may use
        (9, 900, 0.1, [COMPACT, STATIONARY, COMPACT]),
        (9, 430, 0.4, [STATIONARY, STATIONARY, STATIONARY]),  # beside an engine that holds 470 KiB
        (9, 430, 1.0, [ALIGNED, STATIONARY, STATIONARY]),
        (9, 400, 1.0, [COMPACT, STATIONARY, COMPACT]),
        (10, 900, 1.0, [STATIONARY, STATIONARY, STATIONARY]),
        (10, 430, 1.0, [COMPACT, STATIONARY, STATIONARY]),
        (8, 900, 1.0, [COMPACT, COMPACT, COMPACT]),
    ],
)
def test_auto(model, major, free, share, expected, monkeypatch, caplog):
    """Of a GPU with 1000 KiB; where memory decided against the fastest layout, the log says so."""
    fake_gpu(monkeypatch, major, free)
    model.memory_share = share
    with caplog.at_level(logging.INFO, logger=choice.logger.name):
        assert [model.choose(f"l.{i}", GPU) for i in (2, 0, 1)] == [expected[i] for i in (2, 0, 1)]
    fastest = [COMPACT if major == 8 else STATIONARY] * 3
    assert len(caplog.messages) == (expected != fastest)
    if expected == [ALIGNED, STATIONARY, STATIONARY]:
        assert caplog.messages[0].startswith("VPTQ layouts of 3 layers: 1 aligned, 2 stationary; faster ones would ")


def test_a_layer_that_comes_later_is_decided_on_by_itself(model, monkeypatch):
    fake_gpu(monkeypatch, 9, 405)
    later: list[ModuleShard] = []
    model.expect("l.3", lambda: later)
    assert model.choose("l.0", GPU) == ALIGNED
    later += fused_layer([LayerSpec(4096, 16, 8, 4096)])[0]
    assert [model.choose(f"l.{i}", GPU) for i in range(4)] == [ALIGNED, STATIONARY, COMPACT, STATIONARY]


@pytest.mark.parametrize("asked", LAYOUTS)
def test_the_user_chooses(model, asked, monkeypatch):
    fake_gpu(monkeypatch, 9, 0)
    monkeypatch.setenv(choice.LAYOUT, asked)
    assert [model.choose(f"l.{i}", GPU) for i in range(3)] == [asked] * 3


def test_impossible_choices(model, monkeypatch):
    shards, _ = fused_layer([LayerSpec(96, 40, 8, 8192)])
    for major, kind, message in [
        (8, STATIONARY, r"=stationary needs shared memory for books of more than 4096 entries, which .* or compact\Z"),
        (8, ALIGNED, r"=aligned needs the warp-group products of Hopper, which .* use auto or compact\Z"),
        (10, ALIGNED, r"=aligned needs the warp-group products of Hopper, which this GPU lacks; use auto or compact\Z"),
    ]:
        fake_gpu(monkeypatch, major, 900)
        with pytest.raises(RuntimeError, match=rf"\A{choice.LAYOUT}{message}"):
            choice.lay_out(kind, shards, torch.float16, GPU, 16)
    monkeypatch.setenv(choice.LAYOUT, "fast")
    with pytest.raises(ValueError, match="VLLM_VPTQ_LAYOUT=fast: choose one of auto, compact, aligned, stationary"):
        model.choose("l.0", GPU)
