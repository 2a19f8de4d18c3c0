"""How to install what is optional. The package is on no index: it is installed from its checkout."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """The line for an extra, in the words of the README."""
    return f'pip install -e ".[{extra}]" in the checkout of vllm-vptq'
