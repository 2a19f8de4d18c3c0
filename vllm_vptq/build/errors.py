"""What went wrong with a build, in one line that ends in what to do about it."""

from __future__ import annotations

import re

# nvcc, g++ and clang++ say "error:" or "fatal error:", nvcc's driver "nvcc fatal   :", linker and loader neither.
_ERROR = re.compile(r"\b(error|fatal)\s*:|cannot find -l|undefined (reference|symbol)|cannot open shared object")


class BuildError(RuntimeError):
    """A native library that could not be built, and what to do about it."""


def first_error(output: str) -> str:
    """The line of a compiler's output that tells most: its first error, or else its last word."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "no output")
