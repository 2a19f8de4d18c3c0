"""Measures one model in this process, and writes what it finds to stdout as JSON, an object a line.

    python -m vllm_vptq.bench.worker '{"model": "DIR", "batches": [1, 8], "steps": 128}'

Keys are ``model``, ``load_format``, the fields of ``settings.Settings``, and ``wait``: to measure once a line comes in
on stdin, not as soon as the engine has started. Whatever vLLM prints goes to stderr.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from vllm_vptq.bench.settings import Settings

Event = dict[str, Any]


class Engine:
    """vLLM with a model, in this process. ``start_s`` is what that took."""

    def __init__(self, model: str, load_format: str, settings: Settings) -> None:
        # The weights are counted by a function sent to vLLM's processes, all of which are this run's own.
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        import torch
        import vllm
        from vllm.platforms import current_platform

        begin = time.perf_counter()
        more: dict[str, Any] = {}
        if not settings.enforce_eager:
            more["compilation_config"] = {"cudagraph_capture_sizes": list(settings.batches)}
        if settings.kv_cache_gib is not None:
            more["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
        if settings.max_num_batched_tokens is not None:
            more["max_num_batched_tokens"] = settings.max_num_batched_tokens
        self.llm = vllm.LLM(
            model,
            load_format=load_format,
            tensor_parallel_size=settings.tp,
            dtype=settings.dtype,
            max_model_len=settings.model_len,
            max_num_seqs=max(settings.batches),
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enforce_eager=settings.enforce_eager,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=0,
            **more,
        )
        self.start_s = time.perf_counter() - begin
        self.config = self.llm.llm_engine.vllm_config
        self.device = current_platform.get_device_name()
        self.versions = {"vllm": vllm.__version__, "torch": torch.__version__}
        self._sampling = partial(vllm.SamplingParams, temperature=0, ignore_eos=True, detokenize=False)
        self._draw = random.Random(0)

    def seconds(self, batch: int, length: int, steps: int) -> float:
        """Wall clock of generating ``steps`` tokens for each of ``batch`` new prompts of ``length`` tokens."""
        words = range(self.config.model_config.get_vocab_size())
        prompts = [{"prompt_token_ids": self._draw.choices(words, k=length)} for _ in range(batch)]
        sampling = self._sampling(max_tokens=steps)
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        elapsed = time.perf_counter() - begin
        assert all(len(output.outputs[0].token_ids) == steps for output in outputs)
        return elapsed


def events(model: str, load_format: str, settings: Settings, wait: bool = False) -> Iterator[Event]:
    """``started`` with sizes and versions, ``first_token`` unless left out, and ``decode`` for each batch."""
    engine = Engine(model, load_format, settings)
    yield {
        "event": "started",
        "start_s": round(engine.start_s, 2),
        "weight_gib": round(max(engine.llm.collective_rpc(weight_bytes)) / 2**30, 6),
        "host_peak_gib": round(max(engine.llm.collective_rpc(host_peak)) / 2**30, 2),
        "kv_cache_tokens": kv_cache_tokens(engine.config.cache_config),
        "device": engine.device,
        "versions": engine.versions,
    }
    if wait:
        sys.stdin.readline()
    yield from measure(settings, engine.seconds)


def measure(settings: Settings, seconds: Callable[[int, int, int], float]) -> Iterator[Event]:
    """The events of ``first_token`` and ``decode``; ``seconds(batch, length, steps)`` makes a run and times it."""
    if settings.prompt_tokens:
        seconds(1, settings.prompt_tokens, 1)  # the first of its length compiles and allocates
        times = [seconds(1, settings.prompt_tokens, 1) for _ in range(settings.repeats)]
        yield {"event": "first_token", "first_token_ms": round(statistics.median(times) * 1e3, 3)}
    for batch in settings.batches:
        seconds(batch, settings.input_tokens, settings.few_steps)
        # In turns, so that a clock that drifts hits both alike.
        pairs = [
            [seconds(batch, settings.input_tokens, steps) for steps in (settings.steps, settings.few_steps)]
            for _ in range(settings.repeats)
        ]
        long, short = zip(*pairs, strict=True)
        step = (statistics.median(long) - statistics.median(short)) / (settings.steps - settings.few_steps)
        yield {
            "event": "decode",
            "batch": batch,
            "tokens_per_s": round(batch / step, 2),
            "ms_per_step": round(step * 1e3, 4),
            "spread": round((max(long) - min(long)) / statistics.median(long), 4),
        }


def weight_bytes(worker: Any) -> int:
    """What the parameters of a rank's model hold, each storage once. Runs in vLLM's workers."""
    storages = (parameter.untyped_storage() for parameter in worker.get_model().parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def host_peak(_worker: Any) -> int:
    """The most CPU memory that a rank's process has held, in bytes, pages of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def kv_cache_tokens(cache: Any) -> int:
    """Room in the KV cache; newer vLLMs say it outright."""
    said = getattr(cache, "kv_cache_size_tokens", None)
    return int(said or cache.num_gpu_blocks * cache.block_size)


def main(job: str) -> None:
    """Runs one job, as in the module's docstring."""
    # vLLM and its children inherit stderr in place of stdout, which is left to the results.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    known: dict[str, Any] = json.loads(job)
    model, load_format, wait = known.pop("model"), known.pop("load_format", "auto"), known.pop("wait", False)
    settings = Settings(**known | {"batches": tuple(known.get("batches", Settings.batches))})
    for event in itertools.chain(events(model, load_format, settings, wait), [{"event": "done"}]):
        print(json.dumps(event), file=out, flush=True)


def job(model: str, load_format: str, settings: Settings) -> str:
    """The argument of this module for a measurement that waits to be told to begin."""
    return json.dumps({"model": model, "load_format": load_format, "wait": True, **asdict(settings)})


if __name__ == "__main__":
    main(sys.argv[1])
