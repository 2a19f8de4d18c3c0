"""Real models that need no hub, and vLLM engines in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODELS = Path(os.environ.get("VLLM_VPTQ_TEST_MODELS", ROOT / ".cache" / "models"))


def fetch(name: str) -> Path:
    """A model of ``scripts/fetch_model.py``, kept between runs."""
    spec = importlib.util.spec_from_file_location("fetch_model", ROOT / "scripts" / "fetch_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fetch(name, MODELS)


def run_vllm(model: Path, prompts: list[str], tmp_path: Path, **options) -> list[dict]:
    """Greedy text from vLLM in a process of its own: token ids, their logprobs and the runner-up's, and text."""
    options = {"max_model_len": 200, "max_tokens": 40, "enforce_eager": True, "dtype": "float32"} | options
    job, out = tmp_path / "job.json", tmp_path / "out.json"
    job.write_text(json.dumps({"model": str(model), "prompts": prompts, "options": options}))
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "vllm_worker.py"), str(job), str(out)],
        env=os.environ | vllm_environment(options.get("tensor_parallel_size", 1)),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert out.exists(), f"vLLM failed:\n{_errors(done.stdout)}\n{done.stderr[-1500:]}"
    return json.loads(out.read_text())


def _errors(log: str) -> str:
    """The lines of an engine's log that name an error; a traceback of it is a hundred lines long."""
    return "\n".join(dict.fromkeys(line.partition("] ")[2] for line in log.splitlines() if "Error: " in line))


def vllm_environment(tp: int = 1) -> dict[str, str]:
    """For a small machine: little KV cache, and one core a rank where ranks are several."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind"
        if tp == 1
        else "|".join(str(rank % os.cpu_count()) for rank in range(tp)),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
