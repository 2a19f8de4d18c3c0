"""Chats with a checkpoint through vLLM's ``LLM`` and prints the answers.   generate.py MODEL"""

from __future__ import annotations

import sys
from pathlib import Path

QUESTIONS = ["What is the capital of France?", "Write two sentences about the sea."]


def main(model: str) -> None:
    from vllm import LLM, SamplingParams

    eager = not list(Path("/dev").glob("nvidia[0-9]"))  # on a CPU compiling takes longer than these answers
    llm = LLM(model, max_model_len=512, enforce_eager=eager, disable_log_stats=True)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = llm.chat(chats, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"  {question}\n    -> {' '.join(answer.outputs[0].text.split())}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
