"""A worker in a process group of its own, so that all memory it took is free when it is done, however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_vptq.bench import worker
from vllm_vptq.bench.settings import BenchError, Contestant, Settings

_ERROR = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception): .+)$")
_PATIENCE_S = 30
"""Given to engines for an orderly end, and to killed processes for theirs."""


def run(contestant: Contestant, settings: Settings) -> Iterator[dict[str, Any]]:
    """The worker's events as they come. BenchError, with the cause and where the log is, if it fails."""
    handle, name = tempfile.mkstemp(prefix="vllm-vptq-bench-", suffix=".log")
    log = Path(name)
    job = worker.job(str(contestant.folder), contestant.load_format, settings)
    with os.fdopen(handle, "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_vptq.bench.worker", job],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    done = False
    try:
        assert process.stdout
        for line in process.stdout:
            event = json.loads(line)
            done = event["event"] == "done"
            if done:
                _wait(process)
                break
            yield event
    finally:
        end_group(process)
    if not done:
        raise BenchError(f"{contestant.name}: {cause(log.read_text(errors='replace'))}; its log is {log}")
    log.unlink()


def _wait(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kills what is left of the group and waits for it: the next engine looks for free memory at once."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        process.poll()
        time.sleep(0.1)
    process.wait()


def cause(log: str) -> str:
    """The first error that a log names: those below it follow from it."""
    found = (match[1] for line in log.splitlines() if (match := _ERROR.search(line)))
    return next(found, None) or (log.strip().splitlines() or ["ended without a word"])[-1]
