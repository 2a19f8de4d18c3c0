"""A model of two blocks, a tokenizer of bytes, whole runs on them: what tiny_fixtures.py is made with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from quantize.evaluate import evaluation_text
from quantize.pipeline import quantize_model
from quantize.plan import Plan
from quantize.recipe import Recipe
from quantize.report import Report

ROOT = Path(__file__).parents[1]
# As many bits as a layer this small may have: books of 4096 would be larger than the layer itself.
FINE = Recipe(vector_length=2, centroids=256, residual_centroids=256, perm=True, tokens=2048, context=64, iterations=4)
COARSE = FINE.model_copy(update={"vector_length": 8, "centroids": 16, "residual_centroids": 0})
TEXT = evaluation_text(None)[:20000]


def make_model(folder: Path, model: type = LlamaForCausalLM, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A random model with weights large enough to matter, and a tokenizer of bytes."""
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    common = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.15}
    if model is not GPT2LMHeadModel:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        made = model(model.config_class(**common | sizes | {"max_position_embeddings": 256} | more))
    else:
        made = model(GPT2Config(**common, n_embd=32, n_layer=2, n_head=2, **more))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    made.to(dtype).save_pretrained(folder)
    return folder


def run(source: Path, out: Path, recipe: Recipe) -> Plan:
    return quantize_model(str(source), out, recipe, Report())


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def module_tensors(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def set_config(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_for_layers"]["model.layers.0.self_attn.q_proj"][key] = value
    (folder / "config.json").write_text(json.dumps(config))


def command(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "quantize.cli", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def one_line(stderr: str) -> str:
    """The line of the error, below what transformers may say about loading."""
    assert "Traceback" not in stderr, stderr
    return stderr.splitlines()[-1] if stderr else ""
