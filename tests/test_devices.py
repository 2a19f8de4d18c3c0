"""Work shared among devices, and models whose blocks visit one."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantize import blocks, devices, estimate, pipeline
from quantize.curvature import coupled
from quantize.devices import (
    Clock,
    choose_devices,
    fits,
    forget_peaks,
    free_memory,
    peak_memory,
    resident,
    share,
    streamed,
    total_peak,
)
from quantize.errors import QuantizeError
from quantize.evaluate import load_any
from quantize.model import decoder_blocks, first_inputs, load_shapes
from quantize.moments import output_gradients
from quantize.recipe import BlockTuning, Finetuning
from quantize.run import Run
from tests.tiny import COARSE, read, run

pytest_plugins = ("tests.tiny_fixtures",)
CPU = torch.device("cpu")


def test_shared_work_comes_back_in_order_and_runs_at_once() -> None:
    both = threading.Barrier(2)

    def job(number: int, _: torch.device) -> int:
        if number in (2, 3):  # the largest two, which go to different devices
            both.wait(timeout=20)
        return number * number

    sizes = [1.0, 2.0, 30.0, 40.0, 3.0]
    jobs = [(size, lambda device, i=i: job(i, device)) for i, size in enumerate(sizes)]
    assert share([CPU, CPU], jobs) == [0, 1, 4, 9, 16]
    assert share([CPU], [(1.0, lambda device: device)]) == [CPU]


def test_an_error_of_shared_work_is_raised() -> None:
    def fail(_: torch.device) -> None:
        raise QuantizeError("no factor")

    with pytest.raises(QuantizeError, match="no factor"):
        share([CPU, CPU], [(1.0, fail), (2.0, lambda _: None)])


@pytest.mark.parametrize("update", [{}, {"bits": 4.0}], ids=["fixed", "measured"])
def test_several_devices_write_what_one_writes(
    tied: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: dict
) -> None:
    recipe = COARSE.model_copy(update={"calibration": (str(text_file),)} | update)
    run(tied, tmp_path / "one", recipe)
    monkeypatch.setattr(pipeline, "choose_devices", lambda _: [CPU, CPU, CPU])
    run(tied, tmp_path / "three", recipe)
    one, three = read(tmp_path / "one"), read(tmp_path / "three")
    assert one.keys() == three.keys() and all(torch.equal(one[name], three[name]) for name in one)


def test_a_visit_leaves_nothing_behind() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {name: (tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    with pytest.raises(KeyError), resident(module, torch.device("meta")):
        assert all(parameter.device.type == "meta" for parameter in module.parameters())
        module[0].weight = nn.Parameter(torch.zeros(3, 3))
        raise KeyError
    after = module.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in before.items())


def test_tied_weights_visit_as_one() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    with resident(module, torch.device("meta")):
        assert module[0].weight is module[1].weight


@pytest.fixture
def model(tied: Path) -> nn.Module:
    return load_any(str(tied), CPU)[0]


def test_blocks_that_come_one_at_a_time_give_the_same(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations, arguments, gradients: as with the whole model on the device, and never more than one block there."""
    blocks = decoder_blocks(model)
    ids = [torch.randint(2, 200, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    rows = {name: [slice(0, 32)] for block in blocks for name in block.linears}
    whole = first_inputs(model, blocks, ids), output_gradients(model, blocks, rows, ids), model(ids[0]).logits
    present, most = 0, 0
    visiting = devices._visiting

    class Counted:
        def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
            self.inner, self.counts = visiting(modules, device), modules[0] in [block.module for block in blocks]

        def __enter__(self) -> None:
            nonlocal present, most
            present += self.counts
            most = max(most, present)
            self.inner.__enter__()

        def __exit__(self, *error: object) -> None:
            nonlocal present
            present -= self.counts
            self.inner.__exit__(*error)

    monkeypatch.setattr(devices, "fits", lambda *_: False)
    monkeypatch.setattr(devices, "_visiting", Counted)
    inputs, (weights, means) = first_inputs(model, blocks, ids), output_gradients(model, blocks, rows, ids)
    with streamed(model, [block.module for block in blocks], CPU), torch.no_grad():
        torch.testing.assert_close(model(ids[0]).logits, whole[2])
    assert most == 1 and present == 0
    for one, two in zip(inputs, whole[0], strict=True):
        assert torch.equal(one.hidden, two.hidden) and [a.keys() for a in one.arguments] == [
            a.keys() for a in two.arguments
        ]
    assert means == pytest.approx(whole[1][1], rel=1e-5)
    for name, expected in whole[1][0].items():
        torch.testing.assert_close(weights[name], expected)


def test_a_run_does_not_touch_the_weights_it_was_given(
    tied: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[nn.Module] = []
    load = pipeline.load
    monkeypatch.setattr(pipeline, "load", lambda *words: loaded.append((made := load(*words))[0]) or made)
    training = {"finetune": Finetuning(steps=3, tokens=256), "finetune_blocks": BlockTuning(steps=3)}
    run(tied, tmp_path / "out", COARSE.model_copy(update={"calibration": (str(text_file),)} | training))
    original = load_any(str(tied), CPU)[0].state_dict()
    found: dict[str, Tensor] = loaded[0].state_dict()
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in original.items())


def test_a_model_too_large_for_its_device_needs_text(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "fits", lambda *_: False)
    with pytest.raises(QuantizeError, match="--calibration"):
        run(tied, tmp_path / "out", COARSE)
    model = load_shapes(str(tied))
    plan = estimate.planned(model, COARSE)
    assert estimate.too_large(model, plan, COARSE, CPU)
    assert not estimate.too_large(model, plan, COARSE, CPU, calibrated=True)


def test_coupled_rows_need_room_for_their_matrices(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model where it is on the GPU whole; with the remedy."""
    model, gpu = load_shapes(str(tied)), torch.device("cuda", 0)
    recipe = COARSE.model_copy(update={"curvature": True, "calibration": ("c4.txt",)})
    plan = estimate.planned(model, recipe)
    matrices = 4 * sum(plan.shapes[name][0] ** 2 for name in coupled(plan.shapes))
    size = sum(parameter.nbytes for parameter in model.parameters())
    for whole, free, enough in [
        (False, 2 * matrices - 1, False),
        (False, 2 * matrices, True),
        (True, 2 * matrices, False),
        (True, 2 * matrices + size, True),
    ]:
        monkeypatch.setattr(estimate, "fits", lambda *_, whole=whole: whole)
        monkeypatch.setattr(estimate, "free_memory", lambda _, free=free: free)
        reason = estimate.too_large(model, plan, recipe, gpu)
        assert (reason is None) if enough else (reason and "curvature: false" in reason), (whole, free)
        assert estimate.too_large(model, plan, recipe.model_copy(update={"curvature": False}), gpu) is None


def test_a_model_too_large_to_be_trained_is_refused_before_any_work(
    tied: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "fits", lambda *_: False)
    monkeypatch.setattr(pipeline, "quantize_blocks", lambda *_: pytest.fail("hours of work"))
    update = {"calibration": (str(text_file),), "finetune": Finetuning(steps=3)}
    with pytest.raises(QuantizeError, match="steps: 0"):
        run(tied, tmp_path / "out", COARSE.model_copy(update=update))


def test_a_gpu_takes_larger_batches_unless_blocks_are_trained() -> None:
    ids = torch.zeros(64, 256, dtype=torch.int64)
    sizes = []
    for device, steps in (("cpu", 0), ("cuda", 0), ("cuda", 3)):
        recipe = COARSE.model_copy(update={"context": 256, "finetune_blocks": BlockTuning(steps=steps)})
        nothing: Any = None
        batches = Run(nothing, nothing, [], recipe, nothing, nothing, ids, ids, [torch.device(device)]).block_batches()
        sizes.append([len(batch) for batch in batches])
    assert sizes == [[8] * 8, [32] * 2, [8] * 8]


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices("cpu") == [CPU]
    assert choose_devices("auto") == choose_devices("cuda") == [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_devices("auto") == [CPU]
    with pytest.raises(QuantizeError, match="finds none"):
        choose_devices("cuda")
    with pytest.raises(QuantizeError, match="device tpu, expected one of"):
        choose_devices("tpu")


def test_a_clock_adds_up() -> None:
    clock = Clock(CPU)
    for _ in range(2):
        with clock("step"):
            sum(range(1000))
    assert clock.seconds.keys() == {"step"} and clock.seconds["step"] > 0


def test_what_torch_keeps_for_itself_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 500), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert free_memory(torch.device("cuda")) == 100 + 200
    model = torch.nn.Linear(6, 6, bias=False)  # twice 144 bytes
    assert fits(model, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 320)
    assert not fits(model, torch.device("cuda"))


class Memory:
    """Of GPUs that are not there: what torch counts of it, set back as torch does, to what is held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held, self.peak = Counter[torch.device](), Counter[torch.device]()
        for name, function in {
            "init": lambda: None,
            "device": lambda _: contextlib.nullcontext(),
            "max_memory_allocated": lambda device: self.peak[device],
            "max_memory_reserved": lambda device: 2 * self.peak[device],
            "reset_peak_memory_stats": lambda device: self.peak.update({device: self.held[device] - self.peak[device]}),
            "synchronize": lambda _: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(devices, "_earlier", {})

    def take(self, size: int, device: torch.device) -> None:
        """Allocates, or gives back."""
        self.held[device] += size
        self.peak[device] = max(self.peak[device], self.held[device])


def test_every_layer_has_a_peak_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the GPU it is coded on, while another codes others; and the peak of all is there as well."""
    memory, gpus = Memory(monkeypatch), [torch.device("cuda", 0), torch.device("cuda", 1)]
    both = threading.Barrier(2)

    def solve(size: int, device: torch.device, *_: Any) -> Any:
        memory.take(size << 20, device)
        both.wait(timeout=20)  # held on both at once
        memory.take(-size << 20, device)
        return SimpleNamespace(tensors={}, spec=None, error=0.0, steps={}, seconds={})

    monkeypatch.setattr(blocks, "solve", solve)
    monkeypatch.setattr(blocks, "effective_bits", lambda _: 2.0)
    for gpu in gpus:
        memory.take(900 << 20, gpu)
        memory.take(-900 << 20, gpu)
        forget_peaks(gpu)
    memory.take(100 << 20, gpus[0])  # the block
    sizes = {"up": 40, "gate": 30, "k": 20, "v": 10}
    nothing: Any = None
    jobs = []
    for name, size in sizes.items():
        target = SimpleNamespace(to=lambda _, size=size: size)
        moment = SimpleNamespace(to=lambda device: device)
        jobs.append((float(size), partial(blocks.coded_layer, target, name, nothing, moment, nothing, nothing, None)))
    peaks = {record["layer"]: record["peak_mib"] for _, record in share(gpus, jobs)}
    assert peaks == {"up": 140, "gate": 30, "k": 20, "v": 110}
    assert [total_peak(gpu) for gpu in gpus] == [(140 << 20, 280 << 20), (30 << 20, 60 << 20)]


def test_a_processs_peak_is_not_set_back() -> None:
    before = peak_memory(CPU)
    devices.start_peak(CPU)
    assert peak_memory(CPU) >= before > 0
