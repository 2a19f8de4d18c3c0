"""Writing and reading checkpoints: safetensors shards, config.json (generation F2), tokenizer files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantize.errors import QuantizeError
from quantize.parts import require_empty, write_tensors, write_text
from quantize.recipe import Recipe
from vllm_vptq.format import (
    LayerSpec,
    LayerSpecs,
    VPTQFormatError,
    dequantize,
    read_layer_specs,
    tensor_shapes,
    validate,
)

_INDEX = "model.safetensors.index.json"
VERSIONS = "vptq_versions.json"
"""Of what made a checkpoint, by package; and if the model was on the hub, its commit."""
REVISION = "revision"


class Exporter:
    """Writes a checkpoint shard by shard, so that no more than a block is held; :meth:`finish` makes it loadable."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._shards: list[dict[str, int]] = []

    def add_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes one shard. Its final name is known only at the end, so it starts under a number."""
        # Cloned, for tensors may share memory (a tied head), which safetensors refuses.
        on_cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        write_tensors(on_cpu, self._path(len(self._shards)), {"format": "pt"})
        self._shards.append({name: tensor.nbytes for name, tensor in on_cpu.items()})

    def finish(
        self,
        model: nn.Module,
        tokenizer: Any,
        specs: Mapping[str, LayerSpec],
        recipe: Recipe,
        versions: Mapping[str, str],
    ) -> None:
        """Names the shards and writes the index, the tokenizer, how it was made, and last the configuration."""
        files = [f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors" for i in range(len(self._shards))]
        for i, file in enumerate(files):
            self._path(i).rename(self.out / file)
        weight_map = {name: file for shard, file in zip(self._shards, files, strict=True) for name in shard}
        total = sum(size for shard in self._shards for size in shard.values())
        _write_json(self.out / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        from transformers.dynamic_module_utils import custom_object_save

        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(self.out)
        tokenizer.save_pretrained(self.out)
        _write_json(self.out / "vptq_recipe.json", recipe.written())
        _write_json(self.out / VERSIONS, dict(versions))
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            if getattr(model, "_auto_class", None) is not None:
                custom_object_save(model, folder, model.config)
            written = json.loads((Path(folder) / "config.json").read_text())
            for code in Path(folder).glob("*.py"):  # what the model brought along
                write_text(self.out / code.name, code.read_text(encoding="utf8"))
        written["quantization_config"] = {
            "quant_method": "vptq",
            "config_for_layers": {name: spec.to_config() for name, spec in specs.items()},
            "shared_layer_config": {},
        }
        _write_json(self.out / "config.json", written)

    def _path(self, i: int) -> Path:
        return self.out / f"model-part-{i:05d}.safetensors"


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_config(folder: Path) -> tuple[dict[str, Any], LayerSpecs]:
    """A VPTQ checkpoint's config.json and layer specs."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise QuantizeError(f"{folder}: no readable config.json ({error})") from error
    if not isinstance(config, dict):
        raise QuantizeError(f"{folder}: config.json holds a {type(config).__name__}, expected a table")
    return config, read_layer_specs(config)


def dense_tensors(folder: Path, specs: LayerSpecs, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the dense model that a VPTQ checkpoint stands for, modules dequantized into ``dtype``."""
    pending: dict[str, dict[str, Tensor]] = {}
    missing = set(specs)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise QuantizeError(f"{folder}: no safetensors files")
    for file in files:
        try:
            reader = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise VPTQFormatError(file.name, f"unreadable or truncated ({error})") from error
        with reader:
            for name in reader.keys():  # noqa: SIM118 (a safetensors reader is no dict)
                module, tensor = _owner(name, specs)
                if module is None or tensor == "bias":
                    yield name, reader.get_tensor(name)
                else:
                    pending.setdefault(module, {})[tensor] = reader.get_tensor(name)
                    missing.discard(module)
        # A module lies in one file as we write them, but need not; what is complete is done with.
        for module in [m for m, tensors in pending.items() if _complete(tensors, specs[m])]:
            yield f"{module}.weight", _dequantized(module, pending.pop(module), specs[module], dtype)
    for module, tensors in pending.items():
        yield f"{module}.weight", _dequantized(module, tensors, specs[module], dtype)
    if missing:
        raise VPTQFormatError(min(missing), "none of its tensors is in the checkpoint; indices is missing")


def _owner(name: str, specs: LayerSpecs) -> tuple[str | None, str]:
    """Splits ``model.q_proj.centroids.weight`` into module and tensor; module None if it is not a quantized one."""
    parts = name.split(".")
    for cut in (len(parts) - 1, len(parts) - 2):
        module = ".".join(parts[:cut])
        if module in specs:
            return module, ".".join(parts[cut:])
    return None, name


def _complete(tensors: dict[str, Tensor], spec: LayerSpec) -> bool:
    return spec.in_features is not None and tensors.keys() >= tensor_shapes(spec).keys()


def _dequantized(module: str, tensors: dict[str, Tensor], spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    if spec.in_features is None or spec.out_features is None:
        raise VPTQFormatError(module, "the configuration gives no in_features and out_features")
    validate(module, tensors, spec)
    return dequantize(tensors, spec).to(dtype)


def write_dense(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Writes the dense model that a VPTQ checkpoint stands for, for tools that know no VPTQ."""
    config, specs = read_config(folder)
    require_empty(out)
    exporter = Exporter(out)
    exporter.add_shard(dict(dense_tensors(folder, specs, dtype)))
    (out / "model-part-00000.safetensors").rename(out / "model.safetensors")
    for key in ("quantization_config", "quant_config"):
        config.pop(key, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(out / "config.json", config)
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt", ".py") and file.name not in ("config.json", _INDEX):
            (out / file.name).write_bytes(file.read_bytes())
