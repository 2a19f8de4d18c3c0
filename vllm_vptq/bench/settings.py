"""What is measured, and of which model."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_vptq.format import read_layer_specs
from vllm_vptq.inspection.headers import read_config


class BenchError(RuntimeError):
    """A measurement that could not be made, in one line."""


@dataclass(frozen=True)
class Settings:
    """One comparison's. Lengths are in tokens; ``prompt_tokens`` 0 leaves the time to the first token out.

    ``batches``: sequences decoded at once. Each has a prompt of ``input_tokens`` and generates ``steps`` tokens.
    ``max_model_len`` None is as short as the lengths allow, which leaves the most room for the KV cache, and
    ``kv_cache_gib`` None takes what ``gpu_memory_utilization`` leaves for it. ``max_num_batched_tokens`` None is vLLM's
    own.
    """

    tp: int = 1
    batches: tuple[int, ...] = (1, 8, 32, 64)
    input_tokens: int = 16
    steps: int = 128
    prompt_tokens: int = 2048
    repeats: int = 3
    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    kv_cache_gib: float | None = None
    max_num_batched_tokens: int | None = None

    @property
    def model_len(self) -> int:
        """The context the engine is started with."""
        return self.max_model_len or max(self.input_tokens + self.steps, self.prompt_tokens + 1)

    @property
    def few_steps(self) -> int:
        """Steps of the short runs."""
        return max(1, self.steps // 16)

    def check(self) -> None:
        """BenchError for lengths that contradict each other."""
        need = max(self.input_tokens + self.steps, self.prompt_tokens + 1)
        if self.model_len < need:
            raise BenchError(f"--max-model-len {self.model_len} is too short for these lengths, give at least {need}")
        if self.steps < 2:
            raise BenchError(f"--steps {self.steps}: a step is timed as a difference, give at least 2")


@dataclass(frozen=True)
class Contestant:
    """A model to measure. ``kind`` is ``vptq``, or ``dense`` or ``w4a16``, which are loaded with random weights.

    ``shape`` tells which models are the same but for their format. ``dtype`` is the checkpoint's. ``layout`` is the one
    asked for by ``VLLM_VPTQ_LAYOUT``, None for rivals.
    """

    folder: Path
    kind: str
    format: str
    shape: str
    dtype: str
    layout: str | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name} ({self.format}{'' if self.layout in (None, 'auto') else f', {self.layout}'})"

    @property
    def load_format(self) -> str:
        """vLLM's."""
        return "auto" if self.kind == "vptq" else "dummy"

    @classmethod
    def find(cls, folder: Path, kind: str) -> Contestant:
        """Reads from ``config.json`` what the model is; VPTQFormatError or BenchError if it is not of its ``kind``."""
        config = read_config(folder)
        section, shape = config.get("quantization_config"), _shape(config)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "unknown")
        if kind == "vptq":
            specs = read_layer_specs(config)
            formats = Counter(spec.format_name for spec in (*specs.layers.values(), *specs.shared.values()))
            most = formats.most_common(1)[0][0]
            name = most if len(formats) == 1 else f"{most} and {len(formats) - 1} more"
            return cls(folder, kind, name, shape, dtype, os.environ.get("VLLM_VPTQ_LAYOUT", "auto"))
        if kind == "dense":
            if section:
                raise BenchError(f"{folder}: has a quantization_config; --dense takes a model without one")
            return cls(folder, kind, dtype, shape, dtype)
        return cls(folder, kind, _integer_format(folder, section), shape, dtype)


def _shape(config: dict[str, Any]) -> str:
    """``32 layers of 4096``."""
    inner = config.get("text_config") or config
    return f"{inner.get('num_hidden_layers')} layers of {inner.get('hidden_size')}"


def _integer_format(folder: Path, section: Any) -> str:
    """``w4a16-g128``, read from compressed-tensors' section."""
    try:
        if section["quant_method"] != "compressed-tensors":
            raise KeyError
        (group,) = section["config_groups"].values()
        return f"w{group['weights']['num_bits']}a16-g{group['weights']['group_size']}"
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BenchError(f"{folder}: no compressed-tensors model of one integer scheme, as --w4a16 takes it") from None


def contestants(vptq: list[Path], dense: Path | None, w4a16: Path | None) -> list[Contestant]:
    """Those of a comparison, rivals first. BenchError or VPTQFormatError for a directory that is none."""
    rivals = [(dense, "dense"), (w4a16, "w4a16"), *((folder, "vptq") for folder in vptq)]
    found = [Contestant.find(folder, kind) for folder, kind in rivals if folder is not None]
    if not found:
        raise BenchError("nothing to measure: name a directory with a VPTQ checkpoint, or --dense, or --w4a16")
    names = Counter(contestant.name for contestant in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise BenchError(f"{twice[0]}: two directories of this name; results are kept by name, so rename one")
    return found
