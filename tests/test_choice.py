"""Which layout and which implementation a layer gets; and how its work is cut."""

from __future__ import annotations

import itertools
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.crossovers import crossovers
from benchmarks.crossovers import main as make_crossovers
from tests.packers import Plan
from tests.shards import CPU
from tests.strategies import few, random_tensors
from vllm_vptq import gpu, ops
from vllm_vptq.build import BuildError
from vllm_vptq.format import LayerSpec, VPTQFormatError, dequantize, parse_format
from vllm_vptq.layouts import choice, compact, stationary, streams, work
from vllm_vptq.layouts.work import Job, Kind, Unit
from vllm_vptq.linear import VPTQLinearMethod
from vllm_vptq.parameters import cut_module

SPEC = LayerSpec(96, 40, 8, 256, 16)
GPU = torch.device("cuda")


def shards(spec: LayerSpec = SPEC):
    return [cut_module(random_tensors(spec, 0), spec, (0, spec.shape[0]), (0, spec.shape[1]))]


def never() -> str:
    raise AssertionError("there is but one layout here")


@pytest.mark.parametrize(("major", "tensor_groups"), [(8, False), (9, True), (10, False), (12, False)])
def test_hardware(major, tensor_groups, monkeypatch):
    properties = SimpleNamespace(
        multi_processor_count=99, major=major, minor=0, shared_memory_per_block_optin=163 << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert stationary.Gpu.of(GPU) == stationary.Gpu(99, tensor_groups, 163 << 10)


@pytest.mark.parametrize(
    ("kib", "most", "served"),
    [
        (99, 4096, {"v8-k256-256", "v6-k4096", "v12-k4096-4096", "v4-k16"}),
        (163, 8192, {"v8-k256-256", "v6-k4096", "v12-k4096-4096", "v4-k16", "v8-k8192", "v8-k8192-256"}),
        (227, 8192, {"all"}),
    ],
)
def test_books_that_fit_less_shared_memory(kib, most, served):
    """Of Ada and consumer cards, the A100, and Hopper, which has lists for the others."""
    hardware = stationary.Gpu(108, False, kib << 10)
    assert hardware.most_entries == most
    for name in (
        "v8-k256-256",
        "v6-k4096",
        "v12-k4096-4096",
        "v4-k16",
        "v8-k8192",
        "v8-k8192-256",
        "v8-k65536",
        "v8-k256-65536",
    ):
        v, k, r = parse_format(name)
        layer = shards(LayerSpec(96, 48, v, k, r))
        assert hardware.serves(layer) == (name in served or served == {"all"}), name
        if not hardware.serves(layer):
            with pytest.raises(ValueError, match="do not fit"):
                stationary.build(layer, torch.float16, CPU, hardware, 48)


def test_on_a_cpu():
    layout, tensors = choice.build("layer", shards(), torch.float32, CPU, never)
    assert (layout.name, layout.apply_op) == ("compact", ops.linear)
    x = torch.randn(3, 96)
    weight = dequantize(random_tensors(SPEC, 0), SPEC)
    torch.testing.assert_close(layout.apply(x, None, **tensors), x @ weight.T.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layout.weight(**tensors), weight.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_no_kernels_is_an_error_unless_the_slow_way_is_asked_for(device, monkeypatch, caplog):
    def fail() -> None:
        raise BuildError("no nvcc; install it")

    monkeypatch.setattr(choice, "cuda_extension", fail)
    monkeypatch.delenv(ops.ALLOW_REFERENCE, raising=False)
    with pytest.raises(RuntimeError, match=rf"\Amodel\.q: .*no nvcc; install it.*{ops.ALLOW_REFERENCE}=1.*\Z"):
        choice.build("model.q", shards(), torch.float16, torch.device(device), never)
    monkeypatch.setenv(ops.ALLOW_REFERENCE, "1")
    choice._say_slow.cache_clear()
    with caplog.at_level(logging.WARNING, logger=choice.logger.name):
        for name in ("model.q", "model.o"):
            assert not choice._native(name, torch.float16)
    (said,) = caplog.messages
    assert said.endswith("no CUDA kernels: no nvcc; install it") and f"{ops.ALLOW_REFERENCE}=1" in said


def test_float32_is_an_error_on_a_gpu(monkeypatch):
    monkeypatch.setattr(choice, "cuda_extension", lambda: None)
    monkeypatch.delenv(ops.ALLOW_REFERENCE, raising=False)
    with pytest.raises(RuntimeError, match=r"\Amodel\.q: .*float32; pass --dtype float16"):
        choice.build("model.q", shards(), torch.float32, GPU, never)


def test_crossovers_are_numbers_for_every_class():
    classes = {"compact", "bytes", "shorts", "shorts and more", "far", "far and more"}
    assert {"default", "9.0"} <= choice._crossovers().keys()
    for name, table in choice._crossovers().items():
        assert set(table) == classes, name
        assert all(isinstance(tokens, int) and tokens > 0 for tokens in table.values())


def test_every_crossover_says_where_it_was_measured_or_that_it_was_not():
    table = json.loads((Path(choice.__file__).parent / "crossovers.json").read_text())
    assert set(table["default"]) == {"tokens", "assumed"} and table["default"]["assumed"].startswith("not measured")
    for name, row in table.items():
        if name != "default":
            assert set(row) == {"tokens", "measured"} and set(row["measured"]) == set(row["tokens"])
            origins = row["measured"].values()
            assert all(re.match(r"NVIDIA \w+, \d{4}-\d\d-\d\d, [0-9a-f]{7}\b", origin) for origin in origins), name


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (LayerSpec(96, 40, 8, 256, 16), "bytes"),
        (LayerSpec(96, 40, 16, 256), "bytes"),
        (LayerSpec(96, 40, 7, 256, 256), "shorts"),  # a plane that is not full
        (LayerSpec(96, 40, 8, 8192), "shorts"),
        (LayerSpec(96, 40, 6, 4096), "shorts"),
        (LayerSpec(96, 40, 12, 256, 256), "shorts and more"),
        (LayerSpec(96, 40, 12, 4096), "shorts and more"),
        (LayerSpec(96, 40, 8, 512, 512), "shorts and more"),
        (LayerSpec(96, 40, 8, 16384), "far"),
        (LayerSpec(96, 40, 8, 256, 16384), "far and more"),
        (LayerSpec(96, 40, 8, 65536, 4), "far and more"),
        (LayerSpec(96, 40, 12, 65536), "far and more"),
        (LayerSpec(100, 40, 8, 256, 256, num_outlier_centroids=512, outlier_size=4, outlier_vector_len=4), "shorts"),
    ],
)
def test_crossover_class(spec, expected):
    assert stationary.crossover_class(shards(spec)) == expected


def test_crossover_class_of_several_modules_is_that_of_the_largest_book():
    plain, small = shards(LayerSpec(96, 40, 8, 65536)), shards(LayerSpec(96, 40, 8, 256, 256))
    residual = shards(LayerSpec(96, 40, 8, 65536, 4))
    assert stationary.crossover_class(small + plain) == "far"
    assert stationary.crossover_class(residual + plain) == "far and more"
    assert stationary.crossover_class([replace(small[0], segments=())]) == "bytes"  # nothing to look up


def test_crossovers_from_measurements():
    def row(layout: str, name: str, tokens: int, us: float, dense: float, **other: Any) -> dict[str, Any]:
        return dict(layout=layout, format=name, layer="8B o", tokens=tokens, us=us, dense_us=dense, **other)

    rows = [
        # Decoding and a dense product cost 112 us and, from 64 tokens on, a little more; launches 80, 80 + 30, 80 + 80.
        row("stationary", "v8-k65536", 16, 30.0, 12.0),
        row("stationary", "v8-k65536", 64, 80.0, 12.0),
        row("stationary", "v8-k65536", 1024, 150.0, 50.0),
        row("stationary", "v8-k65536", 64, 300.0, 12.0, norm=True),  # never pays with more than 16
        row("stationary", "v8-k65536", 16, 30.0, 12.0, norm=True),
        row("stationary", "v8-k65536", 1024, 150.0, 50.0, norm=True),
        row("stationary", "v8-k256-256", 64, 10.0, 12.0),  # without a row of many tokens
        row("compact", "v6-k4096", 8, 40.0, 10.0),
        row("compact", "v6-k4096", 1024, 80.0, 50.0),
    ]
    assert crossovers([r for r in rows if r.get("norm")]) == {"far": 16}
    assert crossovers([r for r in rows if not r.get("norm")]) == {"compact": 8, "far": 64 + 16}
    assert crossovers(rows) == {"compact": 8, "far": (16 + 80) // 2}


def test_crossovers_take_calls_of_several_launches_where_they_were_measured():
    call = dict(layout="stationary", format="v8-k65536", layer="8B o", dense_us=10.0)
    rows = [dict(call, tokens=t, us=us) for t, us in ((8, 10.0), (64, 40.0), (128, 60.0), (1024, 110.0))]
    assert crossovers(rows) == {"far": 128 + 64}  # 60 + 40; 60 + 60 is more than decoding's 110
    measured = dict(call, tokens=256, us=105.0)
    assert crossovers([*rows, measured]) == {"far": 128 + 64}, "that call may have been decoded"
    assert crossovers([*rows, measured | {"direct": 200}]) == {"far": 128 + 64}
    assert crossovers([*rows, measured | {"direct": 512}]) == {"far": 256}


def test_a_new_row_of_crossovers_says_where_it_was_measured(tmp_path):
    call = dict(layout="stationary", format="v8-k4096", layer="8B o", dense_us=10.0, commit="abc")
    result = {"gpu": "NVIDIA B200", "date": "2027-01-02", "rows": [dict(call, tokens=64, us=0.5)]}
    result["rows"].append(dict(call, tokens=1024, us=40.0))
    (tmp_path / "kernels.json").write_text(json.dumps(result))
    default = {"tokens": {"compact": 5, "shorts": 48, "far": 32}, "assumed": "not measured"}
    measured = {"shorts": "NVIDIA B200, 2027-01-02, abc"}
    before = {"tokens": {"compact": 6, "shorts": 64, "small": 7}, "measured": {"compact": "an older run", "small": ""}}
    for table, tokens, origins in (
        ({}, {"compact": 5, "shorts": 1024, "far": 32}, measured),
        ({"10.0": before}, {"compact": 6, "shorts": 1024, "far": 32}, {"compact": "an older run"} | measured),
    ):
        (tmp_path / "table.json").write_text(json.dumps({"default": default} | table))
        make_crossovers(["10.0", str(tmp_path / "kernels.json"), "--table", str(tmp_path / "table.json")])
        found = json.loads((tmp_path / "table.json").read_text())
        assert found == {"default": default, "10.0": {"tokens": tokens, "measured": origins}}


def test_the_h200s_row_is_what_its_measurements_make_it():
    folder = Path(__file__).parent.parent / "benchmarks" / "results"
    made, compact = (
        crossovers(json.loads((folder / f"crossovers-2026-11-29-{name}.json").read_text())["rows"])
        for name in ("h200", "h200-compact")
    )
    assert made | compact == choice._crossovers()["9.0"]
    assert compact == {"compact": 2} and min(made.values()) >= 128


def test_crossover_where_looking_up_always_pays_or_never():
    call = dict(layout="stationary", format="v8-k4096", layer="8B o", dense_us=10.0)
    slow, quick = (dict(call, tokens=64, us=us) for us in (90.0, 0.5))
    many = dict(call, tokens=1024, us=40.0)
    assert crossovers([slow, many]) == {"shorts": 0}
    assert crossovers([quick, many]) == {"shorts": 1024}


def test_resident_bytes_are_logged_with_the_last_layer(caplog):
    layers = choice.Layers()
    layers.awaited = 2
    with caplog.at_level(logging.INFO, logger=choice.logger.name):
        layers.add("stationary", 1 << 20, [torch.zeros(1 << 17, dtype=torch.int32), None])
        assert not caplog.messages
        layers.add("compact", 1 << 20, [torch.zeros(1 << 18, dtype=torch.uint8)])
    assert caplog.messages == [
        "VPTQ weights: 0.00 GiB in stationary layout (4.00 bits/weight), 0.00 GiB in compact layout (2.00 bits/weight)"
    ]


units = st.lists(
    st.builds(
        Unit,
        job=st.builds(Job, kind=st.sampled_from([Kind.SLICED, Kind.BYTES])),
        rows=st.integers(1, 300),
        grain=st.sampled_from([1, 16]),
        cost=st.floats(1, 1000),
        fill=st.floats(0, 5000),
        tile=st.floats(0, 1000),
        held=st.one_of(st.none(), st.integers(0, 3)),
    ),
    min_size=1,
    max_size=40,
)


@few(200)
@given(units=units, blocks=st.integers(1, 140))
def test_cut_covers_every_row_once(units, blocks):
    units = [Unit(**{**vars(unit), "job": Job(unit.job.kind, out=i)}) for i, unit in enumerate(units)]
    pieces = work.cut(units, blocks)
    assert len(pieces) <= blocks
    jobs = [job for piece in pieces for job in piece]
    assert [job.out for job in jobs] == sorted(job.out for job in jobs)
    for i, unit in enumerate(units):
        rows = [(job.row_begin, job.row_end) for job in jobs if job.out == i]
        assert rows[0][0] == 0 and rows[-1][1] == unit.rows
        assert all(a[1] == b[0] for a, b in itertools.pairwise(rows))
        assert all(lo < hi and lo % unit.grain == 0 for lo, hi in rows)


@pytest.mark.parametrize("where", ["jobs", "decodings"])
def test_a_layer_beyond_the_kernels_offsets_is_an_error(where):
    part, far = work.Part(0, 0, 0, 8, 0, 0), Job(Kind.FAR, codes=1 << 31)
    variant = work.Variant(
        8, [work.Launch([[far if where == "jobs" else Job(Kind.FAR)]])], [work.Module(0, 8, 0, 1)], [part]
    )
    decodings = [work.Decoding(0, far, None, part)] if where == "decodings" else []
    layer = work.LayerWork(True, 106496, 16384, 1024, 5, [variant], decodings, [])
    with pytest.raises(RuntimeError, match=r"106496 x 16384 .*VLLM_VPTQ_LAYOUT=compact"):
        layer.encode(CPU)


def test_cut_is_balanced():
    jobs = work.cut([Unit(Job(Kind.BYTES), rows=1000, grain=1, cost=10.0, fill=100.0)], 100)
    assert len(jobs) == 100
    assert {job.row_end - job.row_begin for (job,) in jobs} == {10}


@pytest.fixture
def calls():
    """Names of the plans of the calls of the CUDA kernels' op, for which a stand-in runs: every output is 7."""
    library = torch.library.Library("vllm_vptq", "IMPL", "CPU")
    plans = []

    def stand_in(x, codes, books, norm, columns, dense, bias, jobs, plan):
        plans.append(plan)
        return x.new_full((*x.shape[:-1], 40), 7.0)

    library.impl("lookup_linear", stand_in)
    yield plans
    library._destroy()


def test_a_layer_on_a_gpu_is_one_node_of_a_graph(calls):
    """Traced with symbolic token counts."""
    made = streams.build(compact.build(shards(), torch.float16, CPU), 96, 132, 16)
    layout, tensors = choice._of("compact", gpu.lookup_linear, made, shards())
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    layer = torch.compile(lambda x: layout.apply(x, None, **tensors) + 1, fullgraph=True, dynamic=True, backend=backend)
    for count in (3, 5, 300):
        y = layer(torch.zeros(count, 96, dtype=torch.float16))
        assert y.shape == (count, 40) and bool((y == 8).all())
    (graph,) = graphs
    nodes = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert nodes[0] is torch.ops.vllm_vptq.lookup_linear.default or str(nodes[0]).startswith("vllm_vptq.lookup_linear")
    assert calls == [gpu.name_of(made.plan)] * 3


def test_lists_of_about_one_length_are_reloaded_in_place():
    """Other weights of a layer with lists, whose sizes are rounded; where they are not the same it is refused."""
    spec = LayerSpec(320, 96, 8, 65536)

    def laid_out(seed: int) -> tuple[choice.LayerLayout, dict[str, Any]]:
        own = [cut_module(random_tensors(spec, seed), spec, (0, 96), (0, 320))]
        made = stationary.build(own, torch.float16, CPU, stationary.Gpu(132, True), 64)
        return choice._of("stationary", gpu.lookup_linear, made, own)

    (before, tensors), (after, others) = laid_out(0), laid_out(7)
    layer, method = torch.nn.Module(), VPTQLinearMethod("layer", [], choice.Layers())
    for name, tensor in tensors.items():
        layer.register_parameter(name, None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False))
    places = layer.codes.data_ptr(), layer.work.data_ptr()
    assert not torch.equal(layer.codes, others["codes"])
    method._replace(layer, before, after, others)
    assert torch.equal(layer.codes, others["codes"]) and torch.equal(layer.work, others["work"])
    assert places == (layer.codes.data_ptr(), layer.work.data_ptr())
    longer = torch.cat([others["codes"], others["codes"][:128]])
    with pytest.raises(VPTQFormatError, match=r"layer.*another layout"):
        method._replace(layer, before, after, others | {"codes": longer})


@pytest.mark.parametrize("shape", [(96,), (0, 96), (5, 96), (2, 3, 96)], ids=str)
def test_opcheck_of_the_gpus_op(shape, calls):
    """Its schema and its fake; the real one is checked on a GPU."""
    made = streams.build(compact.build(shards(), torch.float16, CPU), 96, 132, 16)
    *tensors, jobs = made.tensors().values()
    for bias in (None, torch.zeros(40, dtype=torch.float16)):
        arguments = (torch.zeros(shape, dtype=torch.float16), *tensors, bias, jobs, gpu.name_of(made.plan))
        torch.library.opcheck(torch.ops.vllm_vptq.lookup_linear.default, arguments)
    assert calls


def test_jobs_of_the_compact_layout_cover_the_layer():
    """Every vector row and column of every segment, once; sums of different jobs in different places."""
    spec = LayerSpec(2500, 300, 12, 256, 16, group_num=2, enable_norm=True, enable_perm=True)
    made = streams.build(compact.build(shards(spec), torch.float16, CPU), 2500, 132, 16)
    plan = Plan(made.work.tolist(), made.plan)
    assert not plan.stationary
    (v,) = plan.variants
    (launch,) = v.launches
    assert launch.wide == work.ABSENT and all(len(jobs) == 1 for jobs in launch.jobs)
    covered = torch.zeros(2, 2, 25, 1250, dtype=torch.int32)  # codes, plane, row, column
    places: set[tuple[int, int]] = set()
    jobs = [job for (job,) in launch.jobs if job.kind != Kind.DOT]
    assert all(job.kind == Kind.COMPACT for job in jobs)
    offsets = sorted({job.codes for job in jobs})
    for job in jobs:
        rows, columns = slice(job.row_begin, job.row_end), slice(job.column_begin, job.column_end)
        covered[offsets.index(job.codes), job.plane, rows, columns] += 1
        for row in range(job.row_begin, job.row_end):
            place = (job.out + row * 8, job.column_begin)
            assert place not in places
            places.add(place)
    assert bool((covered == 1).all())
