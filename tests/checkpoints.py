"""Real checkpoints of odd kinds: a dense model rewritten as VPTQ with any specs, and its dense twin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_vptq.format import LayerSpec, dequantize, pack_indices, tensor_shapes, validate

Choose = Callable[[str, int, int, torch.Generator], LayerSpec | None]


def code_weight(weight: Tensor, spec: LayerSpec, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes a weight crudely but meaningfully: books are vectors drawn from it, every vector takes its nearest."""
    out, cols = spec.shape
    weight = weight.float()
    tensors: dict[str, Tensor] = {}
    if spec.enable_norm:
        dim = 0 if spec.norm_dim == 0 else 1
        scale, shift = weight.std(dim).clamp_min(1e-6).to(dtype), weight.mean(dim).to(dtype)
        tensors |= {"weight_scale": scale, "weight_bias": shift}
        along = (lambda t: t[None, :]) if spec.norm_dim == 0 else (lambda t: t[:, None])
        weight = (weight - along(shift.float())) / along(scale.float())
    if spec.enable_perm:
        perm = torch.randperm(cols, generator=generator)
        tensors["perm"] = perm.to(torch.uint16).view(torch.int16) if spec.is_indice_packed else perm
        weight = weight[:, perm]

    def vectors(part: Tensor, v: int) -> Tensor:
        padded = torch.nn.functional.pad(part, (0, 0, 0, -out % v))
        return padded.reshape(-1, v, part.shape[1]).transpose(1, 2).contiguous()  # [R, C, v]

    def nearest(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
        flat = points.reshape(-1, points.shape[-1])
        book = flat[torch.randint(len(flat), (k,), generator=generator)].to(dtype)
        index = torch.cat([torch.cdist(c, book.float()).argmin(1) for c in flat.split(8192)])
        return index.reshape(points.shape[:2]), book

    ol = spec.outlier_size
    if ol:
        index, book = nearest(vectors(weight[:, :ol], spec.outlier_vector_len), spec.num_outlier_centroids)
        tensors["outlier_indices"] = index[None].to(torch.uint16).view(torch.int16)
        tensors["outlier_centroids.weight"] = book.reshape(1, -1)
    main, residual, books, res_books = [], [], [], []
    for g in range(spec.group_num):
        points = vectors(weight[:, ol + g * spec.group_size : ol + (g + 1) * spec.group_size], spec.vector_len)
        index, book = nearest(points, spec.num_centroids)
        main.append(index)
        books.append(book.flatten())
        if spec.num_res_centroids:
            index, res_book = nearest(points - book.float()[index], spec.num_res_centroids)
            residual.append(index)
            res_books.append(res_book.flatten())
    tensors["centroids.weight"] = torch.stack(books)
    indices = torch.stack(main)
    if residual:
        tensors["res_centroids.weight"] = torch.stack(res_books)
    if spec.is_indice_packed:
        if residual:
            indices = indices | torch.stack(residual) << spec.index_bits
        tensors["indices"] = pack_indices(indices, spec.total_bits)
    else:
        tensors["indices"] = indices.to(torch.uint16).view(torch.int16)
        if residual:
            tensors["res_indices"] = torch.stack(residual).to(torch.uint16).view(torch.int16)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == tensor_shapes(spec)
    return tensors


def rewrite_model(
    source: Path,
    out: Path,
    choose: Choose,
    dtype: torch.dtype = torch.float32,
    section: Callable[[Mapping[str, LayerSpec]], dict] | None = None,
    seed: int = 0,
    **config_changes: object,
) -> tuple[Path, Path]:
    """Writes ``out/vptq`` and its dense twin ``out/dense``; ``choose`` gives each linear of the source its spec.

    ``section`` makes the part of config.json that describes the layers (generation F2 by default).
    """
    generator = torch.Generator().manual_seed(seed)
    dense, coded, specs = {}, {}, {}
    for name, weight in sorted(load_file(source / "model.safetensors").items()):
        weight = weight.to(dtype) if weight.is_floating_point() else weight
        module = name.removesuffix(".weight")
        linear = weight.ndim == 2 and "embed" not in name and "lm_head" not in name
        spec = choose(module, *weight.shape, generator) if linear else None
        if spec is None:
            dense[name] = coded[name] = weight
            continue
        tensors = code_weight(weight, spec, generator, dtype)
        validate(module, tensors, spec)
        specs[module] = spec
        coded |= {f"{module}.{key}": tensor for key, tensor in tensors.items()}
        dense[name] = dequantize(tensors, spec).to(dtype)
    config = json.loads((source / "config.json").read_text()) | config_changes
    config["dtype"] = str(dtype).removeprefix("torch.")
    parts = section(specs) if section else {"quantization_config": f2_section(specs)}
    for name, tensors, more in (("dense", dense, {}), ("vptq", coded, parts)):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja", ".model") and file.name != "config.json":
                shutil.copy(file, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | more, indent=2))
    return out / "vptq", out / "dense"


def f2_section(specs: Mapping[str, LayerSpec]) -> dict:
    """The quantization_config of generation F2."""
    layers = {name: spec.to_config() for name, spec in specs.items()}
    return {"quant_method": "vptq", "config_for_layers": layers, "shared_layer_config": {}}
