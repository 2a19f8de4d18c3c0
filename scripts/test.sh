#!/usr/bin/env bash
# Runs the linters, the type checker and the tests; arguments go to pytest (scripts/test.sh -k format).
set -euo pipefail
source "$(dirname "$0")/common.sh"

install quantize fetch test
# Quick tests do not gain from threads that wait for each other; vLLM's engines choose their own.
export HF_HUB_OFFLINE=1
# The reference's package, which decodes what the quantizer writes; without its dependencies, which are many and old.
if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vptq") is None)'; then
  python -m pip install -q --no-deps vptq==0.0.5.post1 ||
    say "no package vptq for this Python (3.8 to 3.12 have one): tests/test_reference_package.py is skipped"
fi

say "ruff"
ruff check .
ruff format --check .
say "clang-format"
find csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' | xargs clang-format --dry-run -Werror
say "mypy"
mypy
say "pytest"
python -m pytest "$@"
