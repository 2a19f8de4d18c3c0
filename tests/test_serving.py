"""vLLM on a VPTQ checkpoint against vLLM on the dense checkpoint that ``dequantize`` makes of it: one model, twice."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from tests.checkpoints import f2_section, rewrite_model
from tests.engines import run_vllm, vllm_environment
from vllm_vptq.format import LayerSpec

pytestmark = pytest.mark.vllm

PROMPTS = [
    "Once upon a time",
    "The little dog was very",
    "One day, Tom and Lily went to the park. They saw a big tree. " * 4,
]

# Everything at once: shards of a fused layer that differ in v, k, r, perm and norm, one of them dense in one block;
# vectors that divide neither 48-wide heads nor a shard; groups and outliers under row parallel.
SPECS = {
    "q_proj": dict(vector_len=4, num_centroids=1024, num_res_centroids=64, enable_perm=True, enable_norm=True),
    "k_proj": dict(vector_len=5, num_centroids=4096, enable_perm=True),
    "v_proj": dict(vector_len=5, num_centroids=256, num_res_centroids=1024, enable_norm=True, norm_dim=1),
    "o_proj": dict(
        vector_len=7, num_centroids=2048, num_res_centroids=256, enable_perm=True, enable_norm=True, group_num=3,
    ),
    "gate_proj": dict(vector_len=4, num_centroids=2048, is_indice_packed=False),
    "up_proj": dict(vector_len=5, num_centroids=512, num_res_centroids=512, is_indice_packed=False, enable_perm=True),
    "down_proj": dict(
        vector_len=6, num_centroids=4096, num_res_centroids=512, enable_perm=True, enable_norm=True,
        group_num=2, outlier_size=32, outlier_vector_len=4, num_outlier_centroids=1000,
    ),
}  # fmt: skip


def choose(name, out_features, in_features, generator):
    if name == "model.layers.2.mlp.up_proj":
        return None
    return LayerSpec(in_features, out_features, **SPECS[name.rpartition(".")[2]])


@pytest.fixture(scope="module")
def twins(stories, tmp_path_factory):
    return rewrite_model(stories, tmp_path_factory.mktemp("float32"), choose)


@pytest.fixture(scope="module")
def dense_float32(twins, tmp_path_factory):
    return run_vllm(twins[1], PROMPTS, tmp_path_factory.mktemp("run"))


def assert_same(found, wanted, tolerance, near_ties=False):
    """The same tokens and logprobs. With ``near_ties``, a sequence may part where the two best lie so close on both
    sides that errors within the tolerance swap them."""
    alike = 0
    for a, b in zip(found, wanted, strict=True):
        for i, (token, other) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
            if token != other:
                gaps = [r["logprobs"][i] - r["runner_up"][i] for r in (a, b)]
                assert near_ties and sum(gaps) <= 2 * tolerance, (i, gaps, a["text"], b["text"])
                break
            alike += 1
            assert a["logprobs"][i] == pytest.approx(b["logprobs"][i], abs=tolerance)
    assert alike >= 8 * len(found), "parted at once"


@pytest.mark.parametrize(
    "options",
    [{"quantization": "vptq"}, {"enforce_eager": False, "tensor_parallel_size": 2}],
    ids=["eager", "compiled-tp2"],
)
def test_float32(twins, dense_float32, tmp_path, options):
    found = run_vllm(twins[0], PROMPTS, tmp_path, **options)
    assert_same(found, dense_float32, tolerance=2e-4)
    assert len({token for result in dense_float32 for token in result["tokens"]}) > 20, "the model babbles"


def test_bfloat16_compiled(stories, tmp_path):
    # The dense twin's weights are rounded to bfloat16 and the kernel's are not, so logprobs agree to bfloat16 only.
    vptq, dense = rewrite_model(stories, tmp_path, choose, dtype=torch.bfloat16)
    wanted = run_vllm(dense, PROMPTS, tmp_path, dtype="bfloat16")
    found = run_vllm(vptq, PROMPTS, tmp_path, dtype="bfloat16", enforce_eager=False)
    assert_same(found, wanted, tolerance=0.15, near_ties=True)


def test_fused_on_disk_untied_and_biased(tmp_path):
    """Phi-3's qkv_proj and gate_up_proj are one module on disk; random weights, so only the agreement counts."""
    from transformers import Phi3Config, Phi3ForCausalLM

    source = tmp_path / "source"
    config = Phi3Config(
        vocab_size=320, hidden_size=128, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    Phi3ForCausalLM(config).save_pretrained(source)

    def fused(name, out_features, in_features, generator):
        return LayerSpec(in_features, out_features, 6, 64, 32, enable_perm=True, enable_norm=True)

    def excluding_one(specs):
        # In the list, but named as not to be converted: the tensors on disk are dense.
        return {"quantization_config": f2_section(specs) | {"modules_to_not_convert": ["lm_head"]}}

    vptq, dense = rewrite_model(source, tmp_path, fused, section=excluding_one)
    prompts = [list(range(3, 40)), list(range(200, 310))]
    options = {"skip_tokenizer_init": True, "max_tokens": 24}
    prompts = [{"prompt_token_ids": ids} for ids in prompts]
    wanted = run_vllm(dense, prompts, tmp_path, **options)
    assert_same(run_vllm(vptq, prompts, tmp_path, tensor_parallel_size=2, **options), wanted, tolerance=2e-4)


# ---------------------------------------------------------------------------------------------------------------
# Configuration generations, as vLLM resolves them


def f0(specs):
    return {"quant_config": {name: spec.to_config() for name, spec in specs.items()}}


def f0b(specs):
    return {"quantization_config": f0(specs)["quant_config"]}


def f1(specs):
    return {"quantization_config": {"quant_method": "vptq", "config_for_layers": f0(specs)["quant_config"]}}


RESOLVE = """
import sys
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(sys.argv[1], quantization=sys.argv[2] or None, dtype="float32").create_engine_config()
print("RESOLVED", config.model_config.quantization, len(config.quant_config.specs))
"""


@pytest.mark.parametrize("quantization", ["", "vptq"], ids=["plain", "named"])
@pytest.mark.parametrize(
    "section", [f0, f0b, f1, lambda s: {"quantization_config": f2_section(s)}], ids=["F0", "F0b", "F1", "F2"]
)
def test_every_generation_is_recognised(stories, tmp_path, section, quantization):
    vptq, _ = rewrite_model(stories, tmp_path, _coarse, section=section)
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, str(vptq), quantization],
        env=os.environ | vllm_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RESOLVED vptq 42" in done.stdout, done.stderr[-3000:]


def _coarse(name, out_features, in_features, generator):
    return LayerSpec(in_features, out_features, 8, 16)


def test_a_corrupt_checkpoint_is_one_named_error(stories, tmp_path):
    vptq, _ = rewrite_model(stories, tmp_path, _coarse)
    from safetensors.torch import load_file, save_file

    tensors = load_file(vptq / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.centroids.weight"][0, 5] = float("nan")
    save_file(tensors, vptq / "model.safetensors")
    with pytest.raises(AssertionError, match=r"down_proj: tensor centroids.weight holds NaN"):
        run_vllm(vptq, PROMPTS, tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# The server, and a checkpoint of our own quantizer


@pytest.fixture(scope="module")
def quantized(stories, tmp_path_factory):
    """stories15M through ``vptq-quantize run``, calibrated on text it writes itself."""
    folder = tmp_path_factory.mktemp("quantized")
    command = [sys.executable, "-m", "quantize.cli", "run", str(stories), "--out", str(folder / "vptq")]
    subprocess.run([*command, "--tokens", "4096"], check=True, capture_output=True, env=os.environ | vllm_environment())
    dense = [sys.executable, "-m", "quantize.cli", "dequantize", str(folder / "vptq"), "--out", str(folder / "dense")]
    subprocess.run([*dense, "--dtype", "float32"], check=True, capture_output=True, env=os.environ | vllm_environment())
    return folder / "vptq", folder / "dense"


def test_vllm_serve(quantized, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(quantized[0]), "--port", str(port)]
    command += ["--quantization", "vptq", "--enforce-eager", "--max-model-len", "200", "--dtype", "float32"]
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen(command, env=os.environ | vllm_environment(), stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "serve.log")
        request = {"model": str(quantized[0]), "prompt": PROMPTS[0], "max_tokens": 30, "temperature": 0}
        answer = _post(f"http://127.0.0.1:{port}/v1/completions", request)["choices"][0]["text"]
    finally:
        server.terminate()
        server.wait(60)
    wanted = run_vllm(quantized[1], PROMPTS[:1], tmp_path, max_tokens=30)[0]["text"]
    assert answer == wanted
    assert "there was a little" in answer


def _wait_for(url, server, log):
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no answer: {log.read_text()[-3000:]}")


def _post(url, request):
    body = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(body, timeout=120).read())
