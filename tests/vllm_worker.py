"""Generates with vLLM and writes what came out:   vllm_worker.py JOB.json OUT.json   (see engines.run_vllm)."""

import json
import os
import sys
from pathlib import Path


def main(job: dict) -> list[dict]:
    from vllm import LLM, SamplingParams

    options = job["options"]
    sampling = SamplingParams(temperature=0, max_tokens=options.pop("max_tokens"), logprobs=2, ignore_eos=True)
    outputs = LLM(job["model"], disable_log_stats=True, **options).generate(job["prompts"], sampling, use_tqdm=False)
    results = []
    for output in outputs:
        completion = output.outputs[0]
        steps = [sorted((entry.logprob for entry in step.values()), reverse=True) for step in completion.logprobs]
        results.append(
            {
                "tokens": list(completion.token_ids),
                "logprobs": [step[0] for step in steps],
                "runner_up": [step[1] for step in steps],
                "text": completion.text,
            }
        )
    return results


if __name__ == "__main__":
    job, out = (Path(argument) for argument in sys.argv[1:])
    results = main(json.loads(job.read_text()))
    out.write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # results are written; an engine's shutdown need not be waited for
