"""Scalar quantization beside ours, on the same text: round-to-nearest and GPTQ, both by llm-compressor.

    pip install llmcompressor        # in an environment of its own: it asks for versions of its own
    python -m benchmarks.scalar MODEL TEXT --method gptq --bits 2 --group 96 --calibration FILE

Integers with a scale and a zero for every group of inputs. Effective bits count them as the usual formats store them, a
scale in 16 bits and a zero in as many as the weights: ``bits + (16 + bits) / group``. Adds a row to the results of
``quality.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from benchmarks.quality import RESULTS, save
from quantize.calibration import calibration_tokens
from quantize.evaluate import evaluation_text, load_any, score
from quantize.recipe import Recipe


def main() -> None:
    """Runs one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", help="a file, or wikitext2")
    parser.add_argument("--method", choices=("rtn", "gptq"), required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="inputs that share a scale; must divide all layers'")
    parser.add_argument("--calibration", action="append", help="as of vptq-quantize run; rtn takes none")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("llmcompressor") is None:
        raise SystemExit("error: no llmcompressor; pip install llmcompressor, in an environment of its own")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (original, tokenizer), (model, _) = (load_any(arguments.model, device) for _ in range(2))
    started, started_cpu = time.perf_counter(), time.process_time()
    quantize(model, tokenizer, arguments)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    size = (arguments.context, arguments.tokens)
    text = evaluation_text(arguments.text)
    before = score(original, tokenizer, text, *size)
    after = score(model, tokenizer, text, *size, reference=original)
    save(
        {
            "name": f"{arguments.method} {arguments.bits} bits, groups of {arguments.group}",
            "method": arguments.method,
            "model": Path(arguments.model).name,
            "text": Path(arguments.text).name,
            "context": arguments.context,
            "tokens": arguments.tokens,
            "recipe": {"bits": arguments.bits, "group": arguments.group, "tokens": arguments.calibration_tokens}
            | {"calibration": [Path(name).name for name in arguments.calibration or []]}
            | {"llmcompressor": version("llmcompressor")},
            "effective_bits": round(arguments.bits + (16 + arguments.bits) / arguments.group, 4),
            "perplexity": round(after.perplexity, 4),
            "original_perplexity": round(before.perplexity, 4),
            "excess": round(math.log(after.perplexity / before.perplexity), 4),
            "divergence": round(after.divergence or 0.0, 4),
            "quantize_s": round(seconds, 1),
            "quantize_cpu_s": round(cpu_seconds, 1),
            "load": round(os.getloadavg()[2], 1),
        },
        arguments.results,
    )


def quantize(model: nn.Module, tokenizer: object, arguments: argparse.Namespace) -> None:
    """Leaves the model with the weights that the integers stand for."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = {"num_bits": arguments.bits, "type": "int", "symmetric": False, "strategy": "group"}
    groups = {"all": {"targets": ["Linear"], "weights": weights | {"group_size": arguments.group}}}
    modifier = GPTQModifier if arguments.method == "gptq" else QuantizationModifier
    data = {}
    if arguments.method == "gptq":
        source = {"calibration": arguments.calibration} if arguments.calibration else {}
        recipe = Recipe(tokens=arguments.calibration_tokens, context=256, **source)
        ids = calibration_tokens(model, tokenizer, recipe, lambda done, total: None)
        rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        data = {"dataset": Dataset.from_dict(rows), "num_calibration_samples": len(ids), "max_seq_length": 256}
    oneshot(model=model, tokenizer=tokenizer, recipe=modifier(config_groups=groups, ignore=["lm_head"]), **data)


if __name__ == "__main__":
    main()
