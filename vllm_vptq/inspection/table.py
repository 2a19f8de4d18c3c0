"""A checkpoint's description as tables for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_vptq.inspection import DEGREES, Checkpoint, Module


def as_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """All modules and totals; sizes in bytes."""
    modules = [
        {**dataclasses.asdict(module), "effective_bits": round(module.effective_bits, 4)}
        for module in checkpoint.modules
    ]
    return {
        "weights": checkpoint.weights,
        "effective_bits": round(checkpoint.effective_bits, 4),
        "quantized_bytes": checkpoint.quantized_bytes,
        "dense_bytes": dict(checkpoint.dense_bytes),
        "total_bytes": checkpoint.total_bytes,
        "resident_bytes": dict(checkpoint.resident_bytes),
        "mixed_books": checkpoint.mixed_books,
        "tensor_parallel": checkpoint.degrees,
        "modules": modules,
    }


def show(checkpoint: Checkpoint, console: Console, every: bool) -> None:
    """Prints the modules, those alike in one row unless ``every`` is to have its own; then totals and refusals."""
    rows = [(m.name, [m]) for m in checkpoint.modules] if every else _alike(checkpoint.modules)
    prefix = _common_prefix([name for name, _ in rows])
    rows = [(name.removeprefix(prefix), modules) for name, modules in rows]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in (f"{prefix or 'module'}", "×", "out × in", "format", "", "index", "bits", "MiB", "tp"):
        right = name in ("×", "out × in", "index", "bits", "MiB")
        table.add_column(Text(name), justify="right" if right else "left", no_wrap=bool(name))
    for name, modules in rows:
        table.add_row(*map(Text, (name, *_cells(modules))))
    console.print(table)
    console.print("bits a weight: index alone, and with books, norm and permutation\n", style="dim")
    for line in (*_totals(checkpoint), *_on_gpu(checkpoint), *_tensor_parallel(checkpoint)):
        console.print(Text(line), soft_wrap=True)


def _common_prefix(names: list[str]) -> str:
    """Whole components that all names begin with, the last one left to each: ``model.layers.*.``."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{parts[0]}.")
    return "".join(shared)


def _alike(modules: Iterable[Module]) -> list[tuple[str, list[Module]]]:
    """Modules that differ in the number of their layer only, under a name with a star for it."""
    groups: dict[Module, list[Module]] = {}
    for module in modules:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", module.name)
        groups.setdefault(dataclasses.replace(module, name=name), []).append(module)
    return [(key.name, members) for key, members in groups.items()]


def _cells(modules: list[Module]) -> tuple[str, ...]:
    first = modules[0]
    kinds = [f"{first.groups} groups"] * (first.groups > 1) + [f"{first.outliers} outliers"] * (first.outliers > 0)
    kinds += ["perm"] * first.perm + ["norm" if first.norm == "columns" else "row norm"] * (first.norm is not None)
    return (
        str(len(modules)),
        f"{first.out_features} × {first.in_features}",
        first.format,
        ", ".join(kinds) or "-",
        f"{first.index_bits:.2f}",
        f"{first.effective_bits:.2f}",
        f"{sum(module.nbytes for module in modules) / 2**20:.1f}",
        " ".join(str(tp) for tp in DEGREES if tp not in first.refused) or "none",
    )


def _totals(checkpoint: Checkpoint) -> list[str]:
    dense = ", ".join(f"{kind} {_size(size)}" for kind, size in checkpoint.dense_bytes.items())
    bits = f"{checkpoint.effective_bits:.2f} effective bits"
    return [
        f"quantized  {_size(checkpoint.quantized_bytes)}: {checkpoint.weights / 1e6:,.1f}M weights of {bits}",
        f"dense      {_size(sum(checkpoint.dense_bytes.values()))}: {dense}",
        f"total      {_size(checkpoint.total_bytes)}",
    ]


def _on_gpu(checkpoint: Checkpoint) -> list[str]:
    sizes = (
        f"{layout} {_size(nbytes)}, {8 * nbytes / checkpoint.weights:.2f} bits"
        for layout, nbytes in checkpoint.resident_bytes.items()
    )
    lines = [f"on a GPU   {'; '.join(sizes)} a quantized weight"]
    if mixed := checkpoint.mixed_books:
        fused = dict.fromkeys(", ".join(name.rpartition(".")[2] for name in names) for names in mixed)
        lines.append(
            f"  slower: {len(mixed)} of the layers that vLLM fuses ({'; '.join(fused)}) have books of different kinds; "
            "vptq-quantize run --books bytes, with --bits, makes all of one kind"
        )
    return lines


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


def _tensor_parallel(checkpoint: Checkpoint) -> list[str]:
    lines = [f"--tensor-parallel-size {', '.join(map(str, checkpoint.degrees)) or '(none)'}"]
    for tp in DEGREES:
        reasons: dict[str, dict[str, None]] = {}  # a set in order of appearance
        for module in checkpoint.modules:
            if tp in module.refused:
                reasons.setdefault(module.refused[tp], {})[module.name.rpartition(".")[2]] = None
        lines += [f"  not {tp}: {reason} ({', '.join(leaves)})" for reason, leaves in reasons.items()]
    return lines
