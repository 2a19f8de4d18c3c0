"""Which devices a run uses, how they share work, and how a model on the host has its blocks visit one."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from quantize.errors import QuantizeError

T = TypeVar("T")
Job = tuple[float, Callable[[torch.device], T]]
"""How much work it is, in any unit, and the work: a module's function with all arguments but the device."""
Done = Callable[[int, Any], None]
"""Is given the number of a job and its result as soon as there is one."""
Share = Callable[[Sequence[Job], Done], list]
"""Has jobs done, all of them, wherever: gives their results in order."""


def choose_devices(name: str) -> list[torch.device]:
    """The devices for ``auto``, ``cpu`` or ``cuda``: all visible GPUs, or the CPU.

    QuantizeError for another name, and for ``cuda`` without GPUs.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise QuantizeError(f"device {name}, expected one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise QuantizeError("device cuda was asked for and torch finds none")
    if name == "cpu" or not torch.cuda.is_available():
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def be_deterministic() -> None:
    """Has torch choose what gives the same bits every time; before the first product on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    if torch.cuda.is_available():  # a CPU's are already, and the call takes seconds: it imports torch's compiler
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    # Filling new memory would only hide that it is read before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False


def repeatable_gradients(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """For backward passes: attention as plain products on a GPU, whose fused kernels add up gradients atomically.

    torch's own switch makes them deterministic only where it may also refuse whatever cannot be.
    """
    kernel: contextlib.AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return kernel if device.type == "cuda" else contextlib.nullcontext()


def ignore(i: int, result: Any) -> None:
    """What to do with a result before the others are there: nothing."""


def share(devices: Sequence[torch.device], jobs: Sequence[Job[T]], done: Done = ignore) -> list[T]:
    """The jobs' results, in order. Each device works on one job at a time; the largest are given away first.

    A job must give the same on every device. The first error is raised once all devices have stopped.
    """
    queues: list[list[int]] = [[] for _ in devices]
    load = [0.0] * len(devices)
    for i in largest_first(jobs):
        least = load.index(min(load))
        queues[least].append(i)
        load[least] += jobs[i][0]
    results: dict[int, T] = {}

    def work(device: torch.device, queue: list[int]) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for i in queue:
                results[i] = jobs[i][1](device)
                done(i, results[i])

    if len(devices) == 1:
        work(devices[0], queues[0])
    else:
        with ThreadPoolExecutor(len(devices)) as pool:
            for future in [pool.submit(work, *pair) for pair in zip(devices, queues, strict=True)]:
                future.result()
    return [results[i] for i in range(len(jobs))]


def largest_first(jobs: Sequence[Job]) -> list[int]:
    """The jobs' numbers in the order to begin them in."""
    return sorted(range(len(jobs)), key=lambda i: -jobs[i][0])


@contextlib.contextmanager
def resident(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module with its parameters and buffers on a device; afterwards it has again those it had, unchanged.

    What is given to the module meanwhile goes with the visit.
    """
    with _visiting(list(module.modules()), device):
        yield


@contextlib.contextmanager
def _visiting(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]
    moved: dict[int, Any] = {}  # tied ones once

    def there(tensor: Any) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in moved:
            with torch.inference_mode(False):
                data = tensor.detach().to(device)
                kept = isinstance(tensor, nn.Parameter)
                moved[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if kept else data
        return moved[id(tensor)]

    for module, parameters, buffers in before:
        module._parameters.update({name: there(tensor) for name, tensor in parameters.items()})
        module._buffers.update({name: there(tensor) for name, tensor in buffers.items()})
    moved.clear()
    try:
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def fits(model: nn.Module, device: torch.device) -> bool:
    """Whether a device has room for a whole model, and for as much again to work with it."""
    if device.type == "cpu":
        return True
    return 2 * sum(parameter.nbytes for parameter in model.parameters()) < free_memory(device)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that nobody has, and those that torch keeps for itself and no tensor has."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


@contextlib.contextmanager
def streamed(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """A model that can be called on a device: whole if it fits, else one block at a time.

    With gradients, blocks come a second time and compute again what the backward pass needs (checkpointing,
    https://arxiv.org/abs/1604.06174).
    """
    if fits(model, device):
        with resident(model, device):
            yield
        return
    inside = {id(module) for block in blocks for module in block.modules()}
    with (
        _visiting([module for module in model.modules() if id(module) not in inside], device),
        _by_blocks(blocks, device),
    ):
        yield


@contextlib.contextmanager
def _by_blocks(blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    def visit(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def once(*args: Any, **kwargs: Any) -> Any:
            with resident(block, device):
                return forward(*args, **kwargs)

        def called(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return checkpoint(once, *args, use_reentrant=False, **kwargs)
            return once(*args, **kwargs)

        return called

    for block in blocks:
        block.forward = visit(block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class Clock:
    """Seconds by step, of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[step] += time.perf_counter() - started


_earlier: dict[torch.device, tuple[int, int]] = {}
"""Peaks of GPUs, held and reserved, from before torch's counters were last set back."""


def start_peak(device: torch.device) -> None:
    """Has :func:`peak_memory` count from here on: what follows has a peak of its own. On CPUs nothing.

    One piece of work on a GPU at a time can have one; GPUs do not mind each other.
    """
    if device.type == "cuda":
        torch.cuda.init()  # which setting counters back does not do by itself
        _earlier[device] = total_peak(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The most memory held, bytes: on a GPU its own since :func:`start_peak`, what was there before included.

    On CPUs the process's so far, which nothing sets back.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_host_memory()


def total_peak(device: torch.device) -> tuple[int, int]:
    """The most memory of a GPU that tensors held and that torch reserved since :func:`forget_peaks`, bytes."""
    held, reserved = _earlier.get(device, (0, 0))
    return max(held, torch.cuda.max_memory_allocated(device)), max(reserved, torch.cuda.max_memory_reserved(device))


def forget_peaks(device: torch.device) -> None:
    """Has :func:`total_peak` of a GPU count from here on."""
    start_peak(device)
    _earlier.pop(device, None)


def peak_host_memory() -> int:
    """The most memory the process held so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
