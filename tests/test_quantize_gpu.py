"""The quantizer on a GPU: the same choices as on a CPU, the same bits every time. Skipped without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantize import blocks, devices, evaluate, native, pipeline
from quantize.columns import Segment, code_block_torch, decode, loss, sweep, sweep_block_torch, walk
from quantize.coupled import sweep_coupled, walk_coupled
from quantize.devices import be_deterministic, resident
from quantize.evaluate import load_any, on_device, score, windows_at_once
from quantize.hessian import add_products
from quantize.kmeans import Books, assign, assign_torch, kmeans, train_books
from quantize.recipe import BlockTuning, Finetuning, LayerRecipe, Recipe
from quantize.refine import fit_books, fit_norm
from quantize.slab import Coupling, Slab
from quantize.solver import Solution, solve
from quantize.sums import IndexedSums
from tests.random_coded import LAYERS, random_layer, trained_once
from tests.tiny import COARSE, TEXT, read, run

pytest_plugins = ("tests.tiny_fixtures",)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FORMATS = {"v8-k65536": (8, 65536, 0), "v8-k4096": (8, 4096, 0), "v6-k300": (6, 300, 0), "v4-k256-128": (4, 256, 128)}


@pytest.fixture(autouse=True)
def deterministic() -> None:
    be_deterministic()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def moment(columns: int) -> Tensor:
    x = random(1000, columns // 4) @ random(columns // 4, columns) + 0.5 * random(1000, columns, seed=1)
    return x.T @ x / 1000


def books(v: int, k: int, r: int, device: torch.device) -> Books:
    return Books(random(k, v).to(device), random(r, v, seed=1).to(device) / 3 if r else None)


def test_the_search_is_compiled() -> None:
    assert native.available(GPU)


@pytest.mark.parametrize("points", [1, 100, 5000])
@pytest.mark.parametrize("sizes", FORMATS.values(), ids=FORMATS)
def test_assignment(sizes: tuple[int, int, int], points: int) -> None:
    vectors = random(points, sizes[0]).to(GPU)
    made = books(*sizes, GPU)
    found, again = assign(vectors, made, 4), assign(vectors, made, 4)
    assert torch.equal(found[0], again[0])
    expected = assign_torch(vectors, made, 4)
    error, least = ((vectors - made.decode(*pair)).square().sum(1) for pair in (found, expected))
    torch.testing.assert_close(error, least, rtol=1e-4, atol=1e-5)


SEARCHES = [(8, 4096, 0, 4), (4, 256, 16, 4), (6, 4096, 256, 8), (3, 512, 64, 9), (8, 16384, 0, 4), (4, 16384, 16, 4)]


@pytest.mark.parametrize(("v", "k", "r", "candidates"), SEARCHES)
def test_blocks_of_columns(v: int, k: int, r: int, candidates: int) -> None:
    made, columns, rows = books(v, k, r, GPU), 128, 70
    block = random(columns, rows, v).to(GPU)
    matrix = (random(columns, columns) / 20 + 2 * torch.eye(columns)).triu().to(GPU)
    start = torch.arange(columns * rows, device=GPU).view(columns, rows)
    for ours, torchs in ((native.code_block, code_block_torch), (native.sweep_block, sweep_block_torch)):
        one, two = (((start % k).clone(), (start % r).clone() if r else None) for _ in range(2))
        found = ours(block, matrix, made.main, made.residual, candidates, one)
        expected = torchs(block, matrix, made, candidates, *two)
        # One vector between two centroids may go either way, and takes those behind it along.
        close = (found - expected).abs().amax((0, 2)) < 1e-3
        assert close.float().mean() > 0.9
        assert (one[0] == two[0]).float().mean() > 0.95


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch alone"])
@pytest.mark.parametrize("crowded", [False, True])
def test_sums(crowded: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "decodes", lambda device: False)
    index = torch.randint(3 if crowded else 700, (50000,), generator=torch.Generator().manual_seed(0))
    rows = random(50000, 8)
    found = IndexedSums(index.to(GPU), 700)(rows.to(GPU))
    assert torch.equal(found, IndexedSums(index.to(GPU), 700)(rows.to(GPU)))
    torch.testing.assert_close(found.cpu(), IndexedSums(index, 700)(rows), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [(157, 136), (1000, 640)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_coded_layers(name: str, dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, spec = random_layer(LAYERS[name], *shape)
    tensors = {key: tensor.to(GPU) for key, tensor in tensors.items()}
    assert native.decodes(GPU)
    found, ours = trained_once(tensors, spec, dtype)
    again, repeated = trained_once(tensors, spec, dtype)
    assert torch.equal(found, again) and all(torch.equal(ours[key], repeated[key]) for key in ours)
    monkeypatch.setattr(native, "decodes", lambda device: False)
    expected, theirs = trained_once(tensors, spec, dtype)
    # The weight's gradient is rounded to the product's type by both.
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    for one, two in [(found, expected), *((ours[key], theirs[key]) for key in theirs)]:
        torch.testing.assert_close(one / two.abs().max(), two / two.abs().max(), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_of_tokens(dtype: torch.dtype) -> None:
    x, y = (random(9000, columns, seed=columns).add(0.3).to(GPU, dtype) for columns in (96, 160))
    weight = torch.exp2(torch.randint(-9, 1, (9000, 1), generator=torch.Generator().manual_seed(0))).to(GPU, dtype)
    found, again = (torch.full((96, 160), 0.5, device=GPU) for _ in range(2))
    for total in (found, again):
        add_products(total, x, y * weight)
    assert torch.equal(found, again)
    torch.testing.assert_close(
        found.double(), 0.5 + x.double().T @ (y.double() * weight.double()), rtol=1e-4, atol=2e-2
    )


@pytest.mark.parametrize("r", [0, 32])
def test_books(r: int) -> None:
    points, weights = random(20000, 8), random(20000).abs()
    trained = []
    for device in (GPU, GPU, CPU):
        generator = torch.Generator().manual_seed(0)
        made = train_books(points.to(device), weights.to(device), 256, r, 6, 4, generator)
        error = (points.to(device) - made.decode(*assign(points.to(device), made, 4))).square().sum(1)
        trained.append((made, float((error * weights.to(device)).sum())))
    assert torch.equal(trained[0][0].main, trained[1][0].main)
    assert trained[0][1] == pytest.approx(trained[2][1], rel=0.03)
    assert torch.equal(
        *(kmeans(points.to(GPU), weights.to(GPU), 64, 5, torch.Generator().manual_seed(1)) for _ in range(2))
    )


def test_coupled_rows() -> None:
    """The GPU repeats itself; its losses are near the CPU's, for a tie that goes the other way moves all after it."""
    target, second, curvature = random(300, 256), moment(300), moment(256)
    segments, there_segments = ([Segment(0, 300, books(4, 64, 16, device))] for device in (CPU, GPU))
    slab = Slab(target, second, Coupling.of(curvature, 0.01, 4))
    there = Slab(target.to(GPU), second.to(GPU), Coupling.of(curvature.to(GPU), 0.01, 4))
    codes = walk_coupled(slab, segments, 4)
    walked = [walk_coupled(there, there_segments, 4) for _ in range(2)]
    assert torch.equal(walked[0][0][0], walked[1][0][0])
    assert loss(there, there_segments, walked[0]) == pytest.approx(loss(slab, segments, codes), rel=0.1)
    swept = [sweep_coupled(there, there_segments, walked[0], 4) for _ in range(2)]
    assert torch.equal(swept[0][0][0], swept[1][0][0])
    assert loss(there, there_segments, swept[0]) < loss(there, there_segments, walked[0])


@pytest.mark.parametrize("r", [0, 16])
def test_walk_refinement_and_descent(r: int) -> None:
    """Each step from the CPU's result of the one before: losses agree, and the GPU repeats itself."""
    target, second = random(300, 256), moment(300)
    segments = [Segment(0, 300, books(4, 64, r, CPU))]
    codes = walk(Slab(target, second), segments, 4)

    def on_gpu(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        return pair[0].to(GPU), None if pair[1] is None else pair[1].to(GPU)

    slab, there = Slab(target, second), Slab(target.to(GPU), second.to(GPU))
    there_segments = [Segment(0, 300, books(4, 64, r, GPU))]
    walked = [walk(there, there_segments, 4) for _ in range(2)]
    assert torch.equal(walked[0][0][0], walked[1][0][0])
    before = loss(slab, segments, codes)
    assert loss(there, there_segments, walked[0]) == pytest.approx(before, rel=0.02)

    same = [on_gpu(codes[0])]
    fitted = fit_books([slab], segments, [codes], 8)
    there_fitted = [fit_books([there], there_segments, [same], 8) for _ in range(2)]
    assert torch.equal(there_fitted[0][0].books.main, there_fitted[1][0].books.main)
    after = loss(slab, fitted, codes)
    assert loss(there, there_fitted[0], same) == pytest.approx(after, rel=0.005) and after < before

    coded = decode(256, segments, codes)
    for one, two in zip(fit_norm([slab], [coded], 8), fit_norm([there], [coded.to(GPU)], 8), strict=True):
        torch.testing.assert_close(one, two.cpu(), rtol=1e-2, atol=1e-3)

    swept = [sweep(there, there_segments, same, 4) for _ in range(2)]
    assert torch.equal(swept[0][0][0], swept[1][0][0])
    lowered = loss(slab, segments, sweep(slab, segments, codes, 4))
    assert loss(there, there_segments, swept[0]) == pytest.approx(lowered, rel=0.02) and lowered < before


SPECS = {
    "v8-k1024": dict(vector_length=8, centroids=1024, residual_centroids=0),
    "v4-k256-64": dict(vector_length=4, centroids=256, residual_centroids=64),
    "groups": dict(vector_length=4, centroids=64, residual_centroids=0, groups=2, perm=True),
    "outliers": dict(vector_length=4, centroids=64, residual_centroids=16, outliers=8),
}


@pytest.mark.parametrize("algorithm", ["joint", "vptq"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_layers(spec: dict, algorithm: str) -> None:
    weight, second = random(512, 264), moment(264)
    recipe = Recipe(**spec, algorithm=algorithm, rounds=2 if algorithm == "joint" else 0, iterations=6)

    def solved(device: torch.device) -> Solution:
        return solve(weight.to(device), second.to(device), LayerRecipe(**spec), recipe, torch.bfloat16)

    one, two, cpu = solved(GPU), solved(GPU), solved(CPU)
    assert one.tensors.keys() == cpu.tensors.keys()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert one.error == pytest.approx(cpu.error, rel=0.05)


def recipe(text_file: Path, **update: object) -> Recipe:
    return COARSE.model_copy(update={"calibration": (str(text_file),), "device": "cuda"} | update)


def repeat(model: Path, folder: Path, wanted: Recipe) -> None:
    """A run and another of the same write the same."""
    for name in ("one", "two"):
        run(model, folder / name, wanted)
    one, two = read(folder / "one"), read(folder / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


TRAINING = {"finetune": Finetuning(steps=6, tokens=256), "finetune_blocks": BlockTuning(steps=3)}
UPDATES = [{}, {"bits": 4.0}, {"guided": 2}, {"curvature": True}, {"correction": 0.5}, {"calibration": ()}, TRAINING]


@pytest.mark.parametrize("update", UPDATES, ids=str)
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_runs_repeat_themselves(
    text_file: Path, tmp_path: Path, model: str, update: dict, request: pytest.FixtureRequest
) -> None:
    repeat(request.getfixturevalue(model), tmp_path, recipe(text_file, **update))


def test_training_repeats_itself_by_torch_alone(
    tied: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "decodes", lambda device: False)
    repeat(tied, tmp_path, recipe(text_file, **TRAINING))


@pytest.mark.parametrize("update", [{}, {"correction": 0.5} | TRAINING], ids=str)
def test_a_run_that_was_stopped_goes_on(
    tied: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: dict
) -> None:
    run(tied, tmp_path / "whole", recipe(text_file, **update))
    count, original = 0, blocks.solve

    def stop(*arguments: object) -> Solution:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(blocks, "solve", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tied, tmp_path / "cut", recipe(text_file, **update))
    run(tied, tmp_path / "cut", recipe(text_file, **update))
    one, two = read(tmp_path / "whole"), read(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_models_that_do_not_fit_come_block_by_block(
    tied: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrected = recipe(text_file, correction=0.5)
    run(tied, tmp_path / "whole", corrected)
    monkeypatch.setattr(devices, "fits", lambda *_: False)
    monkeypatch.setattr("quantize.model._ON_DEVICE", 0)  # activations wait on the host, too
    run(tied, tmp_path / "streamed", corrected)
    one, two = read(tmp_path / "whole"), read(tmp_path / "streamed")
    assert all(torch.equal(one[name], two[name]) for name in one)
    run(tied, tmp_path / "measured", recipe(text_file, bits=4.0))


def test_models_that_do_not_fit_are_evaluated_block_by_block(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (exact, tokenizer), (rounded, _) = (load_any(str(tied), CPU, dtype) for dtype in (None, torch.half))
    found = []
    for fit in (True, False):
        monkeypatch.setattr(devices, "fits", lambda *_, fit=fit: fit)
        monkeypatch.setattr(evaluate, "fits", lambda *_, fit=fit: fit)
        with on_device(exact, GPU) as whole, on_device(rounded, GPU):
            assert whole == fit
            at_once = 1 if whole else windows_at_once(rounded, 64, GPU)
            found.append(score(rounded, tokenizer, TEXT, 64, 2048, reference=exact, at_once=at_once))
    assert at_once == 8
    assert found[1].perplexity == pytest.approx(found[0].perplexity, rel=1e-3)
    assert found[1].divergence == pytest.approx(found[0].divergence, rel=0.1)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch alone"])
def test_training_brings_the_model_closer(
    compiled: bool, tied: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "decodes", lambda device: False)
    original, tokenizer = load_any(str(tied), GPU)
    divergences = []
    for steps in (0, 60):
        out = tmp_path / str(steps)
        plan = run(tied, out, recipe(text_file, finetune=Finetuning(steps=steps, tokens=256)))
        model, _ = load_any(str(out), GPU)
        divergences.append(score(model, tokenizer, TEXT, 64, 4096, reference=original).divergence)
        assert len(plan.specs) == 14 and not (out / "parts").exists()
    assert divergences[1] < divergences[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_write_what_one_writes(
    tied: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tied, tmp_path / "two", recipe(text_file, bits=4.0))
    monkeypatch.setattr(pipeline, "choose_devices", lambda _: [GPU])
    run(tied, tmp_path / "one", recipe(text_file, bits=4.0))
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_visit_takes_memory_and_gives_it_back() -> None:
    module = torch.nn.Linear(1024, 1024)
    before = torch.cuda.memory_allocated(GPU)
    with resident(module, GPU):
        assert torch.cuda.memory_allocated(GPU) >= before + (4 << 20) and module.weight.is_cuda
    assert torch.cuda.memory_allocated(GPU) == before and not module.weight.is_cuda
