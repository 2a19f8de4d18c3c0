"""Layers coded on other machines, joined by Ray (https://www.ray.io), an optional extra.

A job takes one GPU, or where the cluster has none as many cores as torch has threads here. Its tensors travel through
Ray's object store, each once; the results are those of this machine, bit for bit, if the others have its kind of GPU,
or of processor, and its versions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantize.devices import Done, Job, be_deterministic, choose_devices, largest_first
from quantize.errors import QuantizeError
from vllm_vptq.extras import how_to_install


class Cluster:
    """A :data:`quantize.devices.Share` that has jobs done by Ray's workers; ``address`` as Ray takes it.

    ``auto`` is the cluster this machine is part of, ``local`` one of this machine alone.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise QuantizeError(f"--ray needs Ray: {how_to_install('ray')}") from error
        self._ray = ray
        try:
            ray.init(None if address == "local" else address, log_to_driver=False, ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise QuantizeError(f"--ray {address}: {(str(error).splitlines() or [''])[0]}") from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._on_gpus = any(node.get("GPU") for node in nodes)
        least = int(min(node.get("CPU", 1) for node in nodes))
        takes = {"num_gpus": 1} if self._on_gpus else {"num_cpus": min(torch.get_num_threads(), least)}
        self._do = ray.remote(**takes, max_retries=3)(_do)

    def __call__(self, jobs: Sequence[Job], done: Done) -> list:
        stored: dict[int, Any] = {}

        def sent(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in stored:
                stored[id(value)] = self._ray.put(value.detach().cpu())
            return stored[id(value)]

        waiting: dict[Any, int] = {}
        for i in largest_first(jobs):
            job = jobs[i][1]
            assert isinstance(job, partial)
            arguments = [sent(value) for value in job.args]
            waiting[self._do.remote(torch.get_num_threads(), self._on_gpus, job.func, *arguments)] = i
        results: dict[int, Any] = {}
        while waiting:
            (reference,), _ = self._ray.wait(list(waiting))
            i = waiting.pop(reference)
            try:
                results[i] = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            done(i, results[i])
        return [results[i] for i in range(len(jobs))]


def _do(threads: int, on_gpu: bool, work: Callable[..., Any], *arguments: Any) -> Any:
    """Runs in a worker: its GPU is the only one it sees."""
    torch.set_num_threads(threads)  # sums depend on how many there are
    be_deterministic()
    return work(*arguments, choose_devices("cuda" if on_gpu else "cpu")[0])
