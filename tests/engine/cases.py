"""What is checked: engines to run, and what must be so of their answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.engine.compare import Agreement, Bound, DisagreementError, compare, identical
from tests.engine.models import Model
from tests.engine.worker import CHUNK
from vllm_vptq.bench.process import load_seconds

BOUNDS = {"float16": Bound(0.005, 0.05, 0.05), "bfloat16": Bound(0.04, 0.35, 0.35)}
"""Between a checkpoint and its dense twin, whose weights are rounded to 16 bits: about three times what a CPU's engine
differs by (float16 by 0.0014 and 0.009, bfloat16 by 0.014 and 0.07). Eight wrong rows of 1024 in one of 14 linears are
beyond: 0.033 and 0.74 in float16 (the case ``planted error``)."""
FP8_BOUNDS = {name: Bound(3 * b.mean, 3 * b.worst, 3 * b.near_tie) for name, b in BOUNDS.items()}
"""A cache in 8 bits turns differences in the last bit of 16 into some in the last of its three."""
REAL_BOUNDS = {name: Bound(2 * b.mean, 2 * b.worst, 2 * b.near_tie) for name, b in BOUNDS.items()}
"""Of models with tens of layers: on a CPU, SmolLM2-135M's 30 differ by 0.0072 and 0.07 in float16, 0.060 and 0.40 in
bfloat16; on an H200 by 0.0056 and 0.035 in float16."""
OPTIONS: dict[str, Any] = {
    "max_model_len": 2304,
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": 64,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.08,
    # Said aloud, vLLM does not measure what is free, which engines beside it would disturb.
    "kv_cache_memory_bytes": 1 << 30,
}
SUITE: tuple[str, Mapping[str, Any]] = ("suite", {})
ASK = ("ask", {"lengths": [3, 17, 90, 1100], "seed": 600, "max_tokens": 12, "forced": True})
PREFIX = ("ask", {"lengths": [700, 650, 300], "seed": 400, "max_tokens": 16})
REPEAT = ("repeat", {"period": 6, "length": 48, "max_tokens": 200})
SERVED = (1, 20, 300)
"""Lengths of the prompts that the server is asked."""
STEPS = (SUITE, ASK, PREFIX, REPEAT, *(("ask", {"lengths": [n], "seed": 800, "max_tokens": 16}) for n in SERVED))
"""All that some case wants to know of an engine run in the usual way, so that one start serves many."""
Outcomes = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """A process to run. ``side`` of the model is ``vptq``, ``dense`` or ``planted``. Equal jobs run once.

    In steps ``{model}``, ``{other}`` and ``{adapter}`` stand for the folders of the model, of ``other`` and of the
    model's LoRA adapter. ``stages`` are those of kind ``restarts``.
    """

    model: Model
    side: str = "vptq"
    kind: str = "engine"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[tuple[str, Mapping[str, Any]], ...] = STEPS
    env: Mapping[str, str] = field(default_factory=dict)
    cards: int = 1
    other: Model | None = None
    stages: tuple[tuple[Model, Mapping[str, str]], ...] = ()

    @property
    def key(self) -> str:
        """Equal for equal jobs."""
        return json.dumps([repr(self.model), self.side, self.kind, self.options, self.steps, self.env, self.cards,
                           repr(self.other), repr(self.stages)], sort_keys=True)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """``check`` gets the outcome of each job and returns a line with figures; AssertionError if not all is well.

    ``cpu``: whether a CPU's engine can do it too.
    """

    name: str
    jobs: Mapping[str, Job]
    check: Callable[[Outcomes], str]
    cpu: bool = False

    @property
    def cards(self) -> int:
        """How many GPUs it needs."""
        return max(job.cards for job in self.jobs.values())


# ---------------------------------------------------------------------------------------------------------------
# Models

BASE = Model("v8-k256-256", "bfloat16", perm=True, norm=True)
FAR = Model("v8-k65536-0", "float16", norm=True)
RESIDUAL = Model("v8-k65536-256", "bfloat16", norm=True)
NARROW = Model("v12-k4096-4096", "float16", norm=True, shape="narrow")
GROUPED = Model("v8-k256-256", "float16", perm=True, norm=True, groups=4, outliers=64)
MIXED = Model("v3-k2048-0+v4-k256-0+v5-k1024-0+v6-k4096-0", "float16")
"""As ``vptq-quantize --bits`` writes it: each module with the books that suit it, and no norm."""
FORMATS = [
    FAR,
    Model("v8-k65536-0", "bfloat16", perm=True),
    RESIDUAL,
    Model("v8-k65536-65536", "float16"),
    Model("v16-k65536-65536", "float16", perm=True, norm=True),
    BASE,
    Model("v8-k256-256", "float16"),
    Model("v6-k4096-0", "bfloat16", shape="narrow"),
    NARROW,
    MIXED,
]


def answers(outcome: dict[str, Any], step: int = 0) -> Any:
    """Of one step; AssertionError with the engine's error if it failed."""
    assert "error" not in outcome, outcome.get("error")
    return outcome["answers"][step]


def usual(outcome: dict[str, Any], step: tuple[str, Mapping[str, Any]]) -> Any:
    """Of one of STEPS, which the engine was asked in full."""
    return answers(outcome, STEPS.index(step))


def layouts(outcome: dict[str, Any]) -> list[str]:
    """The layouts that layers have, as the log says."""
    line = outcome["log"].partition("VPTQ weights: ")[2].partition("\n")[0]
    return re.findall(r"in (\w+) layout", line)


def pair(model: Model, **more: Any) -> dict[str, Job]:
    """The checkpoint and its dense twin, asked the same."""
    return {"vptq": Job(model, **more), "dense": Job(model, "dense", **more)}


def twins_agree(dtype: str, bounds: Mapping[str, Bound] = BOUNDS, steps: int = 1) -> Callable[[Outcomes], str]:
    def check(outcomes: Outcomes) -> str:
        found = [
            compare(answers(outcomes["vptq"], i), answers(outcomes["dense"], i), bounds[dtype]) for i in range(steps)
        ]
        return "; ".join(map(str, found))

    return check


def tokens(model: Model) -> Case:
    agree = twins_agree(model.dtype)

    def check(outcomes: Outcomes) -> str:
        return f"{agree(outcomes)}; {' and '.join(layouts(outcomes['vptq']))}"

    name = f"tokens {model.name.replace(model.shape + '-', '', 1)}"
    return Case(name, pair(model), check, cpu=True)


def in_layout(layout: str, model: Model) -> Case:
    """The checkpoint in a layout that ``auto`` does not choose for it while there is memory."""
    jobs = {"vptq": Job(model, env={"VLLM_VPTQ_LAYOUT": layout}), "dense": Job(model, "dense")}
    agree = twins_agree(model.dtype)

    def check(outcomes: Outcomes) -> str:
        found = agree(outcomes)
        assert layouts(outcomes["vptq"]) == [layout], layouts(outcomes["vptq"])
        return found

    return Case(f"{layout} layout {model.format}", jobs, check)


# ---------------------------------------------------------------------------------------------------------------
# One card


def planted() -> Case:
    jobs = {"vptq": Job(FAR, "planted"), "dense": Job(FAR, "dense")}

    def check(outcomes: Outcomes) -> str:
        found, wanted = answers(outcomes["vptq"]), answers(outcomes["dense"])
        try:
            agreed = compare(found, wanted, BOUNDS[FAR.dtype])
        except DisagreementError as error:
            return f"seen: {error}"
        raise AssertionError(f"8 wrong rows went unseen: {agreed}")

    return Case("planted error", jobs, check, cpu=True)


def variant(name: str, model: Model, cpu: bool = False, **job: Any) -> Case:
    """Another way to run a checkpoint, held against the dense twin run in the usual way."""
    jobs = {"vptq": Job(model, **job), "dense": Job(model, "dense")}
    return Case(name, jobs, twins_agree(model.dtype), cpu)


def prefix_caching() -> Case:
    on = {"enable_prefix_caching": True, "disable_log_stats": False}
    steps = (PREFIX, PREFIX, ("counters", {}))
    jobs = {"vptq": Job(BASE, options=on, steps=steps), "dense": Job(BASE, "dense")}

    def check(outcomes: Outcomes) -> str:
        first, second, counters = (answers(outcomes["vptq"], i) for i in range(3))
        found = [compare(a, usual(outcomes["dense"], PREFIX), BOUNDS[BASE.dtype]) for a in (first, second)]
        assert counters.get("prefix_hits", 0) > 1000, f"hits {counters}"
        return f"{found[1]}; {counters['prefix_hits']:.0f} tokens found in the cache"

    return Case("prefix caching", jobs, check, cpu=True)


def speculation() -> Case:
    # In float16: a step with a draft has more tokens, so other kernels serve it, and bfloat16 parts at near-ties.
    steps = (REPEAT, ("counters", {}))
    draft = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    jobs = {
        "draft": Job(FAR, options={"speculative_config": draft, "disable_log_stats": False}, steps=steps),
        "plain": Job(FAR),
    }

    def check(outcomes: Outcomes) -> str:
        found = compare(answers(outcomes["draft"]), usual(outcomes["plain"], REPEAT), BOUNDS[FAR.dtype])
        counters = answers(outcomes["draft"], 1)
        assert counters.get("accepted", 0) > 0, f"no token was accepted: {counters}"
        return f"{found}; {counters['accepted']:.0f} of {counters['drafted']:.0f} drafts accepted"

    return Case("n-gram speculation", jobs, check, cpu=True)


def lora() -> Case:
    # Without logprobs of prompts: vLLM's LoRA of the head takes one row a sequence, and its engine ends (0.32, dense).
    ask = {"lengths": [1, 9, 40, 130, 1200, *range(2, 22)], "seed": 500, "max_tokens": 8}
    steps = (("ask", ask), ("ask", {**ask, "lora": "{adapter}"}))
    jobs = pair(BASE, options={"enable_lora": True, "max_lora_rank": 8}, steps=steps)
    agree = twins_agree(BASE.dtype, steps=2)

    def check(outcomes: Outcomes) -> str:
        line = agree(outcomes)
        try:
            compare(answers(outcomes["vptq"], 0), answers(outcomes["vptq"], 1), BOUNDS[BASE.dtype])
        except DisagreementError:
            return line
        raise AssertionError("the adapter changed nothing")

    return Case("LoRA", jobs, check, cpu=True)


def sleep(model: Model) -> Case:
    """Levels 1 (weights wait in CPU memory) and 2 (they are loaded again)."""
    level_2 = (
        ("sleep", {"level": 2}),
        ("wake", {"tags": ["weights"]}),
        ("reload", {}),
        ("wake", {"tags": ["kv_cache"]}),
    )
    steps = (ASK, ("sleep", {"level": 1}), ("wake", {}), ASK, *level_2, ASK)
    # A large cache, so that what engines beside this one take meanwhile does not hide what it frees.
    options = {"enable_sleep_mode": True, "kv_cache_memory_bytes": 8 << 30}
    jobs = {"vptq": Job(model, options=options, steps=steps)}

    def check(outcomes: Outcomes) -> str:
        outcome = outcomes["vptq"]
        # Not to the bit: which prompts vLLM takes together is a matter of when they reach it.
        found = [compare(answers(outcome, step), answers(outcome), BOUNDS[model.dtype]) for step in (3, 8)]
        freed = [answers(outcome, step)["before"] - answers(outcome, step)["after"] for step in (1, 4)]
        assert min(freed) > 4 << 30, f"freed only {freed}"
        sizes = " and ".join(f"{size / 2**30:.1f}" for size in freed)
        return f"after level 1: {found[0]}; level 2: {found[1]}; freed {sizes} GiB"

    return Case(f"sleep {model.format}", jobs, check)


def reload(name: str, model: Model, env: Mapping[str, str]) -> Case:
    """Other weights into a running engine, and the first ones again."""
    other = model.reseeded()
    steps = (ASK, ("reload", {"path": "{other}"}), ASK, ("reload", {"path": "{model}"}), ASK)
    jobs = {
        "vptq": Job(model, steps=steps, other=other, env=env),
        "dense": Job(model, "dense"),
        "other": Job(other, "dense"),
    }

    def check(outcomes: Outcomes) -> str:
        first, second, third = (answers(outcomes["vptq"], step) for step in (0, 2, 4))
        found = compare(second, usual(outcomes["other"], ASK), BOUNDS[model.dtype])
        for again in (first, third):
            compare(again, usual(outcomes["dense"], ASK), BOUNDS[model.dtype])
        return f"other weights: {found}"

    return Case(name, jobs, check, cpu=True)


def refused(name: str, expected: str, cpu: bool, **job: Any) -> Case:
    jobs = {"vptq": Job(BASE, **job)}

    def check(outcomes: Outcomes) -> str:
        error = outcomes["vptq"].get("error")
        assert error, "it was not refused"
        assert re.search(expected, error), error
        return error

    return Case(name, jobs, check, cpu)


def batch_invariant() -> Case:
    """A sequence alone, and beside others in two ways; all held against the dense twin, which computes as usual."""
    ask = {"seed": 700, "max_tokens": 16, "forced": True}
    beside: tuple[list[int], ...] = ([], [12] * 32, [1000, *range(1, 12)])
    steps = tuple(("ask", {**ask, "lengths": [40, *others]}) for others in beside)
    jobs = {
        "vptq": Job(BASE, steps=(*steps, SUITE), env={"VLLM_BATCH_INVARIANT": "1"}),
        "dense": Job(BASE, "dense"),
    }

    def check(outcomes: Outcomes) -> str:
        first, *others = (answers(outcomes["vptq"], step)[:1] for step in range(len(beside)))
        for found in others:
            identical(found, first)
        agreed = compare(answers(outcomes["vptq"], len(beside)), answers(outcomes["dense"]), BOUNDS[BASE.dtype])
        return f"same bits alone and beside others; {agreed}"

    return Case("batch-invariant mode", jobs, check)


def compile_cache() -> Case:
    """A second start uses the first one's graphs; other weights or another layout in the same folder do not."""
    other = FAR.reseeded()
    stages = ((FAR, {}), (FAR, {}), (other, {}), (other, {"VLLM_VPTQ_LAYOUT": "compact"}))
    jobs = {
        "vptq": Job(FAR, kind="restarts", steps=(ASK,), stages=stages),
        "dense": Job(FAR, "dense"),
        "other": Job(other, "dense"),
    }

    def check(outcomes: Outcomes) -> str:
        starts = [answers(outcomes["vptq"], i) for i in range(len(stages))]
        for start, side in zip(starts, ("dense", "dense", "other", "other"), strict=True):
            compare(start["answers"][0], usual(outcomes[side], ASK), BOUNDS[FAR.dtype])
        assert not starts[0]["cached"] and starts[1]["cached"], [start["cached"] for start in starts]
        seconds = " / ".join(f"{start['start_s']:.0f}" for start in starts)
        return f"starts in {seconds} s: first, from the cache, other weights, other layout"

    return Case("compile cache", jobs, check, cpu=True)


def serve() -> Case:
    steps = tuple(("complete", {"length": n, "seed": 800, "max_tokens": 16}) for n in SERVED)
    jobs = {"vptq": Job(BASE, kind="serve", steps=steps), "dense": Job(BASE, "dense")}

    def check(outcomes: Outcomes) -> str:
        wanted = [usual(outcomes["dense"], step)[0] for step in STEPS[-len(SERVED) :]]
        found = compare(answers(outcomes["vptq"]), wanted, BOUNDS[BASE.dtype])
        measured = answers(outcomes["vptq"], 1)
        assert measured["completed"] == 16, measured
        return f"{found}; bench serve: {measured['output_throughput']:.0f} tokens/s"

    return Case("vllm serve, vllm bench serve", jobs, check, cpu=True)


def bench() -> Case:
    def check(outcomes: Outcomes) -> str:
        latency, throughput = (answers(outcomes["vptq"], i) for i in range(2))
        assert latency["avg_latency"] > 0 and throughput["num_requests"] == 32
        return f"latency {latency['avg_latency'] * 1e3:.0f} ms, {throughput['tokens_per_second']:.0f} tokens/s"

    model = replace(BASE, shape="wordy", twin=False)
    return Case("vllm bench latency | throughput", {"vptq": Job(model, kind="bench")}, check, cpu=True)


def memory(name: str, model: Model, layout: str, bits: float) -> Case:
    """Shapes of Llama-3.1-8B, four layers. Loading: at most one dense layer more than what is left in the end."""
    # In this process, so that its peak is seen.
    env = {"VLLM_VPTQ_LAYOUT": layout, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    jobs = {"vptq": Job(model, options={"enforce_eager": True}, steps=(("memory", {}),), env=env)}

    def check(outcomes: Outcomes) -> str:
        found = answers(outcomes["vptq"])
        (rank,), loading = found["ranks"], found["loading"]
        line = outcomes["vptq"]["log"].partition("VPTQ weights: ")[2].partition("\n")[0]
        have = rank["coded"] * 8 / model.weights
        assert re.search(rf"in {layout} layout \({have:.2f} bits/weight\)", line), f"{have:.2f} bits, logged {line!r}"
        assert have <= bits, f"{have:.2f} bits a weight, promised {bits}"
        over, layer = loading["peak"] - loading["final"], 2 * model.layer_weights
        assert loading["final"] < 1.02 * rank["weights"] + (64 << 20), loading
        assert over <= layer, f"{over / 2**20:.0f} MiB over the final size, a dense layer is {layer / 2**20:.0f}"
        return f"{line}; loading takes {over / 2**20:.0f} MiB more (a dense layer: {layer / 2**20:.0f})"

    return Case(name, jobs, check)


# ---------------------------------------------------------------------------------------------------------------
# Several cards, and real models


def parallel(model: Model, tp: int, pp: int, layout: str | None = None) -> Case:
    """Several cards against one, and against the dense twin; ``layout``: one that ``auto`` would not choose."""
    options = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    env = {"VLLM_VPTQ_LAYOUT": layout} if layout else {}
    jobs = {
        "vptq": Job(model, options=options, cards=tp * pp, steps=(SUITE, ("memory", {})), env=env),
        "one": Job(model, env=env),
        "dense": Job(model, "dense"),
    }

    def check(outcomes: Outcomes) -> str:
        mine = answers(outcomes["vptq"])
        found = compare(mine, answers(outcomes["one"]), BOUNDS[model.dtype])
        compare(mine, answers(outcomes["dense"]), BOUNDS[model.dtype])
        had = layouts(outcomes["vptq"])
        assert layout is None or set(had) == {layout}, had
        ranks = answers(outcomes["vptq"], 1)["ranks"]
        weights = " ".join(f"{rank['weights'] / 2**20:.0f}" for rank in ranks)
        host = max(rank["host_peak"] for rank in ranks) / 2**30
        seconds = load_seconds(outcomes["vptq"]["log"])
        loaded = f"loaded in {seconds:.1f} s" if seconds is not None else "loading time not logged"
        lie = " and ".join(dict.fromkeys(had))
        return f"{found}; weights by rank {weights} MiB, {lie}, host peak {host:.1f} GiB, {loaded}"

    name = " ".join([f"tp {tp} pp {pp} {model.format}", *model.books, *([layout] if layout else [])])
    return Case(name, jobs, check, cpu=pp == 1 and tp == 2 and layout is None)


@dataclass(frozen=True)
class Real:
    """A checkpoint and its dense twin that are at hand (``vptq-quantize dequantize`` makes the twin)."""

    vptq: Path
    dense: Path
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return self.vptq.resolve().name

    def write(self, folder: Path) -> None:
        """Links both where the others lie."""
        out = folder / self.name
        out.mkdir(parents=True, exist_ok=True)
        for side in ("vptq", "dense"):
            with suppress(FileExistsError):  # jobs of both sides come at a time
                (out / side).symlink_to(getattr(self, side).resolve())


def real(model: Real) -> Case:
    step = ("ask", {"lengths": [1, 3, 9, 40, 200, 900], "seed": 900, "max_tokens": 32, "forced": True})
    options = {"dtype": model.dtype, "max_model_len": 1024}
    agree = twins_agree(model.dtype, REAL_BOUNDS)
    return Case(f"real {model.name}", pair(model, options=options, steps=(step,)), agree, cpu=True)


def all_cases(reals: list[Real] | None = None) -> list[Case]:
    """The list; those of several cards last."""
    large = replace(BASE, shape="large", dtype="float16", perm=False, twin=False)
    return [
        *map(tokens, FORMATS),
        planted(),
        variant("eager", BASE, cpu=True, options={"enforce_eager": True}),
        in_layout("compact", BASE),
        in_layout("compact", RESIDUAL),
        in_layout("aligned", RESIDUAL),
        in_layout("aligned", FORMATS[4]),
        Case("fp8 KV cache", pair(BASE, options={"kv_cache_dtype": "fp8"}), twins_agree(BASE.dtype, FP8_BOUNDS)),
        prefix_caching(),
        speculation(),
        lora(),
        sleep(BASE),
        sleep(FAR),
        reload("reload", BASE, {}),
        reload("reload, far book", FAR, {"VLLM_VPTQ_LAYOUT": "aligned"}),
        refused("CPU offload", r"vptq does not support --cpu-offload-gb", True, options={"cpu_offload_gb": 1}),
        batch_invariant(),
        compile_cache(),
        serve(),
        bench(),
        memory("memory, stationary", large, "stationary", 2.1),
        memory("memory, compact", replace(large, format="v8-k65536-0"), "compact", 2.35),
        memory("memory, aligned", replace(large, format="v8-k65536-0"), "aligned", 2.35),
        *map(real, reals or []),
        parallel(BASE, 2, 1),
        parallel(NARROW, 2, 1),
        parallel(FAR, 2, 1),
        parallel(GROUPED, 2, 1),
        parallel(RESIDUAL, 2, 1, "aligned"),
        parallel(BASE, 1, 2),
        parallel(NARROW, 4, 1),
        parallel(FAR, 4, 1),
        parallel(BASE, 2, 2),
    ]


__all__ = ["OPTIONS", "Agreement", "Case", "Job", "Real", "all_cases"]
