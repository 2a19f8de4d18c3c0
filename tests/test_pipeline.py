"""Whole runs on a model of two blocks: what is written, what it is worth, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from quantize import blocks, training
from quantize.errors import QuantizeError
from quantize.evaluate import load_any, perplexity, score
from quantize.export import read_config, write_dense
from quantize.hessian import SecondMoment
from quantize.plan import Plan
from quantize.recipe import Finetuning, Recipe, Rule
from quantize.report import REPORT
from tests.tiny import COARSE, FINE, TEXT, command, make_model, module_tensors, one_line, read, run, set_config
from vllm_vptq.format import VPTQFormatError, dequantize, read_layer_specs, validate

pytest_plugins = ("tests.tiny_fixtures",)
CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"

# ---------------------------------------------------------------------------------------------------------------
# What is written


def check_files(source: Path, out: Path, plan: Plan) -> dict[str, Tensor]:
    files = sorted(out.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    tensors = read(out)
    assert sum(len(load_file(file)) for file in files) == len(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "vptq"
    assert dict(read_layer_specs(config)) == plan.specs == dict(read_config(out)[1])
    original = read(source)
    dense = set(tensors)
    for name, spec in plan.specs.items():
        own = module_tensors(tensors, name)
        validate(name, own, spec)
        dense -= {f"{name}.{key}" for key in own if key != "bias"}
        assert own["centroids.weight"].dtype == blocks.book_dtype(original[f"{name}.weight"].dtype)
    assert dense == original.keys() - {f"{name}.weight" for name in plan.specs}
    assert all(torch.equal(tensors[name], original[name]) for name in dense)
    old = json.loads((source / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "quantization_config"} == old
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        written, given = (json.loads((folder / name).read_text()) for folder in (out, source))
        assert written | given == written, name  # transformers adds to what it was given
    return tensors


@pytest.mark.parametrize("calibrated", [True, False], ids=["text file", "self-written"])
@pytest.mark.parametrize("which", ["tied", "untied"])
def test_a_run_writes_a_whole_checkpoint(
    which: str, calibrated: bool, text_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(which)
    recipe = COARSE.model_copy(update={"calibration": (str(text_file),) if calibrated else ()})
    plan = run(source, tmp_path / "out", recipe)
    tensors = check_files(source, tmp_path / "out", plan)
    assert len(plan.specs) == 14 and plan.weights == sum(s.shape[0] * s.shape[1] for s in plan.specs.values())
    assert ("lm_head.weight" in tensors) == (which == "untied")
    assert ("model.layers.0.self_attn.q_proj.bias" in tensors) == (which == "tied")
    assert Recipe.load(tmp_path / "out" / "vptq_recipe.json") == recipe
    assert not (tmp_path / "out" / "parts").exists()


def test_a_model_in_shards_and_float16(text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", dtype=torch.float16, tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for file in source.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    recipe = COARSE.model_copy(update={"calibration": (str(text_file),)})
    tensors = []
    for name in ("source", "shards"):
        plan = run(tmp_path / name, tmp_path / f"{name}-vptq", recipe)
        tensors.append(check_files(tmp_path / name, tmp_path / f"{name}-vptq", plan))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_rules_reach_the_files(untied: Path, tmp_path: Path) -> None:
    rules = (
        Rule(match="*.down_proj", vector_length=4, norm=False),
        Rule(match="*.q_proj", residual_centroids=8, perm=True),
        Rule(match="model.layers.0.*", skip=True),
    )
    plan = run(untied, tmp_path / "out", COARSE.model_copy(update={"rules": rules}))
    check_files(untied, tmp_path / "out", plan)  # with layer 0 dense, bit for bit
    assert len(plan.specs) == 7 and all(name.startswith("model.layers.1.") for name in plan.specs)
    down, q = plan.specs["model.layers.1.mlp.down_proj"], plan.specs["model.layers.1.self_attn.q_proj"]
    assert (down.vector_len, down.enable_norm, q.num_res_centroids, q.enable_perm) == (4, False, 8, True)


@pytest.mark.parametrize("calibrated", [True, False], ids=["text file", "self-written"])
def test_two_runs_write_the_same_bits(tied: Path, text_file: Path, tmp_path: Path, calibrated: bool) -> None:
    recipe = COARSE.model_copy(update={"calibration": (str(text_file),) if calibrated else ()})
    for i, noise in enumerate((1, 2)):
        torch.manual_seed(noise)
        run(tied, tmp_path / str(i), recipe)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir() if f.name != REPORT} for d in "01")
    assert one.keys() == two.keys() and all(one[name] == two[name] for name in one)
    if not calibrated:
        run(tied, tmp_path / "other", recipe.model_copy(update={"seed": 5}))
        assert any((tmp_path / "other" / f).read_bytes() != data for f, data in one.items() if "safetensors" in f)


# ---------------------------------------------------------------------------------------------------------------
# What it is worth


def test_many_bits_are_close_to_the_original(tied: Path, fine: Path, tmp_path: Path) -> None:
    run(tied, tmp_path / "coarse", COARSE)
    dense, tokenizer = load_any(str(tied), CPU)
    value, apart = {"dense": perplexity(dense, tokenizer, TEXT, 64, 2048)}, {}
    for name, folder in (("fine", fine), ("coarse", tmp_path / "coarse")):
        found = score(load_any(str(folder), CPU)[0], tokenizer, TEXT, 64, 2048, reference=dense)
        value[name], apart[name] = found.perplexity, found.divergence
    assert value["fine"] == pytest.approx(value["dense"], rel=0.01)
    assert apart["fine"] < apart["coarse"] / 1000  # a random model's perplexity says little


def test_a_checkpoint_equals_its_dense_twin(tied: Path, fine: Path, tmp_path: Path) -> None:
    write_dense(fine, tmp_path / "dense", torch.float32)
    tensors, specs = read(fine), read_config(fine)[1]
    twin = load_file(tmp_path / "dense" / "model.safetensors")
    assert twin.keys() == read(tied).keys()
    for name, tensor in twin.items():
        module = name.removesuffix(".weight")
        coded = module in specs and name.endswith(".weight")
        expected = dequantize(module_tensors(tensors, module), specs[module]) if coded else tensors[name]
        assert torch.equal(tensor, expected), name
    (a, _), (b, _) = load_any(str(fine), CPU), load_any(str(tmp_path / "dense"), CPU)
    ids = torch.arange(2, 66)[None]
    assert torch.equal(a(ids).logits, b(ids).logits)
    assert a.lm_head.weight.data_ptr() == a.model.embed_tokens.weight.data_ptr()
    assert not {"quantization_config", "quant_config"} & json.loads((tmp_path / "dense/config.json").read_text()).keys()


def test_the_moments_are_those_of_the_text(tied: Path, text_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Of the first layer on the original's inputs, of others on those that the coded layers before it give."""
    seen: list[Tensor] = []
    original = blocks.solve

    def spy(weight: Tensor, moment: Tensor, *more: Any) -> Any:
        seen.append(moment.clone())
        return original(weight, moment, *more)

    monkeypatch.setattr(blocks, "solve", spy)
    recipe = COARSE.model_copy(update={"calibration": (str(text_file),)})
    names = list(run(tied, tmp_path / "out", recipe).specs)
    dense, tokenizer = load_any(str(tied), CPU)
    coded, _ = load_any(str(tmp_path / "out"), CPU)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0, :2048].view(32, 64)
    for model, name in [(dense, "0.self_attn.k_proj"), (coded, "0.mlp.down_proj"), (coded, "1.self_attn.v_proj")]:
        inputs: list[Tensor] = []
        linear = model.get_submodule(f"model.layers.{name}")
        linear.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.inference_mode():
            model(ids)
        x = inputs[0].flatten(0, 1).double()
        found = seen[names.index(f"model.layers.{name}")].double()
        torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-3, atol=1e-3)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every second moment that a run takes the mean of."""
    found: list[int] = []
    mean = SecondMoment.mean
    monkeypatch.setattr(SecondMoment, "mean", lambda self, *total: found.append(self.tokens) or mean(self, *total))
    return found


@pytest.mark.parametrize(("tokens", "context"), [(1024, 64), (3000, 64), (1100, 700)])
def test_every_calibration_token_is_used(
    tied: Path, text_file: Path, tmp_path: Path, counted: list[int], tokens: int, context: int
) -> None:
    update = {"tokens": tokens, "context": context, "calibration": (str(text_file),)}
    run(tied, tmp_path / "out", COARSE.model_copy(update=update))
    assert min(counted) >= tokens


def test_training_reads_on_after_what_moments_are_taken_of(
    tied: Path, text_file: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, tune = [], training.tune_model
    monkeypatch.setattr(training, "tune_model", lambda *all: batches.extend(all[2]) or tune(*all))
    update = {"calibration": (str(text_file),), "finetune": Finetuning(steps=3, tokens=1024)}
    run(tied, tmp_path / "out", COARSE.model_copy(update=update))
    assert set(counted) == {2048} and [ids.numel() for ids in batches] == [1024] * 3
    assert len(torch.cat(batches).unique(dim=0)) == 48


# ---------------------------------------------------------------------------------------------------------------
# What is refused


def refused(*arguments: Any, match: str) -> None:
    with pytest.raises(QuantizeError, match=match) as caught:
        run(*arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_an_out_that_is_not_empty_is_left_alone(tied: Path, fine: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(tied, tmp_path, COARSE, match="not empty")
    refused(tied, tmp_path / "notes.txt", COARSE, match=r"notes\.txt")
    refused(tied, tmp_path / "notes.txt" / "below", COARSE, match=r"notes\.txt")
    with pytest.raises(QuantizeError, match="not empty"):
        write_dense(fine, tmp_path, torch.float32)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"] and (tmp_path / "notes.txt").read_text() == "mine"


def test_recipes_that_do_not_fit_the_model(tied: Path, text_file: Path, tmp_path: Path) -> None:
    def change(**update: Any) -> Recipe:
        return FINE.model_copy(update=update)

    refused(tied, tmp_path / "a", change(rules=(Rule(match="*", skip=True),)), match="skips every")
    refused(tied, tmp_path / "b", change(centroids=65536), match=r"model\.layers.*dense")
    refused(
        tied, tmp_path / "c", change(calibration=(str(text_file),), tokens=30000), match=r"30016 are needed.*--tokens"
    )
    (tmp_path / "empty.txt").write_text("")
    refused(tied, tmp_path / "d", change(calibration=(str(tmp_path / "empty.txt"),)), match="has 0 tokens")
    refused(tied, tmp_path / "e", change(calibration=(str(tmp_path / "absent.txt"),)), match=r"absent\.txt")
    if not torch.cuda.is_available():
        refused(tied, tmp_path / "f", change(device="cuda"), match="cuda")


def test_models_that_cannot_be_quantized(tied: Path, fine: Path, tmp_path: Path) -> None:
    refused(make_model(tmp_path / "gpt2", GPT2LMHeadModel), tmp_path / "a", COARSE, match="nothing to quantize")
    refused(tmp_path / "absent", tmp_path / "b", COARSE, match="absent.*no such directory")


def test_a_quantized_model_is_not_quantized_again(fine: Path, tmp_path: Path) -> None:
    refused(fine, tmp_path / "out", COARSE, match="quantized already")


def test_a_truncated_source_is_named(tied: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tied, tmp_path / "cut"))
    truncate(source / "model.safetensors")
    refused(source, tmp_path / "out", COARSE, match="cut")
    with pytest.raises((QuantizeError, VPTQFormatError), match="cut"):
        load_any(str(source), CPU)


@pytest.mark.parametrize("calibrated", [True, False], ids=["text file", "self-written"])
def test_weights_that_are_not_finite_are_refused(tied: Path, text_file: Path, tmp_path: Path, calibrated: bool) -> None:
    """In a process of its own. The inputs of down_proj are finite, its weight is not, nor is what the model says."""
    source = Path(shutil.copytree(tied, tmp_path / "nan"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    words = ["--tokens", 2048, "--context", 64, "--centroids", 16, *(["--calibration", text_file] * calibrated)]
    done = command("run", source, "--out", tmp_path / "out", *words)
    assert done.returncode == 1 and one_line(done.stderr).startswith("error: "), done
    assert "model.layers.1.mlp.down_proj" in one_line(done.stderr) or not calibrated


def truncate(file: Path, left: float = 0.5) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * left)])


def damaged(folder: Path, out: Path, match: str) -> None:
    """Both readers refuse it, in one line."""
    for read_it in (lambda: load_any(str(folder), CPU), lambda: write_dense(folder, out, torch.float32)):
        with pytest.raises(VPTQFormatError, match=match) as caught:
            read_it()
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("left", [0.99, 0.5, 0.001, 0.0])
def test_a_truncated_file_is_named(broken: Path, tmp_path: Path, left: float) -> None:
    truncate(next(broken.glob("*-00002-of-*.safetensors")), left)
    damaged(broken, tmp_path / "out", match=r"00002-of")


def drop(folder: Path, part: str) -> None:
    for file in folder.glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if part not in n}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("key", ["indices", "centroids.weight", "res_centroids.weight", "perm", "weight_bias"])
def test_a_missing_tensor_is_named(broken: Path, tmp_path: Path, key: str) -> None:
    drop(broken, f"layers.1.mlp.up_proj.{key}")
    damaged(broken, tmp_path / "out", match=rf"model\.layers\.1\.mlp\.up_proj.*{key}")


@pytest.mark.parametrize("part", ["layers.1.mlp.up_proj.", "layers.0.mlp."])
def test_a_missing_module_is_named(broken: Path, tmp_path: Path, part: str) -> None:
    drop(broken, part)
    damaged(broken, tmp_path / "out", match=part)


def test_a_missing_dense_tensor_is_named(broken: Path) -> None:
    drop(broken, "model.norm.weight")
    with pytest.raises(VPTQFormatError, match=r"model\.norm\.weight"):
        load_any(str(broken), CPU)


def test_a_broken_configuration_is_named(broken: Path, tmp_path: Path) -> None:
    set_config(broken, "num_centroids", [-1, 100])
    damaged(broken, tmp_path / "out", match="num_centroids 100")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", b"\xff\xfe"], ids=str)
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for read_it in (lambda: read_config(tmp_path), lambda: load_any(str(tmp_path), CPU)):
        with pytest.raises((QuantizeError, VPTQFormatError)) as caught:
            read_it()
        assert len(str(caught.value).splitlines()) == 1
