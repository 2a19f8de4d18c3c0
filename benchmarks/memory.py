"""What known models take in GPU memory by format and layout, from their shapes: ``python -m benchmarks.memory``.

With ``--tp 2 --tp 4``: what each rank of so many takes, a table a model.

The sum of what ``layouts/memory.py`` says of each layer (``auto`` decides by it; tests hold it against what packing
makes), norms, and 16-bit embeddings and head. No activations. And the KV cache that 24 GB have room for beside a model.
"""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.shapes import SHAPES, Shape
from vllm_vptq.format import LayerSpec, parse_format
from vllm_vptq.layouts.memory import LAYOUTS, measure, module_of, norm_bytes
from vllm_vptq.sharding import qkv_shares, share

MODELS = ("Llama-3.1-8B", "Qwen2.5-14B", "Llama-3.1-70B", "Qwen2.5-72B", "Mistral-Large-2407")
FORMATS = (
    "v8-k256-256", "v6-k4096", "v12-k4096-4096", "v8-k65536", "v8-k65536-256", "v16-k65536-65536", "v8-k65536-65536"
)  # fmt: skip
CARD_GB = 24.0
"""Of the small card whose room for a KV cache is asked for; vLLM gets its usual 0.9 of it."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))
"""Modules that vLLM makes one layer of."""


def rank_linears(shape: Shape, tp: int) -> dict[str, tuple[int, int]]:
    """``(out_features, in_features)`` of what the first rank of ``tp`` keeps of each linear of a layer.

    IndivisibleError where the sizes do not allow the degree.
    """
    rows = qkv_shares(shape.heads, shape.kv_heads, shape.head_size, shape.head_size, tp, 0)
    kept = {}
    for name, (outputs, inputs) in shape.linears().items():
        if name.endswith(FUSED[0]):
            _, (lo, hi) = rows[FUSED[0].index(name.rpartition(".")[2])]
            kept[name] = (hi - lo, inputs)
        elif name.endswith(FUSED[1]):
            kept[name] = (share(outputs, tp, 0, "output rows")[1], inputs)
        else:
            kept[name] = (outputs, share(inputs, tp, 0, "input columns")[1])
    return kept


def weights(shape: Shape, format_name: str, tp: int = 1) -> dict[str, int]:
    """Bytes of all weights of a rank in each layout; layouts that are the same as a smaller one are there too."""
    total, books = dict.fromkeys(LAYOUTS, 0), parse_format(format_name)
    for names in FUSED:
        sizes = [size for name, size in rank_linears(shape, tp).items() if name.endswith(names)]
        specs = [LayerSpec(inputs, outputs, *books, enable_norm=True) for outputs, inputs in sizes]
        layer = measure([module_of(spec) for spec in specs], LAYOUTS).nbytes
        layer.setdefault("aligned", layer["stationary"])
        norms = sum(map(norm_bytes, specs))
        for layout in LAYOUTS:
            total[layout] += shape.layers * (layer[layout] + norms)
    return {layout: size + unquantized(shape, tp) for layout, size in total.items()}


def unquantized(shape: Shape, tp: int = 1) -> int:
    """Bytes of a rank's embeddings and head."""
    return 2 * 2 * shape.vocabulary * shape.hidden // tp


def rivals(shape: Shape, tp: int = 1) -> dict[str, int]:
    """Bytes of a rank in 16 bits, and in 4 with a 16-bit scale for each group of 128."""
    linears = shape.layers * sum(outputs * inputs for outputs, inputs in rank_linears(shape, tp).values())
    rest = unquantized(shape, tp)
    return {"16 bits": 2 * linears + rest, "4 bits, groups of 128": int(linears * (4 + 16 / 128) / 8) + rest}


def table(title: str, columns: dict[str, tuple[str, int]]) -> str:
    """In Markdown, GiB: one figure for the 16- and 4-bit models, ``compact / aligned / stationary`` for formats.

    ``columns``: a model and its tensor parallel degree by the heading.
    """
    ranks = [(SHAPES[model], tp) for model, tp in columns.values()]
    lines = [f"|{title}| " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in rivals(ranks[0][0]):
        lines.append(f"| {name} | " + " | ".join(f"{rivals(*rank)[name] / 2**30:.1f}" for rank in ranks) + " |")
    for format_name in FORMATS:
        sizes = [weights(shape, format_name, tp) for shape, tp in ranks]
        cells = (" / ".join(f"{size[layout] / 2**30:.1f}" for layout in LAYOUTS) for size in sizes)
        lines.append(f"| {format_name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def room(shape: Shape, nbytes: int, card_gb: float) -> int:
    """Tokens of a 16-bit KV cache beside ``nbytes`` of weights in vLLM's usual 0.9 of a card, less no activations."""
    token = 2 * 2 * shape.layers * shape.kv_heads * shape.head_size
    return max(0, int((0.9 * card_gb * 1e9 - nbytes) / token))


def rooms(model: str, card_gb: float) -> str:
    """In Markdown: the KV cache that a card has room for beside the weights of a model."""
    shape = SHAPES[model]
    sizes = rivals(shape)
    for name in FORMATS:
        by_layout = weights(shape, name)
        # Layouts of the same size are one row.
        for size in sorted(set(by_layout.values())):
            sizes[f"{name}, {' or '.join(n for n in LAYOUTS if by_layout[n] == size)}"] = size
    dense = room(shape, sizes["16 bits"], card_gb)
    lines = [f"| {model}, {card_gb:g} GB card | weights | tokens in the KV cache |", "|---|---|---|"]
    for name, size in sizes.items():
        tokens = room(shape, size, card_gb)
        ratio = f" ({tokens / dense:.1f}x)" if dense and name != "16 bits" else ""
        lines.append(f"| {name} | {size / 2**30:.1f} GiB | {tokens:,}{ratio} |")
    return "\n".join(lines)


def main(
    models: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SHAPES)}.")] = None,
    tp: Annotated[list[int] | None, typer.Option(help="Tensor parallel degree; as often as you like.")] = None,
) -> None:
    """Prints GiB of weights: compact / aligned / stationary; and room for the KV cache of the first model."""
    models = models or list(MODELS)
    if tp:
        print("\n\n".join(table(f" {name} ", {f"tp {n}": (name, n) for n in tp}) for name in models))
    else:
        print(table(" ", {name: (name, 1) for name in models}), rooms(models[0], CARD_GB), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
