"""Synthesized checkpoints: of every public format valid and alike, loadable as vLLM's layers, the same for a seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from typer.testing import CliRunner
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from benchmarks.shapes import SHAPES
from benchmarks.synthesize import app, synthesize
from tests.layers import finish, load, make_config, output
from tests.layers import rank as rank  # a fixture
from tests.tiny import ROOT, module_tensors, read
from vllm_vptq.format import LayerSpec, VPTQFormatError, dequantize, read_layer_specs, tensor_shapes, validate

FORMATS = [
    *("v8-k65536-65536", "v8-k65536-256", "v8-k65536-0", "v8-k256-256", "v8-k65536-4", "v8-k65536-4096"),
    *("v8-k32768-0", "v8-k16384-0", "v8-k4096-0", "v8-k512-512", "v8-k1024-512"),
    *("v12-k65536-4096", "v12-k4096-4096", "v6-k4096"),
    *("v16-k65536-65536", "v16-k65536-1024", "v16-k65536-256", "v16-k65536-16384", "v16-k65536-32768"),
    *("v16-k65536-64", "v16-k65536-128", "v16-k65536-4096", "v16-k32768-32768"),
]
"""Those of the public checkpoints, and two of research."""


def modules(folder: Path) -> dict[str, tuple[LayerSpec, dict[str, Tensor]]]:
    """Spec and tensors of every quantized module."""
    specs, tensors = read_layer_specs(json.loads((folder / "config.json").read_text())), read(folder)
    return {name: (specs[name], module_tensors(tensors, name)) for name in specs}


@pytest.mark.parametrize("perm", [False, True], ids=["natural", "perm"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_public_format_is_valid_and_well_conditioned(tmp_path, format_name, perm):
    found = modules(synthesize(tmp_path / "out", "tiny", format_name, perm=perm, layers=1))
    assert len(found) == 7
    for name, (spec, tensors) in found.items():
        assert spec.enable_perm is perm and spec.enable_norm and f"{spec.format_name}".startswith(format_name)
        validate(name, tensors, spec)
        used = spec.group_size * spec.total_bits % 32
        assert not used or not (tensors["indices"][..., -1].long() & 0xFFFFFFFF).ge(1 << used).any(), "padding is zero"
    spec, tensors = found["model.layers.0.mlp.down_proj"]
    weight = dequantize(tensors, spec)
    assert weight.std().item() == pytest.approx(512**-0.5, rel=0.1)
    assert abs(weight.mean().item()) < 0.1 * 512**-0.5
    y = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).half() @ weight.half().T
    assert y.isfinite().all() and 0.5 < y.float().std() < 2


@pytest.mark.parametrize("perm", [False, True], ids=["natural", "perm"])
@pytest.mark.parametrize("format_name", ["v6-k4096", "v12-k4096-4096"])
@pytest.mark.parametrize(("groups", "outliers", "columns"), [(4, 0, (0, 128)), (8, 1.5, (8, 63)), (1, 2, (11, 501))])
def test_groups_and_outliers_of_research(tmp_path, format_name, perm, groups, outliers, columns):
    folder = synthesize(tmp_path / "out", "tiny", format_name, perm=perm, groups=groups, outliers=outliers, layers=1)
    found = modules(folder)
    for name, (spec, tensors) in found.items():
        validate(name, tensors, spec)
        assert (spec.group_num, spec.outlier_vector_len) == (groups, 4 if outliers else 0)
    spec, tensors = found["model.layers.0.mlp.down_proj"]
    assert (spec.outlier_size, spec.group_size) == columns
    weight = dequantize(tensors, spec)
    assert weight.std().item() == pytest.approx(512**-0.5, rel=0.1)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size == pytest.approx(sum(t.nbytes for t in read(folder).values()), rel=0.02)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("norm", [False, True])
def test_loads_as_a_layer_of_vllm(rank, tmp_path, norm, dtype):
    """What the layer computes in vLLM, on two ranks, is what dequantize says."""
    folder = synthesize(tmp_path / "out", "tiny", "v12-k256-64", perm=True, norm=norm, dtype=dtype, layers=1)
    found = modules(folder)

    class Stored:
        def __init__(self, leaf: str) -> None:
            self.name = f"model.layers.0.{leaf}"
            self.spec, self.tensors = found[self.name]
            self.weight = dequantize(self.tensors, self.spec)

        def stored(self) -> dict[str, Tensor]:
            return self.tensors

    heads = [Stored(f"self_attn.{leaf}_proj") for leaf in "qkv"]
    down = Stored("mlp.down_proj")
    packed = {"qkv_proj": [f"{leaf}_proj" for leaf in "qkv"]}
    x, hidden = torch.randn(3, 256), torch.randn(3, 512)
    q, total = [], torch.zeros(3, 256)
    for r in range(2):
        rank(r, 2)
        options = dict(bias=False, params_dtype=torch.float32)
        config = make_config(*heads, packed=packed)
        layer = QKVParallelLinear(
            256, 64, 4, 2, quant_config=config, prefix="model.layers.0.self_attn.qkv_proj", **options
        )
        load(layer, heads, ["q", "k", "v"])
        finish(layer)
        q.append(output(layer, x)[:, :128])
        options |= dict(reduce_results=False)
        layer = RowParallelLinear(512, 256, quant_config=make_config(down), prefix=down.name, **options)
        load(layer, [down], [None])
        finish(layer)
        total += output(layer, hidden.chunk(2, -1)[r])
    torch.testing.assert_close(torch.cat(q, -1), x @ heads[0].weight.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(total, hidden @ down.weight.T, rtol=1e-3, atol=1e-3)


def test_a_model_has_all_its_tensors(tmp_path):
    """The names and shapes that transformers gives the dense model, the quantized weights aside."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = synthesize(tmp_path / "vptq", "tiny-qwen", "v8-k256-0", dtype="bfloat16")
    dense = synthesize(tmp_path / "dense", "tiny-qwen", "dense", dtype="bfloat16")
    assert not list(dense.glob("*.safetensors"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(dense))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    coded = {f"{name}.weight": spec.shape for name, (spec, _) in modules(folder).items()}
    own = {f"{name}.{tensor}" for name, (spec, _) in modules(folder).items() for tensor in tensor_shapes(spec)}
    plain = {name: tuple(tensor.shape) for name, tensor in read(folder).items() if name not in own}
    assert expected == coded | plain
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = read(folder)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_shards_hold_the_same_as_one_file(tmp_path, monkeypatch):
    whole = read(synthesize(tmp_path / "whole", "tiny", "v8-k256-256", seed=3))
    monkeypatch.setattr("benchmarks.synthesize.SHARD_BYTES", 1)
    folder = synthesize(tmp_path / "parts", "tiny", "v8-k256-256", seed=3)
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    parts = read(folder)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    for name, file in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].items():
        with safe_open(folder / file, framework="pt") as reader:
            assert name in reader.keys()  # noqa: SIM118 (a safetensors reader is no dict)


def test_a_seed_decides_everything_and_depth_nothing(tmp_path):
    first = read(synthesize(tmp_path / "1", "tiny", "v8-k256-0", perm=True))
    again = read(synthesize(tmp_path / "2", "tiny", "v8-k256-0", perm=True, layers=1))
    other = read(synthesize(tmp_path / "3", "tiny", "v8-k256-0", perm=True, seed=1))
    assert all(torch.equal(first[name], again[name]) for name in again)
    drawn = [name for name in first if "layernorm" not in name and name != "model.norm.weight"]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    one, two = (f"model.layers.{i}.mlp.up_proj.indices" for i in range(2))
    assert not torch.equal(first[one], first[two])


def test_tokens_survive_being_text(tmp_path):
    from transformers import AutoTokenizer

    synthesize(tmp_path / "out", "tiny", "dense")
    plain = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = torch.randint(3, 512, (400,)).tolist()
    assert plain.encode(plain.decode(ids)).ids == ids and plain.get_vocab_size() == 512
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 512)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w7 hello"}])["input_ids"] == [7, 0]


def test_w4a16_is_what_compressed_tensors_reads(tmp_path):
    from compressed_tensors.quantization import QuantizationConfig

    folder = synthesize(tmp_path / "out", "tiny", "w4a16")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(section).config_groups["group_0"]
    assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.symmetric) == (4, 128, True)


@pytest.mark.parametrize(
    ("layers", "weights", "name"),
    [(32, 8.03e9, "Llama-3.1-8B"), (80, 70.55e9, "Llama-3.1-70B"), (48, 14.77e9, "Qwen2.5-14B"),
     (80, 72.71e9, "Qwen2.5-72B"), (88, 122.61e9, "Mistral-Large-2407")],
)  # fmt: skip
def test_sizes_are_those_the_models_are_known_for(layers, weights, name):
    shape = SHAPES[name]
    linears = shape.layers * sum(out * cols for out, cols in shape.linears().values())
    assert shape.layers == layers
    assert linears + 2 * shape.vocabulary * shape.hidden == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["nothing", "out"], r"model nothing: expected one of Llama-3.1-8B, "),
        (["tiny", "out", "--format", "8bit"], r"format 8bit: expected for example v8-k65536-0"),
        (["tiny", "out", "--format", "v8-k1000"], r"num_centroids 1000, expected a power of two"),
        (["tiny", "out", "--format", "v17-k16"], r"length 17, expected 2 to 16"),
        (["tiny", "out", "--dtype", "float8"], r"dtype float8: expected float16 or bfloat16"),
        (["tiny", "out", "--groups", "3"], r"256 columns less 0 outliers do not divide into 3 groups"),
        (["tiny", "."], r"exists and is not empty; choose another directory"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, words, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert match in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_teaches_and_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.synthesize"]
    text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert all(word in text for word in ("--format", "--perm", "--layers", "Llama-3.1-70B", "--load-format dummy"))
    with pytest.raises(VPTQFormatError):
        synthesize(tmp_path, "tiny", "v8")
