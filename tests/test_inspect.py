"""``vllm-vptq inspect``: what it says of checkpoints is what their bytes and vLLM's layers say."""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from benchmarks.synthesize import synthesize
from quantize.plan import resident_bits
from tests.checkpoints import f2_section
from tests.strategies import random_tensors
from tests.tiny import read
from vllm_vptq import cli
from vllm_vptq.format import LayerSpec, tensor_shapes
from vllm_vptq.inspection import inspect_checkpoint
from vllm_vptq.inspection.degrees import Heads, refusals

ODD = {
    "model.layers.0.self_attn.q_proj": LayerSpec(72, 120, 7, 32, enable_perm=True, enable_norm=True, norm_dim=1),
    "model.layers.0.mlp.down_proj": LayerSpec(72, 120, 6, 8, 16, group_num=4, enable_norm=True),
    "model.layers.0.mlp.other_proj": LayerSpec(72, 120, 12, 8, 0, 2, 4, 5, 6, is_indice_packed=False),
}
"""Groups, outliers, unpacked indices, and a name that says nothing."""


def call(*arguments: object) -> Result:
    words = ["inspect", *map(str, arguments)]
    return CliRunner().invoke(cli.app, words, env={"COLUMNS": "120"}, catch_exceptions=False)


def write(folder: Path, specs: dict[str, LayerSpec], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    coded = {f"{name}.{key}": t for name, spec in specs.items() for key, t in random_tensors(spec, 0).items()}
    save_file(coded | {"model.embed_tokens.weight": torch.zeros(8, 8)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"quantization_config": f2_section(specs)}))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("tiny") / "out", "tiny-qwen", "v8-k256-64", perm=True)


def test_sizes_are_those_of_the_tensors(tiny):
    answer = json.loads(call(tiny, "--json").stdout)
    tensors = read(tiny)
    assert answer["total_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert answer["dense_bytes"]["embeddings"] == answer["dense_bytes"]["head"] == 512 * 256 * 2
    assert answer["weights"] == 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    module = next(m for m in answer["modules"] if m["name"] == "model.layers.1.self_attn.k_proj")
    own = [t.nbytes for name, t in tensors.items() if name.startswith(module["name"]) and not name.endswith(".bias")]
    assert module["nbytes"] == sum(own) and module["effective_bits"] == round(sum(own) * 8 / (128 * 256), 4)
    assert (module["format"], module["index_bits"], module["perm"], module["norm"]) == (
        "v8-k256-64",
        1.75,
        True,
        "columns",
    )
    assert answer["quantized_bytes"] * 8 / answer["weights"] == pytest.approx(answer["effective_bits"], abs=1e-3)


def test_only_headers_are_read(tmp_path):
    """A hole of a quarter of a terabyte in place of the values is no matter."""
    spec = LayerSpec(1 << 20, 1 << 20, 8, 1 << 16)
    header, end = {}, 0
    for name, shape in tensor_shapes(spec).items():
        size = math.prod(shape) * (4 if name == "indices" else 2)
        dtype = "I32" if name == "indices" else "F16"
        header[f"l.up_proj.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": f2_section({"l.up_proj": spec})}))
    (module,) = inspect_checkpoint(tmp_path).modules
    assert module.nbytes == end > 1 << 38 and module.effective_bits == pytest.approx(2, abs=1e-3)


def test_table(tiny):
    out = call(tiny).stdout
    lines = out.splitlines()
    assert (
        lines[0].startswith("model.layers.*.") and sum("_proj" in line and "v8-k256-64" in line for line in lines) == 7
    )
    row = " ".join(next(line for line in lines if line.startswith("self_attn.k_proj")).split())
    assert row.startswith("self_attn.k_proj 2 128 × 256 v8-k256-64 perm, norm 1.75 ") and row.endswith(" 1 2 4")
    assert "not 8: 4 attention heads do not divide by 8 (q_proj, k_proj, v_proj)" in out
    assert "--tensor-parallel-size 1, 2, 4\n" in out
    every = call(tiny, "--all").stdout.splitlines()
    assert sum("v8-k256-64" in line for line in every) == 14 and every[0].startswith("model.layers. ")


def test_memory_on_a_gpu(tmp_path):
    """By layout, with bits a weight, as ``vptq-quantize plan`` says it of the same specs."""
    name = "model.layers.0.mlp.down_proj"
    out = call(write(tmp_path, {name: LayerSpec(4096, 64, 8, 256, enable_norm=True)})).stdout
    nbytes = 4096 * 8 + 256 * 8 * 2 + 2 * 4 * 4096
    size = f"{nbytes / 2**20:.2f} MiB, {nbytes * 8 / (4096 * 64):.2f} bits"
    assert f"on a GPU   compact {size}; aligned {size}; stationary {size} a quantized weight\n" in out
    specs = {name: LayerSpec(4096, 64, 8, 65536, 256, enable_norm=True)}
    answer = json.loads(call(write(tmp_path, specs), "--json").stdout)
    found, planned = answer["resident_bytes"], resident_bits(specs)
    assert {layout: nbytes * 8 / (4096 * 64) for layout, nbytes in found.items()} == planned
    assert found["compact"] <= found["aligned"] < found["stationary"]


def fused(**books: tuple[int, ...]) -> dict[str, LayerSpec]:
    """Modules of two blocks, by the last part of their names."""
    where = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn"}
    return {
        f"model.layers.{i}.{where.get(leaf, 'mlp')}.{leaf}": LayerSpec(64, 48, *sizes)
        for i in range(2)
        for leaf, sizes in books.items()
    }


@pytest.mark.parametrize(
    ("books", "mixed"),
    [
        (dict(q_proj=(8, 256, 256), k_proj=(6, 16, 256), v_proj=(12, 256, 4)), []),  # all byte pairs
        (dict(gate_proj=(8, 256), up_proj=(8, 512)), ["gate_proj, up_proj"]),
        (dict(up_proj=(8, 512), gate_proj=(8, 512, 512), down_proj=(8, 16), o_proj=(8, 16384)), []),  # all shorts
        (
            dict(v_proj=(8, 16), q_proj=(8, 16, 16), gate_proj=(8, 4), up_proj=(8, 16384)),
            ["q_proj, v_proj", "gate_proj, up_proj"],
        ),
        (dict(q_proj=(8, 512, 16), k_proj=(8, 512, 16), v_proj=(8, 512, 16)), []),  # of two kinds each, fused or not
        (dict(gate_proj=(8, 16384), up_proj=(8, 16384, 16)), ["gate_proj, up_proj"]),
    ],
)  # fmt: skip
def test_fused_books_of_different_kinds(tmp_path, books, mixed):
    folder = write(tmp_path, fused(**books))
    out, found = call(folder).stdout, json.loads(call(folder, "--json").stdout)["mixed_books"]
    lines = [line for line in out.splitlines() if "different kinds" in line]
    assert len(found) == 2 * len(mixed) and len(lines) == bool(mixed)
    if mixed:
        assert (
            f"{len(found)} of the layers that vLLM fuses" in lines[0] and "vptq-quantize run --books bytes" in lines[0]
        )
        assert all(leaves in lines[0] for leaves in mixed)
        members = [
            f"model.layers.0.{'mlp' if 'up' in mixed[0] else 'self_attn'}.{leaf}" for leaf in mixed[0].split(", ")
        ]
        assert members in found


def test_odd_modules(tmp_path):
    found = {m.name.rpartition(".")[2]: m for m in inspect_checkpoint(write(tmp_path, ODD)).modules}
    assert (found["down_proj"].groups, found["other_proj"].outliers, found["q_proj"].norm) == (4, 4, "rows")
    assert found["down_proj"].refused == {16: "72 input columns do not divide by 16"}
    assert (
        found["other_proj"].refused[2] == "not known here how vLLM splits other_proj"
        and 1 not in found["other_proj"].refused
    )
    out = call(tmp_path).stdout
    assert "2 groups, 4 outliers" in out and "row norm" in out and "--tensor-parallel-size 1\n" in out


def test_layers_described_by_the_last_part_of_their_name(tmp_path):
    specs = {f"model.layers.{i}.mlp.up_proj": LayerSpec(64, 48, 8, 16) for i in (0, 1, 10, 2)}
    section = {"quant_method": "vptq", "shared_layer_config": {"up_proj": LayerSpec(64, 48, 8, 16).to_config()}}
    write(tmp_path, specs, quantization_config=section)
    assert {m.name for m in inspect_checkpoint(tmp_path).modules} == set(specs)
    assert " 4 " in next(line for line in call(tmp_path).stdout.splitlines() if "48 × 64" in line)


@pytest.mark.parametrize(
    ("name", "shape", "degrees"),
    [
        ("l.q_proj", (5120, 5120), [1, 2, 4, 8]),
        ("l.qkv_proj", (7168, 5120), [1, 2, 4, 8]),
        ("l.gate_proj", (29568, 8192), [1, 2, 4, 8, 16]),
        ("l.gate_up_proj", (2 * 29572, 8192), [1, 2, 4]),
        ("l.up_proj", (29572, 8192), [1, 2, 4]),
        ("l.down_proj", (8192, 29572), [1, 2, 4]),
        ("l.o_proj", (5121, 5120), [1, 2, 4, 8, 16]),
        ("lm_head", (5120, 5120), []),
        ("l.experts.3.up_proj", (5120, 5120), []),
    ],
)
def test_degrees(name, shape, degrees):
    assert [tp for tp in (1, 2, 4, 8, 16) if tp not in refusals(name, shape, Heads(40, 8))] == degrees


def test_heads_of_models_within_models():
    assert Heads.from_config({"text_config": {"num_attention_heads": 8, "num_key_value_heads": 2}}) == Heads(8, 2)
    assert Heads.from_config({"num_attention_heads": 8}) == Heads(8, 8) and Heads.from_config({}) is None


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_weights(folder: Path) -> None:
    file = folder / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_weights(folder: Path) -> None:
    (folder / "model-00001-of-00001.safetensors").unlink()


def lose_all(folder: Path) -> None:
    lose_weights(folder)
    (folder / "model.safetensors.index.json").unlink()


def change_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["config_for_layers"]["model.layers.0.mlp.up_proj"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (break_config, "config.json: cannot be read"),
        (break_weights, "safetensors: unreadable or truncated"),
        (lose_weights, "model-00001-of-00001.safetensors"),
        (lose_all, "no safetensors files"),
        (change_config(num_centroids=[-1, 512]), "tensor indices has shape [1, 64, 112], expected [1, 64, 120]"),
        (change_config(enable_norm=False), "up_proj: unknown tensor weight_bias"),
        (change_config(in_features=None, group_size=None), "up_proj: the configuration gives no in_features"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, damage, match):
    folder = synthesize(tmp_path / "out", "tiny", "v8-k256-64", layers=1)
    damage(folder)
    monkeypatch.setattr(sys, "argv", ["vllm-vptq", "inspect", str(folder)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1 and match in error


@pytest.mark.parametrize(("words", "match"), [(["absent"], "no such directory"), (["dense"], "no VPTQ configuration")])
def test_directories_that_are_no_checkpoint(tmp_path, monkeypatch, capsys, words, match):
    synthesize(tmp_path / "dense", "tiny", "dense")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vllm-vptq", "inspect", *words])
    with pytest.raises(SystemExit):
        cli.main()
    assert match in capsys.readouterr().err


def test_help_teaches():
    text = " ".join(call("--help").output.split())
    assert all(words in text for words in ("--all", "--json", "tensor parallel", "vllm-vptq inspect ./llama-vptq"))
