"""``vllm-vptq bench``: the arithmetic, the file, worker processes however they end, and one engine for real."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.synthesize import synthesize
from tests.engines import vllm_environment
from tests.tiny import ROOT
from vllm_vptq import cli
from vllm_vptq.bench import checkout, process, table
from vllm_vptq.bench.results import Results, default_path
from vllm_vptq.bench.settings import BenchError, Contestant, Settings, contestants
from vllm_vptq.bench.worker import measure
from vllm_vptq.doctor import machine

SMALL = Settings(batches=(1, 4), steps=32, prompt_tokens=64, repeats=3)
STARTED = {
    "event": "started", "start_s": 9.5, "weight_gib": 1.5, "kv_cache_tokens": 1000, "device": "Fake",
    "versions": {"vllm": "0.1", "torch": "2.0"},
}  # fmt: skip


def decode(batch: int, speed: float) -> dict[str, Any]:
    return {"event": "decode", "batch": batch, "tokens_per_s": speed, "ms_per_step": batch * 1e3 / speed, "spread": 0.0}


@pytest.fixture(autouse=True)
def logs_in_the_tests_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of failed workers: they stay for the user to read."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    names = {"vptq": "v8-k256-0", "dense": "dense", "w4a16": "w4a16"}
    return {kind: synthesize(tmp_path / kind, "tiny", name, layers=1) for kind, name in names.items()}


@pytest.fixture
def fake_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes a shell script stand for the worker."""

    def make(script: str) -> Path:
        path = tmp_path / "worker.sh"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return path

    return make


def line(event: dict[str, Any]) -> str:
    return f"echo '{json.dumps(event)}'"


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def test_what_every_run_pays_once_cancels():
    """Runs that cost 50 ms, 1 ms a prompt token and 4 ms + 0.5 ms a sequence a step, and hiccup once in a while."""
    noise, runs = random.Random(0), []

    def seconds(batch: int, length: int, steps: int) -> float:
        runs.append((batch, length, steps))
        hiccup = 5.0 if noise.random() < 0.2 else 0.0
        return 0.05 + 0.001 * batch * length + steps * (0.004 + 0.0005 * batch) + hiccup

    events = list(measure(Settings(batches=(1, 4), steps=32, prompt_tokens=64, repeats=7), seconds))
    assert [e["event"] for e in events] == ["first_token", "decode", "decode"]
    assert events[0]["first_token_ms"] == pytest.approx(50 + 64 + 4.5)
    assert [e["ms_per_step"] for e in events[1:]] == pytest.approx([4.5, 6])
    assert [e["tokens_per_s"] for e in events[1:]] == pytest.approx([1 / 0.0045, 4 / 0.006], rel=1e-4)
    assert {run for run in runs if run[0] == 4} == {(4, 16, 32), (4, 16, 2)}
    without = list(measure(Settings(batches=(2,), prompt_tokens=0), seconds))
    assert [e["event"] for e in without] == ["decode"]


def test_lengths_decide_the_context():
    assert Settings().model_len == 2049 and Settings(prompt_tokens=0).model_len == 144
    Settings(max_model_len=2049).check()
    with pytest.raises(BenchError, match=r"\A--max-model-len 2048 is too short .* at least 2049\Z"):
        Settings(max_model_len=2048).check()


def test_contestants_know_their_format(folders, monkeypatch):
    monkeypatch.setenv("VLLM_VPTQ_LAYOUT", "compact")
    found = contestants([folders["vptq"]], folders["dense"], folders["w4a16"])
    assert [(c.kind, c.format, c.load_format, c.layout) for c in found] == [
        ("dense", "float16", "dummy", None),
        ("w4a16", "w4a16-g128", "dummy", None),
        ("vptq", "v8-k256-0", "auto", "compact"),
    ]
    assert found[2].title == "vptq (v8-k256-0, compact)"
    config = json.loads((folders["vptq"] / "config.json").read_text())
    layers = config["quantization_config"]["config_for_layers"]
    layers["model.layers.0.mlp.up_proj"]["num_res_centroids"] = [-1, 4]
    (folders["vptq"] / "config.json").write_text(json.dumps(config))
    assert Contestant.find(folders["vptq"], "vptq").format == "v8-k256-0 and 1 more"


# ---------------------------------------------------------------------------------------------------------------
# Worker processes


def test_events_come_as_they_happen_and_nothing_stays(fake_worker, folders, tmp_path):
    """The worker leaves a child behind, as a broken engine does."""
    fake_worker(
        f"{line(STARTED)}\nsleep 600 & echo $! > {tmp_path}/pid\n{line(decode(1, 5))}\n{line({'event': 'done'})}"
    )
    (contestant,) = contestants([folders["vptq"]], None, None)
    events = process.run(contestant, SMALL)
    assert next(events)["event"] == "started" and next(events)["batch"] == 1
    assert next(events, None) is None
    assert not alive(int((tmp_path / "pid").read_text()))


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_job_reaches_the_worker(fake_worker, folders, tmp_path):
    fake_worker(f'echo "$3" > {tmp_path}/job; {line({"event": "done"})}')
    assert list(process.run(contestants([], folders["dense"], None)[0], SMALL)) == []
    job = json.loads((tmp_path / "job").read_text())
    assert (job["model"], job["load_format"], job["batches"]) == (str(folders["dense"]), "dummy", [1, 4])


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "echo '(pid=1) ERROR VPTQFormatError: x: no book\nRuntimeError: see above' >&2",
            "VPTQFormatError: x: no book",
        ),
        (
            "echo 'a.ValidationError: 1 validation error for Config\n  Value error, 9 is more than 8.5 (x.y). Do so. "
            "[type=value_error, input=1]' >&2",
            r"a.ValidationError: 1 validation error for Config: 9 is more than 8.5 \(x.y\)",
        ),
        ("echo killed by something >&2; exit 137", "killed by something"),
        ("exit 3", "ended without a word"),
    ],
)
def test_a_worker_that_fails_is_one_line(fake_worker, folders, script, words):
    fake_worker(script)
    (contestant,) = contestants([folders["vptq"]], None, None)
    with pytest.raises(BenchError, match=rf"\Avptq: {words}; its log is \S+\.log\Z") as error:
        list(process.run(contestant, SMALL))
    assert Path(str(error.value).rpartition(" ")[2]).exists()


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "argv", ["vllm-vptq", "bench", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_a_failure_does_not_stop_the_others(fake_worker, folders, tmp_path, monkeypatch, capsys):
    good = "; ".join(map(line, (STARTED, decode(1, 50.0), decode(8, 300.0), {"event": "done"})))
    fake_worker(f'case "$3" in *w4a16*) echo "ValueError: no kernel" >&2;; *) {good};; esac')
    code = call(
        monkeypatch, folders["vptq"], "--dense", folders["dense"], "--w4a16", folders["w4a16"], "--batches", "1,8",
        "--out", tmp_path / "out.json",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 1 and "error: w4a16: ValueError: no kernel; its log is" in out and "300 (1.00x)" in out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["model"], row["batch"]) for row in rows] == [("dense", 1), ("dense", 8), ("vptq", 1), ("vptq", 8)]


def test_a_killed_run_keeps_what_it_measured_and_ends_its_worker(folders, tmp_path):
    worker, out = tmp_path / "worker.sh", tmp_path / "out.json"
    worker.write_text(
        f"#!/bin/sh\n{line(STARTED)}\n{line(decode(1, 50.0))}\necho $$ > {tmp_path}/pid\nexec sleep 600\n"
    )
    worker.chmod(0o755)
    code = f"import sys; sys.executable = {str(worker)!r}; from vllm_vptq.cli import main; main()"
    run = subprocess.Popen(
        [sys.executable, "-c", code, "bench", str(folders["vptq"]), "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    for _ in range(300):
        if out.exists() and json.loads(out.read_text())["rows"]:
            break
        time.sleep(0.1)
    run.terminate()
    assert run.wait(60) == 128 + signal.SIGTERM
    assert json.loads(out.read_text())["rows"][0]["tokens_per_s"] == 50.0
    assert not alive(int((tmp_path / "pid").read_text()))


# ---------------------------------------------------------------------------------------------------------------
# Results


def measured(path: Path, folders: dict[str, Path], speed: float = 100.0, settings: Settings = SMALL) -> Results:
    results = Results(path, settings)
    for contestant, factor in zip(contestants([folders["vptq"]], folders["dense"], None), (1.0, 2.0), strict=True):
        first = {"event": "first_token", "first_token_ms": 10 * factor}
        for event in (
            STARTED | {"weight_gib": 3 / factor},
            first,
            decode(1, speed * factor),
            decode(4, 3 * speed * factor),
        ):
            results.add(contestant, settings.tp, event)
    return results


def test_rows_have_what_a_comparison_needs(folders, tmp_path):
    measured(tmp_path / "a" / "out.json", folders)
    answer = json.loads((tmp_path / "a" / "out.json").read_text())
    assert answer["rows"][3] == {
        "model": "vptq", "shape": "1 layers of 256",
        "format": "v8-k256-0", "kind": "vptq", "dtype": "float16", "layout": "auto", "tp": 1, "batch": 4,
        "tokens_per_s": 600.0, "ms_per_step": pytest.approx(4e3 / 600), "spread": 0.0, "weight_gib": 1.5,
    }  # fmt: skip
    assert answer["models"][0]["first_token_ms"] == 10 and answer["models"][0]["kv_cache_tokens"] == 1000
    assert answer["versions"].keys() == {"vllm_vptq", "vllm", "torch"} and {"gpu", "driver", "method"} <= answer.keys()
    assert answer["settings"]["steps"] == 32


def test_a_file_is_continued(folders, tmp_path):
    path = tmp_path / "out.json"
    measured(path, folders)
    twice = Settings(tp=2, batches=(1,), steps=32, prompt_tokens=64, repeats=3)
    measured(path, folders, speed=150.0, settings=twice)
    results = measured(path, folders, speed=200.0)
    assert [(m["model"], m["tp"]) for m in results.models] == [("dense", 2), ("vptq", 2), ("dense", 1), ("vptq", 1)]
    rows = json.loads(path.read_text())["rows"]
    assert {(r["model"], r["tp"], r["batch"]): r["tokens_per_s"] for r in rows}["dense", 1, 4] == 600.0 and len(
        rows
    ) == 8
    assert results.dense(results.rows, rows[-1])["tp"] == 1


def test_results_name_their_commits(folders, tmp_path, monkeypatch):
    """Of a file that is continued all; of one without any nothing is said."""
    path = tmp_path / "out.json"
    for now, expected in [
        (None, None),
        ("abc", "unknown, abc"),
        ("abc", "unknown, abc"),
        ("def-dirty", "unknown, abc, def-dirty"),
        (None, "unknown, abc, def-dirty"),
    ]:
        monkeypatch.setattr(checkout, "commit", lambda now=now: now)
        measured(path, folders)
        assert json.loads(path.read_text()).get("commit") == expected


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    return subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    assert checkout.commit() is None
    git(tmp_path, "init")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "no commit's name")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert checkout.commit() == commit
    (tmp_path / "file").write_text("b")
    assert checkout.commit() == f"{commit}-dirty"
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(checkout, "ROOT", tmp_path / "site-packages")
    assert checkout.commit() is None  # that of what it is installed into
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout.commit() is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda old: old | {"gpu": "NVIDIA H100"}, "was measured with another gpu (NVIDIA H100); choose another --out"),
        (
            lambda old: old | {"settings": old["settings"] | {"steps": 7, "repeats": 9}},
            "was measured with other settings (steps 7, repeats 9); choose another --out",
        ),
        (lambda old: old | {"versions": {"vllm": "0.2"}}, "was measured with vllm 0.2, not 0.1; choose another --out"),
        (lambda old: old | {"versions": {"vllm_vptq": "0.0"}}, "was measured with vllm_vptq 0.0, not 0"),
        (lambda old: {"rows": []}, "is no result file of this command"),
    ],
)
def test_files_that_cannot_be_continued(folders, tmp_path, change, words):
    path = tmp_path / "out.json"
    measured(path, folders)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    before = path.read_text()
    with pytest.raises(BenchError) as error:
        measured(path, folders)
    assert words in str(error.value) and path.read_text() == before


def test_tables_compare_with_the_dense_model(folders, tmp_path):
    console = Console(width=150, record=True)
    table.show(measured(tmp_path / "out.json", folders), console)
    out = console.export_text()
    assert "600 (2.00x)" in out and "1.50 (0.50x)" in out and "20.0 (2.00x)" in out and "(1.00x)" in out
    assert "batch 1 " in out and out.count("dense ") >= 2


def test_models_of_another_shape_are_not_compared(folders, tmp_path):
    results = measured(tmp_path / "out.json", folders)
    deeper = Contestant.find(synthesize(tmp_path / "deeper", "tiny", "v8-k256-0", layers=2), "vptq")
    results.add(deeper, 1, STARTED)
    results.add(deeper, 1, decode(1, 50.0))
    assert results.dense(results.rows, results.rows[-1]) is None is results.dense(results.models, results.models[-1])


def test_picture(folders, tmp_path):
    pytest.importorskip("matplotlib")
    from vllm_vptq.bench import plot

    plot.draw(measured(tmp_path / "out.json", folders), tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    assert text.count("<svg") == 1 and "Decoding" in text and "vptq (v8-k256-0)" in text


def test_default_path_names_the_gpu(monkeypatch):
    monkeypatch.setattr(machine, "nvidia_smi", lambda: [("NVIDIA RTX 6000 Ada", "580.1")])
    assert default_path().name.endswith("-rtx-6000-ada.json") and default_path().name.startswith("serving-2")
    monkeypatch.setattr(machine, "nvidia_smi", list)
    assert default_path().name.endswith("-cpu.json")


# ---------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "nothing to measure"),
        (["absent"], "absent: no such directory"),
        (["dense"], "no VPTQ configuration"),
        (["--dense", "vptq"], "--dense takes a model without one"),
        (["--w4a16", "vptq"], "no compressed-tensors model of one integer scheme"),
        (["vptq", "vptq"], "vptq: two directories of this name"),
        (["vptq", "--batches", "1,x"], "--batches 1,x: expected different positive numbers"),
        (["vptq", "--batches", "8,8"], "--batches 8,8: expected"),
        (["vptq", "--max-model-len", "100"], "--max-model-len 100 is too short"),
        (["vptq", "--out", "file/out.json"], "cannot write file/out.json"),
    ],
)
def test_mistakes_are_one_line(folders, tmp_path, monkeypatch, capsys, words, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert call(monkeypatch, *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and match in error


@pytest.mark.vllm
def test_an_engine(tmp_path):
    """A synthesized checkpoint, served, measured, written down."""
    folder = synthesize(tmp_path / "tiny", "tiny", "v12-k4096-4096", perm=True)
    command = [sys.executable, "-m", "vllm_vptq.cli", "bench", str(folder), "--out", str(tmp_path / "out.json")]
    command += ["--batches", "1,3", "--steps", "24", "--prompt-tokens", "40", "--repeats", "3", "--enforce-eager"]
    environment = os.environ | vllm_environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((tmp_path / "out.json").read_text())
    (model,) = answer["models"]
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
    assert model["weight_gib"] == pytest.approx(stored, rel=0.05)
    assert model["kv_cache_tokens"] > 64 and model["start_s"] > 0 and model["first_token_ms"] > 0
    assert [row["batch"] for row in answer["rows"]] == [1, 3]
    for row in answer["rows"]:
        assert (
            row["tokens_per_s"] == pytest.approx(row["batch"] * 1e3 / row["ms_per_step"], rel=1e-2)
            and row["ms_per_step"] > 0
        )
