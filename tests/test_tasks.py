"""Tasks of the LM Evaluation Harness: what it is asked for, and where it is installed, what it answers."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quantize import evaluate
from quantize.cli import app
from quantize.errors import QuantizeError
from quantize.evaluate import load_any
from quantize.tasks import require_harness, served_task_scores, task_scores
from tests.engines import vllm_environment
from tests.tiny import FINE, command, make_model, one_line, run

pytest_plugins = ("tests.tiny_fixtures",)
CPU = torch.device("cpu")


class Harness:
    """lm_eval and vllm as modules that are not there; keeps what they are asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.stopped = 0
        self.fails: dict[str, Exception] = {}
        self.dead = type("EngineDeadError", (Exception,), {})
        core = types.SimpleNamespace(shutdown=self._stop)
        for name, members in {
            "lm_eval": {"simple_evaluate": self._evaluate},
            "lm_eval.models": {},
            "lm_eval.models.huggingface": {"HFLM": self._model},
            "lm_eval.models.vllm_causallms": {"VLLM": self._model},
            "vllm": {"__spec__": object()},
            "vllm.v1": {},
            "vllm.v1.engine": {},
            "vllm.v1.engine.exceptions": {"EngineDeadError": self.dead},
        }.items():
            module = types.ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
        self._engine = types.SimpleNamespace(llm_engine=types.SimpleNamespace(engine_core=core))
        for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_STREAM", "VLLM_LOGGING_LEVEL"):
            monkeypatch.setenv(name, "")  # so that it is put back
            monkeypatch.delenv(name)

    def _stop(self) -> None:
        self.stopped += 1

    def _model(self, **options: Any) -> Any:
        self.asked.append(options)
        if "model" in self.fails:
            raise self.fails["model"]
        return types.SimpleNamespace(model=self._engine)

    def _evaluate(self, model: Any, tasks: list[str], limit: int | None) -> dict[str, Any]:
        self.asked.append((tasks, limit))
        if tasks[0] in self.fails:
            raise self.fails[tasks[0]]
        other = {
            "alias": "other",
            "bleu,none": 1.0,
            "bleu_stderr,none": 0.1,
            "bits,flexible": 2,
            "chrf_stderr,none": "N/A",
        }
        return {"results": {"piqa": {"acc,none": 0.5, "acc_norm,none": 0.75}, "other": other}}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    return Harness(monkeypatch)


FOUND = {"piqa": 0.75, "other bleu": 1.0, "other bits (flexible)": 2.0}


def test_in_transformers_the_model_that_is_loaded_is_asked(harness: Harness) -> None:
    model: Any = object()
    assert task_scores(model, "tokenizer", ["piqa", "other"], 5, 8) == FOUND
    options = {"pretrained": model, "tokenizer": "tokenizer", "batch_size": 8}
    assert harness.asked == [options, (["piqa", "other"], 5)]
    harness.fails = {"absent": KeyError("absent"), "far": ConnectionError("Couldn't reach\n'far' on the Hub")}
    for task, reason in ("absent", "tasks absent: 'absent'"), ("far", "tasks far: Couldn't reach 'far' on the Hub"):
        with pytest.raises(QuantizeError, match=reason):
            task_scores(model, "tokenizer", [task], None)


def test_in_vllm_the_checkpoint_is_asked_by_its_name(harness: Harness, tied: Path) -> None:
    assert served_task_scores(str(tied), ["piqa", "other"], 5, "bfloat16", True) == FOUND
    options = {"pretrained": str(tied), "dtype": "bfloat16", "max_model_len": 256, "trust_remote_code": True}
    assert harness.asked == [options | {"batch_size": "auto"}, (["piqa", "other"], 5)]
    assert harness.stopped == 1 and os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    harness.fails = {"absent": KeyError("absent"), "long": harness.dead("see above")}
    for task, reason in ("absent", "tasks absent: 'absent'"), ("long", f"vLLM stopped on {tied}: see above"):
        with pytest.raises(QuantizeError, match=reason):
            served_task_scores(str(tied), [task], None)
    assert harness.stopped == 3  # or the next engine would find its memory taken
    harness.fails = {"model": RuntimeError("Engine core\n initialization failed")}
    with pytest.raises(QuantizeError, match=f"vLLM does not take {tied}: Engine core initialization failed"):
        served_task_scores(str(tied), ["piqa"], None)


def test_requests_in_vllm_are_no_longer_than_its_cache_has_room_for(harness: Harness, tmp_path: Path) -> None:
    served_task_scores(str(make_model(tmp_path / "long", max_position_embeddings=131072)), ["piqa"], None)
    assert harness.asked[0]["max_model_len"] == 4096


def test_what_is_missing_is_named(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ("transformers", "vllm"):
        require_harness(engine)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(QuantizeError, match=r'needs vLLM: pip install -e "\.\[gpu\]" in the checkout.*, or cpu'):
        require_harness("vllm")
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__spec__=object()))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("lm_eval.models.huggingface", "lm_eval.models.vllm_causallms"):
        monkeypatch.delitem(sys.modules, name)
    for engine in ("transformers", "vllm"):
        with pytest.raises(QuantizeError, match=r'pip install -e "\.\[eval\]" in the checkout'):
            require_harness(engine)


def test_eval_has_vllm_do_the_tasks_while_the_gpu_is_empty(
    tied: Path, fine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is, of all models before one is loaded; they are kept with their perplexities."""
    done: list[Any] = []
    load, kept = evaluate.load_any, {}
    monkeypatch.setattr(evaluate, "load_any", lambda *words: done.append("loaded") or load(*words))
    monkeypatch.setattr("quantize.tasks.require_harness", lambda engine: done.append(engine))
    monkeypatch.setattr("quantize.tasks.task_scores", lambda *_: pytest.fail("transformers"))
    monkeypatch.setattr("quantize.tasks.served_task_scores", lambda *words: done.append(words) or {"piqa": 0.5})
    monkeypatch.setattr("quantize.results.add_results", lambda path, before, after: kept.update({path: after}))
    words = ["eval", str(tied), str(fine), "--tokens", "600", "--tasks", "piqa,other", "--limit", "3", "--record"]
    result = CliRunner().invoke(app, [*words, "--engine", "vllm", "--dtype", "auto"])
    assert result.exit_code == 0, result.output
    models = [(str(model), ["piqa", "other"], 3, "auto", False) for model in (tied, fine)]
    assert done == ["vllm", *models, "loaded", "loaded"]
    assert result.output.count("piqa, vLLM: 0.5000") == 2 and kept[fine]["piqa, vLLM"] == 0.5


# ---------------------------------------------------------------------------------------------------------------
# The harness itself, on tasks of our own

QUESTIONS = ["sky", "sea", "sun", "moon", "fire", "grass", "snow", "rose", "leaf", "coal", "night", "sand"]
CHOICES = ["red", "a very long", "blue and green", "1"]


@pytest.fixture
def own_tasks(tmp_path: Path) -> list[str]:
    """One of choices, with an accuracy; one of texts, whose measure tells models apart that choose alike."""
    pytest.importorskip("lm_eval")
    rows = [{"question": f"The {word} is", "answer": i % 4} for i, word in enumerate(QUESTIONS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    choices = {"doc_to_text": "{{question}}", "doc_to_choice": CHOICES, "doc_to_target": "{{answer}}"}
    files = []
    for name, kind, metric, more in [
        ("colours", "multiple_choice", "acc", choices),
        ("texts", "loglikelihood_rolling", "byte_perplexity", {"doc_to_text": "", "doc_to_target": "{{question}}"}),
    ]:
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"} | more
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(json.dumps(task | {"output_type": kind, "metric_list": [{"metric": metric}]}))
    return [str(file) for file in files]


def test_the_harness_in_transformers(fine: Path, own_tasks: list[str]) -> None:
    model, tokenizer = load_any(str(fine), CPU)
    found = task_scores(model, tokenizer, own_tasks, None)

    def chosen(question: str) -> int:
        start = len(tokenizer(question).input_ids)
        scores = []
        for choice in CHOICES:
            ids = tokenizer(f"{question} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                logs = torch.log_softmax(model(ids).logits[0, :-1], -1)
            scores.append(float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        return scores.index(max(scores))

    right = [chosen(f"The {word} is") == i % 4 for i, word in enumerate(QUESTIONS)]
    assert found.keys() == {"colours", "texts byte_perplexity"} and found["texts byte_perplexity"] > 1
    assert found["colours"] == pytest.approx(sum(right) / len(right))


@pytest.mark.vllm
def test_the_harness_in_vllm_finds_what_it_finds_in_transformers(
    text_file: Path, tmp_path: Path, own_tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    for key, value in vllm_environment().items():
        monkeypatch.setenv(key, value)
    # Heads as small as the other tests' are too small for vLLM on CPUs.
    source, vptq = make_model(tmp_path / "source", num_attention_heads=2), tmp_path / "vptq"
    run(source, vptq, FINE.model_copy(update={"calibration": (str(text_file),)}))
    wanted = task_scores(*load_any(str(vptq), CPU), own_tasks, None)
    done = command("eval", vptq, "--tokens", 300, "--tasks", ",".join(own_tasks), "--engine", "vllm", timeout=600)
    assert done.returncode == 0, one_line(done.stderr)
    lines = dict(line.strip().split(", vLLM: ") for line in done.stdout.splitlines() if ", vLLM: " in line)
    assert {name: float(value) for name, value in lines.items()} == pytest.approx(wanted, rel=1e-4)
