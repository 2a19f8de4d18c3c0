"""``python -m benchmarks.serving``: who runs beside whom, whose turn it is, and what happens when an engine fails."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import serving
from benchmarks.serving import Entry, Placed, Run, Turns, plan, waves
from vllm_vptq.bench.results import Results

CARD = 139.8
STARTED = {
    "event": "started", "start_s": 9.5, "weight_gib": 1.5, "kv_cache_tokens": 1000, "device": "Fake",
    "versions": {"vllm": "0.1", "torch": "2.0"},
}  # fmt: skip


def test_the_plan_compares_with_16_and_4_bits_of_the_same_shape():
    entries = plan()
    assert len({entry.name for entry in entries}) == len(entries)
    for model in ("8b", "14b", "70b"):
        formats = {entry.format for entry in entries if entry.model == model}
        assert {"dense", "w4a16"} < formats
    alike = [entry for entry in entries if (entry.model, entry.format) == ("70b", "v8-k65536-0")]
    assert {1, 2, 4} == {entry.tp for entry in alike if entry.layout == "stationary" and 1 in entry.batches}
    goals = {"v8-k65536-0", "v8-k256-256", "v12-k4096-4096", "v8-k65536-256"}
    assert goals <= {entry.format for entry in entries if entry.model == "8b" and {1, 8, 32, 64} <= {*entry.batches}}


@pytest.mark.parametrize("cards", [1, 2, 4])
@pytest.mark.parametrize("per_card", [1, 4])
def test_engines_at_a_time_fit_their_cards(cards, per_card):
    entries = [entry for entry in plan() if entry.tp <= cards]
    made = waves(entries, cards, per_card, CARD)
    assert [placed.entry for wave in made for placed in wave] == entries, "in order"
    for wave in made:
        for card in range(cards):
            here = [placed.entry for placed in wave if card in placed.cards]
            assert len(here) <= per_card and sum(entry.gib + serving.KV_GIB for entry in here) < CARD
            assert len(here) == 1 or not any(entry.room for entry in here)
        assert all(len(placed.cards) == placed.entry.tp for placed in wave)
    assert len(made) == len(entries) or cards * per_card > 1


def test_nobody_measures_beside_one_that_starts_or_measures():
    entry = Entry("8b", "dense", 1.0, (1,))
    wave = [Placed(replace(entry, gib=float(i)), cards) for i, cards in enumerate([(0,), (0,), (1,), (0, 1), (0,)])]
    turns, log, lock = Turns(wave), [], threading.Lock()

    def engine(i: int) -> None:
        time.sleep(0.05 * (5 - i))  # the last to come starts first
        with lock:
            log.append(("started", i))
        turns.wait(wave[i])
        with lock:
            log.append(("begin", i))
        time.sleep(0.05)
        with lock:
            log.append(("end", i))
        turns.done(wave[i])

    threads = [threading.Thread(target=engine, args=(i,), daemon=True) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    measuring: set[int] = set()
    for at, (what, i) in enumerate(log):
        cards = set(wave[i].cards)
        if what == "begin":
            assert not any(cards & set(wave[other].cards) for other in measuring)
            for other, placed in enumerate(wave):
                assert not cards & set(placed.cards) or ("started", other) in log[:at]
            measuring.add(i)
        elif what == "end":
            measuring.remove(i)
    assert [i for what, i in log if what == "begin" and 0 in wave[i].cards] == [0, 1, 3, 4]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Run of tiny models with a shell script for the worker."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(serving, "MODELS", {"8b": "tiny"})
    monkeypatch.setattr(serving.machine, "cards", lambda: ["4", "GPU-7"])

    def make(script: str, limit: float = 20.0) -> Run:
        path = tmp_path / "worker.sh"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        (tmp_path / "models").mkdir(exist_ok=True)
        results = Results(tmp_path / "out.json", serving.SETTINGS)
        return Run(tmp_path / "models", results, Console(), limit, 150 << 30)

    return make


def say(event: dict[str, Any]) -> str:
    return f"echo '{json.dumps(event)}'"


def decode(batch: int) -> str:
    return say({"event": "decode", "batch": batch, "tokens_per_s": 5.0, "ms_per_step": 200.0, "spread": 0.0})


DENSE, CODED = Entry("8b", "dense", 1.0, (1, 8)), Entry("8b", "v8-k256-256", 1.0, (1,), "stationary")
WAVE = [Placed(DENSE, (0,)), Placed(CODED, (0,))]


def test_one_that_fails_or_hangs_costs_itself(run, tmp_path, capsys):
    """The dense model hangs while it starts; the other one waits for its turn, and then measures."""
    good = f"{say(STARTED)}; read line; {decode(1)}; {say({'event': 'done'})}"
    begin = time.monotonic()
    runner = run(f'case "$3" in *dense*) sleep 60;; *) {good};; esac', limit=3.0)
    assert runner.wave(WAVE) is False and 3 <= time.monotonic() - begin < 30
    assert "error: 8b-dense: 8b-dense: no end within 3 s; its log is" in capsys.readouterr().out
    answer = json.loads((tmp_path / "out.json").read_text())
    assert [(row["model"], row["layout"], row["batch"]) for row in answer["rows"]] == [
        ("8b-v8-k256-256", "stationary", 1)
    ]
    assert runner.has(CODED) and not runner.has(DENSE) and not runner.has(replace(CODED, room=True))


def test_engines_get_their_card_layout_and_settings(run, tmp_path):
    job = f'echo "$CUDA_VISIBLE_DEVICES $VLLM_VPTQ_LAYOUT $HF_HUB_OFFLINE $3" > {tmp_path}/job-$CUDA_VISIBLE_DEVICES'
    loaded = "echo 'INFO Model loading took 3.6 GiB and 4.25 seconds' >&2"
    runner = run(f"{job}; {loaded}; {say(STARTED)}; read line; {decode(1)}; {decode(8)}; {say({'event': 'done'})}")
    assert runner.wave([Placed(DENSE, (0,)), Placed(CODED, (1,))])
    card, layout, offline, job = (tmp_path / "job-GPU-7").read_text().split(" ", 3)
    assert (card, layout, offline) == ("GPU-7", "stationary", "1")
    assert json.loads(job)["batches"] == [1] and json.loads(job)["kv_cache_gib"] == serving.KV_GIB
    models = json.loads((tmp_path / "out.json").read_text())["models"]
    assert {row["model"]: (row["load_s"], row["started_at_once"]) for row in models}["8b-dense"] == (4.25, 2)


def test_room_is_asked_with_the_memory_of_a_small_card(run, tmp_path):
    room = replace(CODED, room=True)
    runner = run(f'echo "$3" > {tmp_path}/job; {say(STARTED)}; read line; exit 1')
    assert runner.wave([Placed(room, (0,))])
    job = json.loads((tmp_path / "job").read_text())
    assert job["gpu_memory_utilization"] * (150 << 30) == pytest.approx(0.9 * 24e9, rel=1e-3)
    assert job["kv_cache_gib"] is None
    (found,) = json.loads((tmp_path / "out.json").read_text())["rooms"]
    assert (found["card_gb"], found["kv_cache_tokens"], found["weight_gib"]) == (24.0, 1000, 1.5)
    assert runner.has(room) and not runner.has(CODED)
    assert run("").has(room), "read from the file"


def test_a_full_disk_costs_one_entry(run, tmp_path, monkeypatch, capsys):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    runner = run(f"{say(STARTED)}; read line; {decode(1)}; {decode(8)}; {say({'event': 'done'})}")
    assert runner.wave([WAVE[0]])
    monkeypatch.setattr(serving, "synthesize", full)
    assert not runner.wave(WAVE)
    assert "No space left on device" in capsys.readouterr().out and runner.has(DENSE) and not runner.has(CODED)
