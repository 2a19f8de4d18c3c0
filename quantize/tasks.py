"""Tasks of the LM Evaluation Harness (https://github.com/EleutherAI/lm-evaluation-harness), in transformers or vLLM."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from quantize.errors import QuantizeError
from quantize.evaluate import context_of
from vllm_vptq.extras import how_to_install

ENGINES = ("transformers", "vllm")
_SERVED_CONTEXT = 4096
"""vLLM wants room in its cache for one request of the longest kind, which a model's 131,072 positions may not have."""
_ACCURACIES = ("acc_norm,none", "acc,none", "exact_match,strict-match")


def require_harness(engine: str = "transformers") -> None:
    """QuantizeError for an engine of another name, and without it or the harness, which the extra ``eval`` installs."""
    if engine not in ENGINES:
        raise QuantizeError(f"engine {engine}, expected one of {', '.join(ENGINES)}")
    if engine == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise QuantizeError(f"--engine vllm needs vLLM: {how_to_install('gpu')}, or cpu in place of gpu")
        # torch may have asked for GPUs by now, after which a forked process cannot use them.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        # Results are on stdout; of an engine's start only what goes wrong is of interest.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        if engine == "vllm":
            import lm_eval.models.vllm_causallms
        else:
            import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise QuantizeError(f"--tasks needs the LM Evaluation Harness ({error}): {how_to_install('eval')}") from error


def task_scores(
    model: nn.Module, tokenizer: Any, tasks: list[str], limit: int | None, at_once: int = 1
) -> dict[str, float]:
    """What the harness finds of a model of transformers, ``at_once`` requests in a pass.

    ``tasks`` are names that the harness knows, or files of tasks in YAML; shots are as many as a task asks for.
    A task's accuracy by its name; all metrics, with theirs, of tasks that have none. QuantizeError for tasks that the
    harness doesn't know.
    """
    require_harness()
    from lm_eval.models.huggingface import HFLM

    with _one_line(tasks):
        return _scores(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=at_once), tasks, limit)


def served_task_scores(
    model: str, tasks: list[str], limit: int | None, dtype: str = "auto", trust: bool = False
) -> dict[str, float]:
    """:func:`task_scores` of a dense or VPTQ checkpoint in vLLM, the way ``vllm serve`` takes it.

    On one GPU, of which vLLM takes most of the memory until the scores are there, or on the CPUs: what the vLLM is for
    that is installed. Requests are of at most 4096 tokens, or of as many as the model has positions. QuantizeError for
    a model that vLLM does not take, or stops on.
    """
    require_harness("vllm")
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    length = context_of([model], None, trust, _SERVED_CONTEXT)
    try:
        harness = VLLM(pretrained=model, dtype=dtype, max_model_len=length, trust_remote_code=trust, batch_size="auto")
    except (RuntimeError, ValueError, OSError) as error:  # the engine's process has said more on stderr
        raise QuantizeError(f"vLLM does not take {model}: {' '.join(str(error).split())}") from error
    try:
        with _one_line(tasks):
            return _scores(harness, tasks, limit)
    except EngineDeadError as error:
        raise QuantizeError(f"vLLM stopped on {model}: {error}") from error
    finally:
        harness.model.llm_engine.engine_core.shutdown()  # or the next engine finds its memory taken


@contextlib.contextmanager
def _one_line(tasks: list[str]) -> Iterator[None]:
    """Tasks that are unknown, written wrongly, or whose data cannot be had, as a QuantizeError."""
    try:
        yield
    except (KeyError, ValueError, OSError) as error:
        raise QuantizeError(f"tasks {', '.join(tasks)}: {' '.join(str(error).split())}") from error


def _scores(harness: Any, tasks: list[str], limit: int | None) -> dict[str, float]:
    from lm_eval import simple_evaluate

    scores: dict[str, float] = {}
    for task, values in simple_evaluate(harness, tasks=tasks, limit=limit)["results"].items():
        accuracy = next((values[key] for key in _ACCURACIES if key in values), None)
        if accuracy is not None:
            scores[task] = float(accuracy)
            continue
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, (int, float)) and kind and not metric.endswith("_stderr"):
                scores[f"{task} {metric}" + ("" if kind == "none" else f" ({kind})")] = float(value)
    return scores
