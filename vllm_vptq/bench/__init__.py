"""The serving comparison: VPTQ checkpoints, the dense model and a 4-bit one, measured in vLLM's engine one by one.

A step is timed as the difference between generating many tokens and generating few, over the difference of the two
counts: what every run pays once (scheduling, prefill, the first step) cancels. Prompts are random tokens, new ones in
every run, and the prefix cache is off, so no run finds work done by another.
"""

from __future__ import annotations

METHOD = (
    "ms_per_step: the median time of generating all steps less that of a sixteenth of them, over the difference of the "
    "counts; tokens_per_s: batch over ms_per_step; first_token_ms: median time of generating one token; weight_gib: on "
    "one card; greedy, new random prompts in every run, no prefix cache"
)
"""Written into every file of results."""
