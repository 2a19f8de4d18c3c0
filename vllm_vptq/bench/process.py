"""A worker in a process group of its own, so that all memory it took is free when it is done, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_vptq.bench import worker
from vllm_vptq.bench.settings import BenchError, Contestant, Settings

_ERROR = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception): .+)$")
_INVALID = re.compile(r"Value error, (.+?)(?:\. [A-Z]| \[type=|$)")
_LOADED = re.compile(r"Model loading took .*? and ([\d.]+) seconds")
_LIVE: set[subprocess.Popen[str]] = set()
_PATIENCE_S = 30
"""Given to engines for an orderly end, and to killed processes for theirs."""


def run(
    contestant: Contestant, settings: Settings, env: Mapping[str, str] | None = None, limit_s: float | None = None
) -> Iterator[dict[str, Any]]:
    """The worker's events as they come, ``started`` with ``load_s`` added.

    The engine is not used before the event after ``started`` is asked for: then it has the GPU to itself if the caller
    sees to that. ``env`` is added to the environment. BenchError, with the cause and where the log is, if it fails, or
    takes longer than ``limit_s`` to start or then to measure.
    """
    handle, name = tempfile.mkstemp(prefix="vllm-vptq-bench-", suffix=".log")
    log = Path(name)
    job = worker.job(str(contestant.folder), contestant.load_format, settings)
    with os.fdopen(handle, "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_vptq.bench.worker", job],
            env=os.environ | dict(env or {}) | _layout(contestant),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    _LIVE.add(process)
    clock = _Clock(process, limit_s)
    done = False
    try:
        assert process.stdout and process.stdin
        for line in process.stdout:
            event = json.loads(line)
            done = event["event"] == "done"
            if done:
                _wait(process)
                break
            if event["event"] != "started":
                yield event
                continue
            clock.stop()
            yield event | {"load_s": load_seconds(log.read_text(errors="replace"))}
            clock = _Clock(process, limit_s)
            with contextlib.suppress(BrokenPipeError):  # it has ended, which the next line tells
                print(file=process.stdin, flush=True)
    finally:
        clock.stop()
        end_group(process)
        _LIVE.discard(process)
    if not done:
        why = f"no end within {limit_s:.0f} s" if clock.struck else cause(log.read_text(errors="replace"))
        raise BenchError(f"{contestant.name}: {why}; its log is {log}")
    log.unlink()


class _Clock:
    """Kills a process's group after ``limit_s`` seconds (None: never)."""

    def __init__(self, process: subprocess.Popen[str], limit_s: float | None) -> None:
        self.struck = False
        self._process = process
        self._timer = threading.Timer(limit_s or 0, self._strike)
        self._timer.daemon = True
        if limit_s is not None:
            self._timer.start()

    def _strike(self) -> None:
        self.struck = True
        _kill(self._process)

    def stop(self) -> None:
        self._timer.cancel()


def end_all() -> None:
    """Kills all workers that run; those who wait for their events are told that they failed."""
    for process in list(_LIVE):
        _kill(process)


def _layout(contestant: Contestant) -> dict[str, str]:
    return {"VLLM_VPTQ_LAYOUT": contestant.layout} if contestant.layout else {}


def load_seconds(log: str) -> float | None:
    """What vLLM says that loading the weights took, of the slowest rank; None if it says nothing."""
    return max(map(float, _LOADED.findall(log)), default=None)


def _wait(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kills what is left of the group and waits for it: the next engine looks for free memory at once."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and _kill(process):
        process.poll()
        time.sleep(0.1)
    process.wait()


def _kill(process: subprocess.Popen[Any]) -> bool:
    """Whether anything was left to kill."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def cause(log: str) -> str:
    """The first error that a log names: those below it follow from it."""
    lines = log.strip().splitlines() or ["ended without a word"]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if match := _ERROR.search(line):
            # Of an option that vLLM refuses, the reason comes a line later, and advice after it.
            detail = _INVALID.search(following) if "validation error" in line else None
            return f"{match[1]}: {detail[1]}" if detail else match[1]
    return lines[-1]
