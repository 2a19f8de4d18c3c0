"""Work shared among devices, and models whose blocks visit one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantize import devices, estimate, pipeline
from quantize.devices import Clock, choose_devices, fits, free_memory, resident, share, streamed
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
    assert estimate.too_large(model, COARSE, CPU) and not estimate.too_large(model, COARSE, CPU, calibrated=True)


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
        batches = Run(nothing, nothing, [], recipe, nothing, nothing, ids, [torch.device(device)]).block_batches()
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
