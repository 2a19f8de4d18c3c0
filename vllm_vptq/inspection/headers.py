"""A checkpoint directory without its values: config.json, and names, shapes and dtypes of all tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_vptq.format import VPTQFormatError

_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``; VPTQFormatError if there is none that can be read."""
    if not folder.is_dir():
        raise VPTQFormatError(str(folder), "no such directory; download the checkpoint first and give its directory")
    return _read_json(folder / "config.json")


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, by name, on the meta device; only the files' headers are read."""
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="np") as reader:  # torch would map the file for writing
                for name in reader.keys():  # noqa: SIM118 (a safetensors reader is no dict)
                    part = reader.get_slice(name)
                    tensors[name] = _meta(name, part.get_shape(), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise VPTQFormatError(str(file), f"unreadable or truncated ({error}); download it again") from error
    return tensors


def _files(folder: Path) -> list[Path]:
    """The files that vLLM would load: those of the index where there is one."""
    if (folder / _INDEX).exists():
        table = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(table, dict):
            raise VPTQFormatError(str(folder / _INDEX), "holds no weight_map; download it again")
        return [folder / name for name in sorted(set(table.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise VPTQFormatError(str(folder), "no safetensors files; the checkpoint's weights are missing")
    return files


def _meta(name: str, shape: list[int], dtype: str) -> Tensor:
    if dtype not in _DTYPES:
        raise VPTQFormatError(name, f"dtype {dtype}, expected one of {', '.join(_DTYPES)}")
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise VPTQFormatError(str(path), f"cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise VPTQFormatError(str(path), f"holds a {type(value).__name__}, expected a table")
    return value
