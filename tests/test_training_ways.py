"""benchmarks/training.py: a row of each way is what a whole run with that training gives."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.quality import result
from quantize.recipe import Finetuning, Recipe
from tests.tiny import run

pytest_plugins = ("tests.tiny_fixtures",)


def test_rows_are_those_of_whole_runs(
    tied: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text("{tokens: 2048, context: 64, finetune: {steps: 4, tokens: 128}}")
    words = [str(tied), str(text_file), "--preset", "balanced", "--bits", "4", "--calibration", str(text_file)]
    words += ["--recipe", str(tmp_path / "recipe.yaml"), "--context", "64", "--tokens", "512"]
    ways = {"0": Finetuning(steps=0, tokens=128), "6:256:0.02": Finetuning(steps=6, tokens=256, rate=0.02)}
    results = tmp_path / "results"
    told = ["training", *words, "--results", str(results), *(word for way in ways for word in ("--way", way))]
    monkeypatch.setattr(sys, "argv", told)
    training.main()
    (file,) = results.glob("quality-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["balanced:4, training 0", "balanced:4, training 6:256:0.02"]
    assert rows[0]["divergence"] != rows[1]["divergence"]
    base = Recipe.load(tmp_path / "recipe.yaml", "balanced", bits=4.0, calibration=[str(text_file)])
    for i, (row, finetune) in enumerate(zip(rows, ways.values(), strict=True)):
        out = tmp_path / str(i)
        run(tied, out, base.model_copy(update={"finetune": finetune}))
        asked = argparse.Namespace(model=str(tied), text=str(text_file), context=64, tokens=512)
        whole = result(out, asked, row["name"], "balanced", 0.0, 0.0)
        same = ("recipe", "effective_bits", "perplexity", "divergence", "mean_layer_error")
        assert {key: row[key] for key in same} == {key: whole[key] for key in same}


def test_what_a_way_leaves_out_is_as_the_preset_has_it() -> None:
    preset = Finetuning(steps=100, tokens=512)
    assert training.way("500", preset) == Finetuning(steps=500, tokens=512)
    assert training.way("500:4096", preset) == Finetuning(steps=500, tokens=4096)
    assert training.way("500:4096:0.001", preset) == Finetuning(steps=500, tokens=4096, rate=0.001)
