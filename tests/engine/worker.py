"""One engine and what it is asked, in this process:   python -m tests.engine.worker JOB.json OUT.json

A job has ``kind``, ``model`` (a folder), ``options`` (of ``vllm.LLM`` or of the command), ``steps`` and what else its
kind takes. The outcome has ``answers``, one entry for each step, or ``error``, one line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.engine.models import VOCABULARY
from vllm_vptq.bench.process import cause

ROOT = Path(__file__).parents[2]
FORCED = (1, 2, 5, 8, 9, 16, 17, 32, 33, 64, 65, 130, 300, 700, 2100)
"""Lengths of prompts asked one at a time: as many tokens go through a layer at once, the last in parts."""
BATCHES = (1, 2, 4, 8, 9, 16, 17, 32, 33, 64)
CHUNK = 1024
"""``max_num_batched_tokens``: longer prompts are prefilled in parts."""


def prompts(lengths: list[int], seed: int) -> list[dict[str, list[int]]]:
    """Random tokens."""
    draw = random.Random(seed)
    return [{"prompt_token_ids": draw.choices(range(3, VOCABULARY), k=length)} for length in lengths]


class Engine:
    """``vllm.LLM`` and the steps of a job."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import vllm

        self.vllm = vllm
        self.load_peaks: dict[str, int] = {}
        self._watch_loading()
        begin = time.perf_counter()
        self.llm = vllm.LLM(model, **options)
        self.start_s = time.perf_counter() - begin

    def _watch_loading(self) -> None:
        """Notes the GPU memory that loading takes at most and in the end, where the engine runs in this process."""
        import torch
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader

        original = BaseModelLoader.load_model

        def load_model(loader: Any, *arguments: Any, **named: Any) -> Any:
            if not torch.cuda.is_available():
                return original(loader, *arguments, **named)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            model = original(loader, *arguments, **named)
            self.load_peaks = {
                "peak": torch.cuda.max_memory_allocated() - before,
                "final": torch.cuda.memory_allocated() - before,
            }
            return model

        BaseModelLoader.load_model = load_model

    def ask(
        self, lengths: list[int], seed: int, max_tokens: int = 8, forced: bool = False, lora: str | None = None
    ) -> list[dict[str, Any]]:
        """Answers to prompts of random tokens, all at once. ``forced``: with the logprobs of the prompts too."""
        sampling = self.vllm.SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=max_tokens, logprobs=2, detokenize=False,
            prompt_logprobs=0 if forced else None,
        )  # fmt: skip
        more = {}
        if lora:
            from vllm.lora.request import LoRARequest

            more["lora_request"] = LoRARequest("adapter", 1, lora)
        outputs = self.llm.generate(prompts(lengths, seed), sampling, use_tqdm=False, **more)
        return [_answer(output) for output in outputs]

    def suite(self, lora: str | None = None) -> list[dict[str, Any]]:
        """Calls of every size: prompts one at a time, batches, and a long prompt among short ones."""
        answers = []
        for i, length in enumerate(FORCED):
            answers += self.ask([length], seed=i, forced=True, lora=lora)
        for i, batch in enumerate(BATCHES):
            answers += self.ask([12 + j % 5 for j in range(batch)], seed=100 + i, max_tokens=6, lora=lora)
        return answers + self.ask([2100, *range(1, 16)], seed=200, max_tokens=24, forced=True, lora=lora)

    def repeat(self, period: int, length: int, max_tokens: int) -> list[dict[str, Any]]:
        """Answers to prompts that repeat themselves, which an n-gram draft can guess."""
        made = [(ids["prompt_token_ids"] * length)[:length] for ids in prompts([period] * 4, seed=300)]
        sampling = self.vllm.SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=max_tokens, logprobs=2, detokenize=False
        )
        asked = [{"prompt_token_ids": ids} for ids in made]
        return [_answer(output) for output in self.llm.generate(asked, sampling, use_tqdm=False)]

    def counters(self) -> dict[str, float]:
        """vLLM's counters of what caches and drafts have been good for."""
        names = {
            "vllm:prefix_cache_hits": "prefix_hits",
            "vllm:spec_decode_num_draft_tokens": "drafted",
            "vllm:spec_decode_num_accepted_tokens": "accepted",
        }
        metrics = self.llm.llm_engine.get_metrics()
        return {names[m.name]: m.value for m in metrics if m.name in names}

    def sleep(self, level: int) -> dict[str, int]:
        """Sleeps; the GPU memory in use before and after."""
        before = _used()
        self.llm.sleep(level)
        return {"before": before, "after": _used()}

    def wake(self, tags: list[str] | None = None) -> None:
        self.llm.wake_up(tags)

    def reload(self, path: str | None = None) -> None:
        """Loads the weights again, from the same folder or another."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path} if path else {})

    def memory(self) -> dict[str, Any]:
        """Of each rank; of loading only where the engine runs in this process."""
        return {"ranks": self.llm.collective_rpc(rank_memory), "loading": self.load_peaks}


def _used() -> int:
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def rank_memory(worker: Any) -> dict[str, int]:
    """Bytes of weights, and the most CPU memory that the process has held. Runs in vLLM's workers."""
    from vllm_vptq.bench.worker import host_peak, weight_bytes

    layers = [m for m in worker.get_model().modules() if getattr(m, "vptq_layout", None) is not None]
    coded = [getattr(m, name) for m in layers for name in m.vptq_layout.tensor_names]
    return {
        "weights": weight_bytes(worker),
        "coded": sum(t.nbytes for t in coded if t is not None),
        "host_peak": host_peak(worker),
    }


def _answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    steps = [sorted((entry.logprob for entry in step.values()), reverse=True) for step in completion.logprobs]
    answer = {
        "tokens": list(completion.token_ids),
        "logprobs": [step[0] for step in steps],
        "runner_up": [step[1] for step in steps],
    }
    if output.prompt_logprobs is not None:
        forced = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        answer["prompt_logprobs"] = [step[token].logprob for token, step in forced]
    return answer


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """Starts an engine and takes the steps, ``[method, {argument: value}]`` each."""
    made = Engine(job["model"], job["options"])
    return {"start_s": made.start_s, "answers": [getattr(made, name)(**values) for name, values in job["steps"]]}


def restarts(job: dict[str, Any]) -> dict[str, Any]:
    """Engines one after the other, with one compile cache, on a folder whose content changes between them.

    Each of ``stages`` has ``source``, the folder copied there, and ``env``; each answers with ``cached``, whether vLLM
    took its graphs from the cache.
    """
    answers = []
    folder = Path(job["scratch"]) / "model"
    for i, stage in enumerate(job["stages"]):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stage["source"], folder)
        inner = {"kind": "engine", "model": str(folder), "options": job["options"], "steps": job["steps"]}
        found, log = run_inner(inner, Path(job["scratch"]), f"stage{i}", stage["env"])
        if "error" in found:
            return {"error": f"start {i + 1}: {found['error']}"}
        answers.append({"answers": found["answers"], "start_s": found["start_s"], "cached": "Directly load" in log})
    return {"answers": answers}


def run_inner(job: dict[str, Any], scratch: Path, name: str, env: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Runs another job; its outcome and log."""
    paths = [scratch / f"{name}.{suffix}" for suffix in ("job.json", "out.json", "log")]
    paths[0].write_text(json.dumps(job))
    with paths[2].open("w") as log:
        command = [sys.executable, "-m", "tests.engine.worker", *map(str, paths[:2])]
        subprocess.run(command, env=os.environ | env, stdout=log, stderr=log, cwd=ROOT, check=False)
    text = paths[2].read_text(errors="replace")
    if not paths[1].exists():
        return {"error": cause(text)}, text
    return json.loads(paths[1].read_text()), text


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """``vllm serve``, asked by the OpenAI client, then measured by ``vllm bench serve``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([*_vllm("serve", job["model"]), "--port", str(port), *_flags(job["options"])])
    try:
        _wait(f"http://127.0.0.1:{port}/health", server)
        answers = [_completion(port, job["model"], step) for step in job["steps"]]
        out = Path(job["scratch"]) / "serve.json"
        bench = ["--model", job["model"], "--port", str(port), "--dataset-name", "random", "--random-input-len", "24"]
        bench += ["--random-output-len", "8", "--num-prompts", "16", "--save-result", "--result-filename", str(out)]
        subprocess.run([*_vllm("bench", "serve"), *bench], check=True)
        return {"answers": [answers, json.loads(out.read_text())]}
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def _completion(port: int, model: str, step: dict[str, Any]) -> dict[str, Any]:
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    (prompt,) = prompts([step["length"]], step["seed"])
    done = client.completions.create(
        model=model, prompt=prompt["prompt_token_ids"], max_tokens=step["max_tokens"], temperature=0, logprobs=2,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )  # fmt: skip
    found = done.choices[0].logprobs
    best = [sorted(step.values(), reverse=True) for step in found.top_logprobs]
    return {
        "tokens": [int(token.partition(":")[2]) for token in found.tokens],
        "logprobs": [step[0] for step in best],
        "runner_up": [step[1] for step in best],
    }


def bench(job: dict[str, Any]) -> dict[str, Any]:
    """``vllm bench latency`` and ``vllm bench throughput``: the figures they write."""
    found = []
    lengths = {
        "latency": ["--input-len", "32", "--output-len", "16", "--batch-size", "4", "--num-iters", "3",
                    "--num-iters-warmup", "1"],
        "throughput": ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16",
                       "--num-prompts", "32"],
    }  # fmt: skip
    for kind, arguments in lengths.items():
        out = Path(job["scratch"]) / f"{kind}.json"
        words = ["--model", job["model"], *arguments, "--output-json", str(out), *_flags(job["options"])]
        subprocess.run([*_vllm("bench", kind), *words], check=True)
        found.append(json.loads(out.read_text()))
    return {"answers": found}


def _vllm(*words: str) -> list[str]:
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *words]


def _flags(options: dict[str, Any]) -> list[str]:
    """Options of ``LLM`` as the command line has them."""
    flags = []
    for name, value in options.items():
        if value is not False:
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return flags


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"vllm serve ended with {server.returncode}")


KINDS = {"engine": engine, "restarts": restarts, "serve": serve, "bench": bench}


def main(job: Path, out: Path) -> None:
    """Does a job. What fails inside vLLM's own processes is found in the log by who reads it."""
    known = json.loads(job.read_text())
    found = KINDS[known["kind"]](known)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(out)
    sys.stdout.flush()
    os._exit(0)  # an engine's shutdown need not be waited for


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
