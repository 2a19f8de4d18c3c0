"""Decoders that differ from Llama: masks by layer, norms in the attention, fused linears, experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from quantize.drift import residual_stream
from quantize.errors import QuantizeError
from quantize.estimate import planned
from quantize.evaluate import evaluation_text, load_any, score
from quantize.export import write_dense
from quantize.model import Batch, Block, decoder_blocks, first_inputs, load_shapes
from quantize.moments import stages
from quantize.pipeline import quantize_model
from quantize.plan import left_dense
from quantize.recipe import Recipe
from quantize.report import Report
from tests.tiny import COARSE, TEXT, command, make_model, read, run

pytest_plugins = ("tests.tiny_fixtures",)
CPU = torch.device("cpu")
SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
KINDS: dict[str, dict[str, Any]] = {
    "Gemma2Config": {"head_dim": 16, **SLIDING},
    "Gemma3TextConfig": {"head_dim": 16, **SLIDING},
    "Qwen2Config": {},
    "Qwen3Config": {"head_dim": 16},
    "MistralConfig": {"sliding_window": 32},
    "Phi3Config": {},
}


def make(folder: Path, kind: str, **more: Any) -> Path:
    """A random bfloat16 model of three blocks, with a tokenizer of bytes."""
    make_model(folder)  # for its tokenizer
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    common = {"num_key_value_heads": 4, "vocab_size": 300, "max_position_embeddings": 256, "initializer_range": 0.15}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, kind)(**sizes, **common, **special, **more)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_more_bits_come_closer_to_the_original(kind: str, text_file: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind, **KINDS[kind])
    original, tokenizer = load_any(str(source), torch.device("cpu"))
    divergences = []
    for bits in (3.0, 6.0):
        update = {"calibration": [str(text_file)], "tokens": 2048, "context": 64, "iterations": 4}
        run(source, tmp_path / str(bits), Recipe.load(None, "fast", bits=bits, finetune={"steps": 2}, **update))
        model, _ = load_any(str(tmp_path / str(bits)), torch.device("cpu"))
        divergences.append(score(model, tokenizer, TEXT, 64, 2048, reference=original).divergence)
    assert divergences[1] < divergences[0] / 4
    assert left_dense(decoder_blocks(load_shapes(str(source)))) == {}


@pytest.mark.parametrize("kind", [*KINDS, "Qwen2MoeConfig"])
def test_which_linears_add_to_the_residual_stream(kind: str, tmp_path: Path) -> None:
    """None of Gemma's, whose outputs pass through a norm, nor a shared expert's, which a gate scales."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    more = KINDS.get(kind, experts | {"shared_expert_intermediate_size": 64})
    model: Any = load_any(str(make(tmp_path, kind, **more)), CPU)[0].bfloat16()
    blocks = decoder_blocks(model)
    (batch,) = first_inputs(model, blocks, [torch.randint(2, 300, (2, 24))])
    names = {name.removeprefix(f"{blocks[0].name}.") for name in blocks[0].linears}
    streams = {name: residual_stream(0, blocks[0].module, name, batch) for name in names}
    found = {name.rpartition(".")[2]: stream for name, stream in streams.items() if stream is not None}
    attention, mlp = {"o_proj": ""}, {"down_proj": "post_attention_layernorm"}
    assert found == ({} if "Gemma" in kind else attention if "Moe" in kind else attention | mlp)


def test_routers_and_experts_in_one_tensor_stay_dense(text_file: Path, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    source = make(tmp_path / "source", "Qwen2MoeConfig", shared_expert_intermediate_size=64, **experts)
    update = {"calibration": [str(text_file)], "tokens": 2048, "context": 64, "iterations": 4}
    plan = run(source, tmp_path / "out", Recipe.load(None, "fast", bits=5.0, **update))
    leaves = {name.partition(".mlp.")[2] for name in plan.specs} - {""}
    assert leaves == {f"shared_expert.{part}_proj" for part in ("gate", "up", "down")}
    before, after = read(source), read(tmp_path / "out")
    router = "model.layers.0.mlp.shared_expert_gate.weight"
    assert torch.equal(after[router], before[router])
    (original, tokenizer), (coded, _) = (load_any(str(tmp_path / p), torch.device("cpu")) for p in ("source", "out"))
    assert 0 < score(coded, tokenizer, TEXT, 64, 2048, reference=original).divergence < 1.0


def own_model(tied: Path, tmp_path: Path, code: str) -> Path:
    """A copy of ``tied`` with code of its own: OwnConfig and OwnForCausalLM."""
    source = Path(shutil.copytree(tied, tmp_path / "source"))
    (source / "modeling_own.py").write_text(code)
    config = json.loads((source / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (source / "config.json").write_text(json.dumps(config))
    return source


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


EXPERTS = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class Experts(nn.Module):
    \"\"\"Eight experts, a token goes through one of them; and a linear that only batches of few sequences reach.\"\"\"

    def __init__(self, size):
        super().__init__()
        self.gate = nn.Linear(size, 8, bias=False)
        self.experts = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(8))
        self.often, self.rare = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)

    def forward(self, x):
        chosen = self.gate(x).argmax(-1)
        y = self.often(x).clone()
        for i, expert in enumerate(self.experts):
            y[chosen == i] += expert(x[chosen == i])
        return y + self.rare(y) if len(x) < 32 else y


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Experts(config.hidden_size)
        self.post_init()
"""


@pytest.mark.parametrize("update", [{"tokens": 3072}, {"tokens": 9216, "bits": 6.0}], ids=["fixed", "measured"])
def test_experts_that_are_linears_stay_dense_and_rare_calls_are_enough(
    tied: Path, tmp_path: Path, update: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches are of 32 sequences but the last; sensitivities are measured on four of them."""
    source, out = own_model(tied, tmp_path, EXPERTS), tmp_path / "out"
    AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(source, trust_remote_code=True), trust_remote_code=True
    ).save_pretrained(tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "model.safetensors", source)
    (tmp_path / "text.txt").write_text(evaluation_text(None)[:60000])
    recipe = Recipe(**COARSE.model_dump() | {"calibration": [str(tmp_path / "text.txt")], "correction": 0.5} | update)
    plan = quantize_model(str(source), out, recipe, Report(), trust=True)
    leaves = {name.partition(".mlp.")[2] for name in plan.specs} - {""}
    assert leaves == {"often", "rare"} and len(plan.specs) == 12
    assert "% of the blocks' weights stay dense, first model.layers.0.mlp.experts.0.weight" in capsys.readouterr().out
    before, after = read(source), read(out)
    assert all(torch.equal(after[name], before[name]) for name in before if ".experts." in name or ".gate." in name)
    load_any(str(out), CPU, trust=True)


def test_linears_of_later_batches_come_last_and_in_order() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (torch.nn.Linear(4, 4) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            if len(x) == 2:
                y = self.b(y) + self.c(y)
            return self.d(y)

    layer = Layer()
    block = Block("l", layer, {f"l.{name}": getattr(layer, name) for name in "abcde"})
    batches = [Batch(torch.ones(size, 3, 4), [{}]) for size in (3, 2, 3)]
    assert stages(0, block, list(block.linears), batches) == [["l.a"], ["l.d"], ["l.b", "l.c"]]
    assert stages(0, block, list(block.linears), batches[:1]) == [["l.a"], ["l.d"]]


def test_code_that_a_model_brings_along_runs_if_allowed_and_goes_with_it(tied: Path, tmp_path: Path) -> None:
    source, out = own_model(tied, tmp_path, CODE), tmp_path / "out"
    for call in (
        lambda: run(source, out, COARSE),
        lambda: load_any(str(source), CPU),
        lambda: load_shapes(str(source)),
    ):
        with pytest.raises(QuantizeError, match=r"contains custom code.*--trust-remote-code"):
            call()
    plan = quantize_model(str(source), out, COARSE, Report(), trust=True)
    assert planned(load_shapes(str(source), trust=True), COARSE).specs == plan.specs
    write_dense(out, tmp_path / "dense", torch.float32)
    shutil.rmtree(source)
    models = [load_any(str(folder), CPU, trust=True)[0] for folder in (out, tmp_path / "dense")]
    assert type(models[0]).__name__ == "OwnForCausalLM"
    ids = torch.arange(2, 66)[None]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_experts_in_one_tensor_are_said_to_stay_dense(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    source = make(tmp_path / "source", "Qwen3MoeConfig", head_dim=16, **experts)
    found = left_dense(decoder_blocks(load_shapes(str(source))))
    assert {name.rpartition(".")[2] for name in found} == {"gate_up_proj", "down_proj"}
    assert sum(found.values()) == 3 * 4 * 3 * 32 * 64
    done = command("plan", source, "--bits", 4)
    assert done.returncode == 0 and "stay dense" in done.stdout and "experts" in done.stdout
