"""``benchmarks.step``: what is read from a trace, with traces made here, and the command without a GPU."""

from __future__ import annotations

import io
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import step, trace
from benchmarks.synthesize import synthesize
from vllm_vptq import compat
from vllm_vptq.bench import worker
from vllm_vptq.bench.settings import Settings
from vllm_vptq.doctor import machine

LAYERS = 4
WIDE = "void vptq::wide_kernel<__half, 8, (vptq::Kind)2, false>(vptq::Layer, vptq::Tokens)"
FINISH = "void vptq::(anonymous namespace)::finish_kernel<__half, 1, vptq::Few>(vptq::Few, int, int const*)"
FLASH = "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<cute::C<(int)128> > > >(P)"
NORM, HEAD, SAMPLE = "triton_red_fused_add_rms_norm_0", "nvjet_sm90_hsh_384x8", "_gumbel_sample_kernel"


class Clock:
    """Kernels one after the other; a negative ``late`` overlaps the one before."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [{"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 9}]
        self.end = 1000.0

    def add(self, name: str, lasts: float, late: float = 0.0, cat: str = "kernel") -> None:
        begin = self.end + late
        self.events.append({"cat": cat, "name": name, "ts": begin, "dur": lasts, "args": {"grid": [2, 1, 1]}})
        self.end = max(self.end, begin + lasts)

    def layer(self, wide: float = 20.0) -> None:
        """``wide`` + 20 us: 5 + 1 idle, 10, wide, 4 of 15."""
        self.add(NORM, 5, 1)
        self.add(FLASH, 10)
        self.add(WIDE, wide, -3)
        self.add(FINISH, 15, 7 - 15)
        self.add(WIDE, 1)
        self.add(FINISH, 4, -1)

    def step(self, wide: float = 20.0, idle: float = 30.0, copies: int = 0) -> None:
        self.add("gather_kernel", 2, idle)
        for _ in range(LAYERS):
            self.layer(wide)
        self.add(HEAD, 50)
        for _ in range(copies):
            self.add("Memcpy HtoD (Pageable -> Device)", 1, cat="gpu_memcpy")
        self.add(SAMPLE, 3)


def decoding(steps: int = 12) -> list[dict[str, Any]]:
    """A prefill with kernels of its own, then steps, one of them disturbed, two with copies; in no order."""
    clock = Clock()
    clock.add("gather_kernel", 2)
    for _ in range(LAYERS):
        clock.add(NORM, 9)
        clock.add("void vptq::decode_kernel<__half>(int)", 90)
        clock.add("void cutlass::Kernel2<cutlass_80_gemm>(P)", 50)
    clock.add(HEAD, 60)
    clock.add(SAMPLE, 3)
    for i in range(steps):
        clock.step(idle=900 if i == 4 else 30, copies=2 if i in (3, 7) else 0)
    random.Random(0).shuffle(clock.events)
    return clock.events


@pytest.mark.parametrize(
    ("name", "expected", "kind"),
    [
        (FINISH, "finish_kernel", "ours"),
        (WIDE, "wide_kernel", "ours"),
        ("vptq::prepare_kernel<__half>(vptq::Layer)", "prepare_kernel", "ours"),
        (FLASH, "FlashAttnFwdSm90", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel<unsigned short, (vllm::T)0>(int)", "reshape_and_cache_flash_kernel",
         "attention"),
        (HEAD, HEAD, "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>(cublasLt::P)", "splitKreduce_kernel", "products"),
        ("triton_poi_fused_lookup_linear_mul_1", "triton_poi_fused_lookup_linear_mul_1", "Triton"),
        ("std::enable_if<((8)>(0)) && true, void>::type vllm::fused_add_rms_norm_kernel<c10::Half, 8>(c10::Half*)",
         "fused_add_rms_norm_kernel", "others"),
        ("void at::native::reduce_kernel<512, at::F<float, at::g(at::T&)::{lambda(int)#1}> >(at::F)", "reduce_kernel",
         "others"),
        (SAMPLE, SAMPLE, "others"),
    ],
)  # fmt: skip
def test_names(name, expected, kind):
    assert (trace.short(name), trace.kind(name)) == (expected, kind)


def test_names_of_copies():
    assert trace.short("Memcpy HtoD (Pageable -> Device)") == "Memcpy HtoD"
    assert trace.kind("Memset (Device)", "gpu_memset") == "copies"


def test_overlapping_kernels_share_no_time():
    clock = Clock()
    clock.layer()
    found = trace.kernels(clock.events)
    assert [k.name for k in found][:4] == [NORM, "FlashAttnFwdSm90", "wide_kernel", "finish_kernel"]
    assert [k.own for k in found] == pytest.approx([5, 10, 17, 7, 1, 3])
    assert [k.late for k in found] == pytest.approx([0, 0, -3, -8, 0, -1])
    hidden = trace.kernels([
        {"cat": "kernel", "name": "a", "ts": 0, "dur": 10},
        {"cat": "kernel", "name": "b", "ts": 2, "dur": 3},
        {"cat": "kernel", "name": "c", "ts": 12, "dur": 1},
    ])  # fmt: skip
    assert [(k.own, k.idle) for k in hidden] == [(10, 0), (0, 0), (1, 2)]


def test_steps_are_found():
    found = trace.kernels(decoding())
    steps = trace.steps(found, LAYERS)
    # From one head to the next, so that the prefill's own, 10 us longer, belongs to the first step.
    assert len(steps) == 12
    for one in steps:
        assert sum(k.name == NORM for k in one) == LAYERS and sum(k.name == HEAD for k in one) == 1
    usual = 30 + 2 + LAYERS * (1 + 5 + 10 + 17 + 7 + 1 + 3) + 50 + 3
    assert sorted(map(trace.span, steps)) == pytest.approx([usual] * 9 + [usual + 2, usual + 10, usual + 872])
    assert list(map(trace.span, trace.middle(steps))) == pytest.approx([usual] * 6)


def test_a_kernel_of_every_other_layer_is_no_step():
    """Its pieces are alike but for the one with the head, more often than steps are, and hold as many products as
    the model has layers."""
    clock = Clock()
    for _ in range(8):
        clock.add("gather_kernel", 2, 5)
        for i in range(8):
            if i % 2 == 0:
                clock.add("global_attention", 7)
            for _ in range(4):
                clock.add(WIDE, 10)
            clock.add(NORM, 3)
        clock.add(HEAD, 20)
    steps = trace.steps(trace.kernels(clock.events), 8)
    assert len(steps) == 7 and all(sum(k.name == HEAD for k in one) == 1 for one in steps)


@pytest.mark.parametrize("events", [[], decoding(0), decoding(2)], ids=["nothing", "prefill", "too few"])
def test_a_trace_without_steps(events):
    with pytest.raises(trace.TraceError, match=f"no steps of {LAYERS} layers among the"):
        trace.steps(trace.kernels(events), LAYERS)


def test_another_number_of_layers_is_no_step():
    with pytest.raises(trace.TraceError):
        trace.steps(trace.kernels(decoding()), LAYERS + 1)


def test_the_summary_adds_up():
    row = step.summary(decoding(), LAYERS)
    assert sum(k["us"] for k in row["kernels"]) + row["idle_us"] == pytest.approx(row["profiled_us"], abs=0.1)
    by_name = {k["name"]: k for k in row["kernels"]}
    assert by_name["wide_kernel"] == {
        "kind": "ours", "name": "wide_kernel", "calls": 8, "us": 72,
        "share": pytest.approx(72 / row["profiled_us"], abs=1e-3),
    }  # fmt: skip
    assert [k["kind"] for k in row["kernels"]] == sorted((k["kind"] for k in row["kernels"]), key=trace.KINDS.index)
    # A layer, from its norm to the next one's.
    assert [k["name"] for k in row["layer"]] == [NORM, "FlashAttnFwdSm90", *["wide_kernel", "finish_kernel"] * 2]
    assert row["layer_us"] == 44 and row["layer"][2] == {
        "kind": "ours", "name": "wide_kernel", "grid": "2x1x1", "begins_us": 12, "lasts_us": 20, "late_us": -3,
        "own_us": 17,
    }  # fmt: skip


def test_the_layer_is_the_median_one():
    clock = Clock()
    for i in range(8):
        clock.step(wide=20 + i)
    steps = trace.steps(trace.kernels(clock.events), LAYERS)
    assert trace.span(trace.layer(steps, LAYERS)) == pytest.approx(44 + 3, abs=1)


def test_tables():
    row = {"model": "llama[v8]", "batch": 1, "ms_per_step": 0.25} | step.summary(decoding(), LAYERS)
    console = Console(file=io.StringIO(), width=120)
    step.show(row, console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert any(line.startswith("llama[v8], batch 1: 0.250 ms a step") for line in lines)
    assert any(line.split()[:3] == ["wide_kernel", "8", "72.0"] for line in lines)
    assert any(line.startswith("nothing runs") for line in lines)


@pytest.mark.parametrize("name", ["dense", "w4a16", "v8-k256-0"])
def test_models_are_of_the_kind_they_say(tmp_path, name):
    found = step.contestant(synthesize(tmp_path / "model", "tiny", name, layers=1))
    assert found.kind == (name if name in ("dense", "w4a16") else "vptq")


@pytest.mark.parametrize(("setting", "expected"), [(None, (True, False)), ("0", (False, False)), ("1", (True, True))])
def test_which_kernels_overlap(tmp_path, monkeypatch, setting, expected):
    """Unless the variable decides, the plugin lets them, for its own models, where they can."""
    monkeypatch.setattr(compat, "overlaps_by_default", lambda: True)
    monkeypatch.delenv("TORCHINDUCTOR_ENABLE_PDL", raising=False)
    if setting:
        monkeypatch.setenv("TORCHINDUCTOR_ENABLE_PDL", setting)
    names = "v8-k256-0", "dense"
    models = [step.contestant(synthesize(tmp_path / name, "tiny", name, layers=1)) for name in names]
    assert tuple(map(step.overlaps, models)) == expected


def test_without_a_gpu_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "gpus", tuple)
    app = step.typer.Typer()
    app.command()(step.main)
    done = CliRunner().invoke(app, [str(synthesize(tmp_path / "model", "tiny", "dense"))])
    assert done.exit_code == 1 and done.output.startswith("error: a step is profiled on a GPU")
    assert done.output.count("\n") == 1


def test_rows_are_written(tmp_path, monkeypatch):
    """With an engine that takes 3 ms a step, and traces from above."""
    engine = SimpleNamespace(
        seconds=lambda batch, length, steps: 0.1 + 0.003 * steps,
        config=SimpleNamespace(model_config=SimpleNamespace(dtype="torch.float16")),
        device="NVIDIA H100 80GB HBM3",
        versions={"vllm": "0.1", "torch": "2.0"},
    )
    monkeypatch.setattr(machine, "gpus", lambda: ("a GPU",))
    monkeypatch.setattr(worker, "Engine", lambda *_: engine)
    monkeypatch.setattr(step, "layer_count", lambda _: LAYERS)
    monkeypatch.setattr(step, "profile", lambda *_: decoding())
    monkeypatch.setenv("TORCHINDUCTOR_ENABLE_PDL", "1")
    monkeypatch.setenv("VLLM_VPTQ_LAYOUT", "aligned")
    folder, out = synthesize(tmp_path / "llama", "tiny", "v8-k256-0"), tmp_path / "step.json"
    for batches in ((1, 8), (8,)):
        step.run(folder, Settings(batches=batches, prompt_tokens=0), out, Console(file=io.StringIO()))
    answer = json.loads(out.read_text())
    assert answer["gpu"] == engine.device and answer["versions"] == engine.versions
    assert [row["batch"] for row in answer["rows"]] == [1, 8]
    for row in answer["rows"]:
        assert (row["model"], row["format"], row["layout"], row["pdl"]) == ("llama", "v8-k256-0", "aligned", True)
        assert row["ms_per_step"] == pytest.approx(3) and row["layer_us"] == 44 and len(row["layer"]) == 6
