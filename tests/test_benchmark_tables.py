"""The tables that go into the documents: memory from shapes, serving from results."""

from __future__ import annotations

import pytest

from benchmarks import memory, quality, serving_tables
from benchmarks.shapes import SHAPES
from benchmarks.synthesize import synthesize


@pytest.mark.parametrize("format_name", ["v8-k256-256", "v6-k4096-0", "v12-k4096-4096", "v8-k65536-0"])
def test_the_compact_layout_takes_what_the_checkpoint_does(tmp_path, format_name):
    synthesize(tmp_path / "out", "tiny", format_name)
    compact = memory.weights(SHAPES["tiny"], format_name)["compact"]
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert compact == pytest.approx(size, rel=0.02)


def test_figures_that_were_measured_on_a_gpu():
    """GiB on an H200 (benchmarks/results/serving-2026-11-22-h200.json, synthesized without norms)."""
    shape = SHAPES["Llama-3.1-8B"]
    assert memory.weights(shape, "v8-k65536")["stationary"] / 2**30 == pytest.approx(7.267, rel=0.005)
    assert memory.weights(shape, "v8-k256-256")["stationary"] / 2**30 == pytest.approx(3.592, rel=0.005)
    assert memory.rivals(shape)["16 bits"] / 2**30 == pytest.approx(14.958, rel=0.001)


def test_a_70b_model_in_2_bits_is_what_it_promises():
    assert memory.weights(SHAPES["Llama-3.1-70B"], "v8-k65536")["compact"] <= 22e9


MODEL = {"model": "m", "shape": "48 layers of 5120", "format": "float16", "kind": "dense", "dtype": "float16",
         "layout": None, "tp": 1, "weight_gib": 27.5, "load_s": 1.0, "first_token_ms": 50.0}  # fmt: skip
CODED = MODEL | {"model": "v", "format": "v8-k256-256", "kind": "vptq", "layout": "stationary", "weight_gib": 6.0,
                 "load_s": 11.6, "first_token_ms": 60.0}  # fmt: skip


def test_serving_tables():
    rows = [MODEL | {"batch": 1, "tokens_per_s": 100.0}, CODED | {"batch": 1, "tokens_per_s": 150.0}]
    rooms = [MODEL | {"card_gb": 24.0, "kv_cache_tokens": 1000}, CODED | {"card_gb": 24.0, "kv_cache_tokens": 5000}]
    results = {"gpu": "NVIDIA H200", "models": [MODEL, CODED], "rows": rows, "rooms": rooms}
    lines = serving_tables.tables(results).splitlines()
    assert "| v8-k256-256, `stationary` | 1 | 6.0 | 12 s | 60 ms (1.20x) | 150 (1.50x) |" in lines
    assert "| float16 | 1 | 27.5 |  | 50 ms | 100 |" in lines
    assert "| VPTQ v8-k256-256 | 5.2 (reference implementation) | 150 |" in lines
    assert "| Ollama q5_0 | 14.3 | |" in lines and "| float16 | | 100 |" in lines
    assert "| v8-k256-256, `stationary` | 6.0 GiB | 5,000 tokens (5.00x) |" in lines


def test_quality_tables():
    """By bits, and beside the paper's row for the same text at the same bits where there is one."""
    row = {"model": "m", "text": "t", "context": 8, "tokens": 80, "original_perplexity": 2.0, "quantize_s": 3.4}
    row |= {"name": "paper:2", "method": "paper", "effective_bits": 2.01, "perplexity": 4.0, "excess": 0.6931}
    row |= {"divergence": 0.7}
    best = row | {"name": "best:2", "method": "best", "effective_bits": 1.99, "perplexity": 2.6, "excess": 0.2624}
    fine = best | {"name": "best:3", "effective_bits": 3.0}
    other = best | {"text": "u"}
    lines = quality.table([fine, row, best, other]).splitlines()
    assert lines[2:4] == [
        "| paper:2 | 2.010 | 4.00 | 0.693 |  | 0.700 | 3 |",
        "| best:2 | 1.990 | 2.60 | 0.262 | 62 % | 0.700 | 3 |",
    ]
    assert [line.split("|")[5].strip() for line in lines[4:]] == ["", ""]
