"""Small models of Llama's kind, each as a VPTQ checkpoint and as the dense checkpoint that it stands for."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.shapes import Shape
from benchmarks.synthesize import module_tensors, write_tokenizer
from vllm_vptq.format import LayerSpec, dequantize, parse_format

VOCABULARY = 2048
HEAD_STD = 2.5
"""Of logits: a model as sure of its next token as a trained one, whose two best are seldom close."""
OUTLIER_BOOK = (4, 4096)
"""Vector length and centroids of the book for outlier columns."""
SHAPES = {
    "small": Shape("LlamaForCausalLM", "llama", 1024, 2816, 2, 8, 2, 128, VOCABULARY, 1e4),
    "narrow": Shape("LlamaForCausalLM", "llama", 768, 2048, 3, 12, 4, 64, VOCABULARY, 1e4),
    "large": Shape("LlamaForCausalLM", "llama", 4096, 14336, 4, 32, 8, 128, VOCABULARY, 1e4),
    # `vllm bench latency` draws its tokens from the first ten thousand.
    "wordy": Shape("LlamaForCausalLM", "llama", 1024, 2816, 2, 8, 2, 128, 10240, 1e4),
}


@dataclass(frozen=True)
class Model:
    """A model to be made. ``dtype`` is that of books, norms and dense tensors, and of the dense checkpoint.

    ``format`` may be several, as ``v3-k128-0+v8-k512-512``: modules take them in turn. ``outliers``: columns.
    """

    format: str
    dtype: str = "float16"
    perm: bool = False
    norm: bool = False
    groups: int = 1
    outliers: int = 0
    shape: str = "small"
    seed: int = 0
    twin: bool = True
    """Whether the dense checkpoint is written too."""

    @property
    def name(self) -> str:
        """Names its folder."""
        extras = ["perm"] * self.perm + ["norm"] * self.norm + self.books + [str(self.seed)] * bool(self.seed)
        return "-".join([self.shape, self.format, self.dtype, *extras])

    @property
    def books(self) -> list[str]:
        """Which books it has beside those of its format."""
        groups = [f"{self.groups}-groups"] * (self.groups > 1)
        return groups + [f"{self.outliers}-outliers"] * bool(self.outliers)

    def write(self, folder: Path) -> None:
        """Writes ``vptq``, ``dense`` ``planted`` (vptq with 8 wrong rows in one layer), ``adapter``."""
        out = folder / self.name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                partial = folder / f"{self.name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                self._write(partial)
                partial.rename(out)

    def _write(self, out: Path) -> None:
        shape, dtype = SHAPES[self.shape], getattr(torch, self.dtype)
        formats = [parse_format(name) for name in self.format.split("+")]
        outliers = (self.outliers, *OUTLIER_BOOK) if self.outliers else ()
        gen = torch.Generator().manual_seed(self.seed)
        scale = HEAD_STD * shape.hidden**-0.5
        common = {
            "model.embed_tokens.weight": torch.randn(shape.vocabulary, shape.hidden, generator=gen).to(dtype),
            "lm_head.weight": (scale * torch.randn(shape.vocabulary, shape.hidden, generator=gen)).to(dtype),
            "model.norm.weight": torch.ones(shape.hidden, dtype=dtype),
        }
        coded, dense, specs = {}, {}, {}
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                common[f"{prefix}{norm}.weight"] = torch.ones(shape.hidden, dtype=dtype)
            for name, (outputs, inputs) in shape.linears().items():
                module = prefix + name
                books = (*formats[len(specs) % len(formats)], self.groups, *outliers)
                spec = LayerSpec(inputs, outputs, *books, enable_perm=self.perm, enable_norm=self.norm)
                own = np.random.Generator(np.random.SFC64([self.seed, len(specs)]))
                tensors = module_tensors(spec, dtype, own)
                specs[module] = spec
                coded |= {f"{module}.{key}": tensor for key, tensor in tensors.items()}
                if self.twin:
                    dense[f"{module}.weight"] = dequantize(tensors, spec).to(dtype)
        planted = dict(coded)
        spoilt = "model.layers.1.self_attn.o_proj.indices"
        planted[spoilt] = coded[spoilt].clone()
        planted[spoilt][:, 0] = coded[spoilt][:, 0].roll(1, -1)  # the first vector row, one word further
        section = {
            "quant_method": "vptq",
            "config_for_layers": {name: spec.to_config() for name, spec in specs.items()},
        }
        vptq = {"quantization_config": section}
        twins = [("planted", planted, vptq), ("dense", dense, {})] if self.twin else []
        for name, tensors, more in (("vptq", coded, vptq), *twins):
            (out / name).mkdir(parents=True)
            save_file(common | tensors, out / name / "model.safetensors", metadata={"format": "pt"})
            (out / name / "config.json").write_text(json.dumps(shape.config(self.dtype) | more, indent=1))
            write_tokenizer(out / name, shape.vocabulary)
        self._write_adapter(out / "adapter")

    def _write_adapter(self, out: Path) -> None:
        """A LoRA adapter of rank 8 for all linears, in PEFT's format, strong enough to change most tokens."""
        shape = SHAPES[self.shape]
        gen = torch.Generator().manual_seed(1)
        tensors = {}
        for layer in range(shape.layers):
            for name, (outputs, inputs) in shape.linears().items():
                module = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(8, inputs, generator=gen) * inputs**-0.5
                tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, 8, generator=gen) * 0.2
        out.mkdir()
        dtype = getattr(torch, self.dtype)
        save_file({name: t.to(dtype) for name, t in tensors.items()}, out / "adapter_model.safetensors")
        leaves = sorted({name.rpartition(".")[2] for name in shape.linears()})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "target_modules": leaves}
        (out / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))

    def reseeded(self) -> Model:
        """The same model with other weights."""
        return replace(self, seed=self.seed + 1)

    @property
    def weights(self) -> int:
        """How many weights its linears have."""
        shape = SHAPES[self.shape]
        return shape.layers * self.layer_weights

    @property
    def layer_weights(self) -> int:
        """How many weights the linears of one decoder layer have."""
        return sum(outputs * inputs for outputs, inputs in SHAPES[self.shape].linears().values())
