"""What the format can hold and this plugin does not serve, in the words of the error."""

from __future__ import annotations

import re

QUANTIZED_HEAD = "a quantized lm_head is not supported; list it in modules_to_not_convert"
QUANTIZED_EXPERTS = "quantized routed experts are not supported yet"


def limit_of(module: str) -> str | None:
    """Why a quantized module of this name is refused when loading, or None if it is not."""
    if module.rpartition(".")[2] == "lm_head":
        return QUANTIZED_HEAD
    return QUANTIZED_EXPERTS if re.search(r"\.experts\.\d+(\.|$)", module) else None
