"""Runs jobs on the cards there are, several at a time on each, and cases as soon as their jobs are done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engine.cases import OPTIONS, Case, Job
from tests.engine.worker import ROOT
from vllm_vptq.bench.process import cause, end_group
from vllm_vptq.doctor import machine

STAGE_KINDS = {"restarts": 4, "serve": 2, "bench": 2}
"""Kinds of jobs that start several processes one after the other: how many times the time limit they get."""
LACKS = "which this GPU lacks"
"""What ``layouts/choice.py`` says of a layout that there are no kernels for on this kind of GPU."""


@dataclass
class Cards:
    """GPUs, each of which takes ``per_card`` jobs at a time."""

    count: int
    per_card: int
    load: list[int] = field(init=False)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.load = [0] * max(self.count, 1)

    @contextmanager
    def take(self, count: int) -> Iterator[list[int]]:
        """The ``count`` cards with the least to do, once as many have room."""

        def free() -> list[int]:
            return [card for card, load in enumerate(self.load) if load < self.per_card]

        with self.changed:
            self.changed.wait_for(lambda: len(free()) >= count)
            cards = sorted(free(), key=lambda card: (self.load[card], card))[:count]
            for card in cards:
                self.load[card] += 1
        try:
            yield cards
        finally:
            with self.changed:
                for card in cards:
                    self.load[card] -= 1
                self.changed.notify_all()


@dataclass(frozen=True)
class Runner:
    """``scratch`` gets models, logs and caches. ``cards`` 0 is a CPU, which runs one job at a time."""

    scratch: Path
    cards: int
    per_card: int = 6
    limit_s: float = 240

    def run(self, cases: list[Case], done: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
        """Runs cases; ``done`` gets the row of each as it is known. Rows come in the order of ``cases``."""
        rows: dict[str, dict[str, Any]] = {}

        def settle(case: Case, row: dict[str, Any]) -> None:
            rows[case.name] = {"name": case.name, "cards": case.cards} | row
            done(rows[case.name])

        waiting: list[Case] = []
        for case in cases:
            if reason := self.cannot(case):
                settle(case, {"result": "skipped", "seconds": 0, "detail": reason})
            else:
                waiting.append(case)
        slots = Cards(self.cards, self.per_card if self.cards else 1)
        jobs = {job.key: job for case in waiting for job in case.jobs.values()}
        with ThreadPoolExecutor(slots.per_card * len(slots.load)) as pool:
            # Those that take longest begin first.
            by_length = sorted(jobs.items(), key=lambda item: -STAGE_KINDS.get(item[1].kind, 1))
            futures = {key: pool.submit(self.outcome, job, slots) for key, job in by_length}
            pending: set[Future[dict[str, Any]]] = set(futures.values())
            while pending:
                _, pending = wait(pending, return_when=FIRST_COMPLETED)
                for case in [c for c in waiting if all(futures[j.key].done() for j in c.jobs.values())]:
                    waiting.remove(case)
                    outcomes = {name: futures[job.key].result() for name, job in case.jobs.items()}
                    settle(case, verdict(case, outcomes))
        return [rows[case.name] for case in cases]

    def cannot(self, case: Case) -> str | None:
        """Why a case cannot run here."""
        if not self.cards:
            return None if case.cpu else "needs a GPU"
        return f"needs {case.cards} GPUs" if case.cards > self.cards else None

    def outcome(self, job: Job, slots: Cards) -> dict[str, Any]:
        """What a job ended with: ``answers`` or ``error``, and ``log``, ``seconds``."""
        with slots.take(job.cards if self.cards else 1) as cards:
            begin = time.monotonic()
            try:
                found = self._process(job, cards)
            except Exception as error:  # a case that fails must not end the others
                found = {"error": f"{type(error).__name__}: {error}", "log": ""}
            return found | {"seconds": time.monotonic() - begin}

    def _process(self, job: Job, cards: list[int]) -> dict[str, Any]:
        models = self.scratch / "models"
        for model in (job.model, job.other, *(stage[0] for stage in job.stages)):
            if model is not None:
                model.write(models)
        place = Path(tempfile.mkdtemp(prefix=f"{job.kind}-", dir=self.scratch))
        (place / "job.json").write_text(json.dumps(self._resolved(job, models, place)))
        limit = self.limit_s * STAGE_KINDS.get(job.kind, 1)
        command = [sys.executable, "-m", "tests.engine.worker", str(place / "job.json"), str(place / "out.json")]
        with (place / "log").open("w") as log:
            process = subprocess.Popen(
                command, env=environment(place, cards if self.cards else None) | job.env, stdout=log, stderr=log,
                cwd=ROOT, start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(limit)
                late = False
            except subprocess.TimeoutExpired:
                late = True
            finally:
                end_group(process)
        text = (place / "log").read_text(errors="replace")
        if (place / "out.json").exists():
            return json.loads((place / "out.json").read_text()) | {"log": text}
        error = f"no end within {limit:.0f} s" if late else cause(text)
        return {"error": f"{error} ({place / 'log'})", "log": text}

    def _resolved(self, job: Job, models: Path, place: Path) -> dict[str, Any]:
        """The job as the worker reads it."""
        folder = models / job.model.name / job.side
        paths = {"{model}": str(folder), "{adapter}": str(models / job.model.name / "adapter")}
        if job.other is not None:
            paths["{other}"] = str(models / job.other.name / job.side)
        steps = [
            [name, {key: paths.get(value, value) if isinstance(value, str) else value for key, value in values.items()}]
            for name, values in job.steps
        ]
        return {
            "kind": job.kind,
            "model": str(folder),
            "options": options_of(job, cpu=not self.cards),
            "steps": steps if job.kind != "serve" else [values for _, values in steps],
            "scratch": str(place),
            "stages": [{"source": str(models / model.name / "vptq"), "env": dict(env)} for model, env in job.stages],
        }


def options_of(job: Job, cpu: bool) -> dict[str, Any]:
    """vLLM's options for a job."""
    options = OPTIONS | {"dtype": job.model.dtype} | dict(job.options)
    if cpu:
        # Its room is $VLLM_CPU_KVCACHE_SPACE; eager engines start a minute sooner.
        options = {key: value for key, value in options.items() if "memory" not in key}
        options |= {"enforce_eager": job.kind != "restarts"}
    return options


def environment(place: Path, cards: list[int] | None) -> dict[str, str]:
    """A job's: caches of its own, its cards, few threads."""
    more = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(place / "cache"),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions of ours sent to vLLM's workers
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "INFO",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    if cards is None:
        more |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    else:
        ids = machine.cards()
        more |= {"CUDA_VISIBLE_DEVICES": ",".join(ids[card] for card in cards), "OMP_NUM_THREADS": "2"}
        # NVLink multicast is a resource of the whole host; other users of it may not like to share it.
        more |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
    return os.environ | more


def verdict(case: Case, outcomes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of a case whose jobs are done; skipped if it asked for a layout that this kind of GPU has not."""
    seconds = {name: round(outcome["seconds"], 1) for name, outcome in outcomes.items()}
    starts = {name: round(outcome["start_s"], 1) for name, outcome in outcomes.items() if "start_s" in outcome}
    row = {"seconds": max(seconds.values()), "start_s": starts}
    if lacking := [error for outcome in outcomes.values() if LACKS in (error := outcome.get("error", ""))]:
        return row | {"result": "skipped", "detail": lacking[0]}
    try:
        result, detail = "passed", case.check(outcomes)
    except Exception as error:  # a check stumbles over answers of another shape: that is a failure too
        first = (str(error).splitlines() or [""])[0]
        result, detail = "FAILED", first if isinstance(error, AssertionError) else f"{type(error).__name__}: {first}"
        errors = [f"{name}: {outcome['error']}" for name, outcome in outcomes.items() if "error" in outcome]
        detail = "; ".join(dict.fromkeys([detail, *errors]))
    return row | {"result": result, "detail": detail}
