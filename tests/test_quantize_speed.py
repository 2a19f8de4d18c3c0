"""The benchmark of quantizing, on a block small enough for a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import quantize_speed
from quantize.drift import Original


@pytest.mark.parametrize(
    "options", [["--format", "v4-k32-8", "--check"], ["--bits", "2.5", "--preset", "balanced"]], ids=["format", "bits"]
)
def test_a_block_is_measured(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--shape", "tiny", "--tokens", "1024", "--device", "cpu", "--rounds", "1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["quantize_speed.py", *words, *options])
    given: list[object] = []
    coded = quantize_speed.quantize_block
    monkeypatch.setattr(quantize_speed, "quantize_block", lambda *words: given.append(words[5]) or coded(*words))
    quantize_speed.main()
    assert given and all(isinstance(reference, Original) for reference in given)  # both presets correct for drift
    (file,) = tmp_path.iterdir()
    (row,) = json.loads(file.read_text())
    assert len(row["layers"]) == 7 and all(0 < layer["error"] < 1 for layer in row["layers"])
    assert {"moments", "k-means", "walk", "refinement", "descent", "export"} <= row["steps_s"].keys()
    assert sum(row["steps_s"].values()) == pytest.approx(row["block_s"], rel=0.2, abs=0.3)
    assert row["model_min"] == pytest.approx(row["block_s"] * row["blocks"] / 60, abs=0.06)
    if "--check" in options:
        assert row["checks"]["twice"] == "the same bits" and row["checks"]["cpu"]["within"]


def test_a_format_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quantize_speed.py", "--format", "k256"])
    with pytest.raises(SystemExit, match="v8-k65536"):
        quantize_speed.main()
