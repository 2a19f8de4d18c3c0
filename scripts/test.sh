#!/usr/bin/env bash
# Runs the linters, the type checker and the tests; arguments go to pytest (scripts/test.sh -k format).
set -euo pipefail
source "$(dirname "$0")/common.sh"

install quantize fetch test
# Quick tests do not gain from threads that wait for each other; vLLM's engines choose their own.
export HF_HUB_OFFLINE=1

say "ruff"
ruff check .
ruff format --check .
say "clang-format"
find csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' | xargs clang-format --dry-run -Werror
say "mypy"
mypy
say "pytest"
python -m pytest "$@"
