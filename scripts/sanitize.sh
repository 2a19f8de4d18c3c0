#!/usr/bin/env bash
# All CUDA kernels under compute-sanitizer's memcheck and racecheck, on the tiny layers of tests/sanitize.py: one family
# of kernels a run, each with a time limit, several at once. Ends with a table; exit code 1 unless all are clean.
# Kernels that this GPU does not have are left out ("not on this GPU"), but something must have been clean.
#   scripts/sanitize.sh [--list] [--tool memcheck|racecheck] [--limit SECONDS] [--jobs N] [FAMILY...]
# To be run in the environment that vllm-vptq is installed in, with its extra `test`; PYTHON and COMPUTE_SANITIZER name
# others than the path's.
set -euo pipefail
source "$(dirname "$0")/common.sh"

python=$(command -v "${PYTHON:-python}") || die "no ${PYTHON:-python}; activate the environment that vllm-vptq is installed in, or set PYTHON"
"$python" -c 'import pytest, hypothesis' 2>/dev/null || die "no pytest or no hypothesis for $python; pip install -e '.[test]' in its environment"
tools=(memcheck racecheck) limit=300 parallel=4 chosen=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --list) exec "$python" -m tests.sanitize --list ;;
    --tool) tools=("${2:?}"); shift ;;
    --limit) limit=${2:?}; shift ;;
    --jobs) parallel=${2:?}; shift ;;
    -*) die "no option $1; --list, --tool, --limit, --jobs" ;;
    *) chosen+=("$1") ;;
  esac
  shift
done

families=$("$python" -m tests.sanitize --list | cut -f 1,2)
for name in "${chosen[@]}"; do
  cut -f 1 <<<"$families" | grep -qx -- "$name" || die "no family $name; --list shows them"
done
sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")}
command -v "$sanitizer" >/dev/null || die "no $sanitizer; it is part of the CUDA toolkit; install it, or set COMPUTE_SANITIZER"
"$python" -m tests.sanitize --build || die "the kernels cannot run here, see above"
results=$logs/sanitize
rm -rf "$results"; mkdir -p "$results"

# one TOOL FAMILY KERNELS: a run, with its output in a log, and how it ended in a file.
one() {
  local log=$results/$1-$2.log begin=$SECONDS code=0 options=() ended
  for kernel in ${3//,/ }; do options+=(--kernel-name "kns=$kernel"); done
  # Of what torch's allocator hands out, memcheck sees no end; and torch's own calls may fail on purpose.
  [[ $1 == memcheck ]] && options+=(--report-api-errors no)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 "$limit" "$sanitizer" --tool "$1" --error-exitcode 99 "${options[@]}" \
    "$python" -m tests.sanitize "$2" </dev/null >"$log" 2>&1 || code=$?
  case $code in
    # A sanitizer that says nothing has seen nothing.
    0) ended=clean; grep -Eq 'SUMMARY: 0 (errors|hazards)' "$log" || ended="no summary" ;;
    4) ended="not on this GPU" ;;
    99) ended="found errors" ;;
    124) ended="over $limit s" ;;
    # By the time limit, if it had to insist, or by a machine short of memory.
    137) ended=killed; ((SECONDS - begin < limit)) || ended="over $limit s" ;;
    *) ended="failed ($code)" ;;
  esac
  printf '%s\t%d s' "$ended" $((SECONDS - begin)) >"$results/$1-$2"
}

for tool in "${tools[@]}"; do
  while IFS=$'\t' read -r family kernels; do
    [[ ${#chosen[@]} -eq 0 || " ${chosen[*]} " == *" $family "* ]] || continue
    while (($(jobs -rp | wc -l) >= parallel)); do wait -n; done
    one "$tool" "$family" "$kernels" &
  done <<<"$families"
done
wait

say "compute-sanitizer, logs in $results"
bad=0 clean=0
for result in "$results"/*; do
  [[ $result == *.log ]] && continue
  IFS=$'\t' read -r ended seconds <"$result" || true
  name=${result##*/}
  printf '%-10s %-10s %-16s %s\n' "${name#*-}" "${name%%-*}" "$ended" "$seconds"
  [[ $ended != clean ]] || clean=1
  [[ $ended == clean || $ended == not* ]] || { bad=1; grep -m 1 -E '=========.*(Invalid|Error|Race|hazard)|[Ee]rror' "$result.log" || true; }
done
((bad || clean)) || die "nothing was watched: this GPU has no kernels of these families; choose others, or another GPU"
exit $bad
