"""Coded linears as modules, training that can stop, and what it is worth."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantize import finetune
from quantize.coded import CodedLinear
from quantize.finetune import Training, replace_linears, trainable, tune_model
from quantize.recipe import LayerRecipe, Recipe
from quantize.solver import Solution, solve
from quantize.training import first_rate
from vllm_vptq.format import LayerSpec, dequantize


def coded(layer: LayerRecipe, out: int = 21, columns: int = 40) -> tuple[CodedLinear, Solution]:
    gen = torch.Generator().manual_seed(0)
    solution = solve(torch.randn(out, columns, generator=gen), torch.eye(columns), layer, Recipe(), torch.float16)
    return CodedLinear(solution.tensors, solution.spec, None), solution


LAYERS = [
    LayerRecipe(centroids=16, residual_centroids=0, norm=False),
    LayerRecipe(centroids=16, residual_centroids=8),
    LayerRecipe(vector_length=3, centroids=16, residual_centroids=8, groups=4, perm=True),
    LayerRecipe(
        centroids=16, residual_centroids=0, outliers=8, outlier_vector_length=2, outlier_centroids=16, perm=True
    ),
    LayerRecipe(centroids=16, residual_centroids=8, outliers=8, outlier_vector_length=5, groups=2, norm=False),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_coded_linear_is_what_the_format_says(layer: LayerRecipe) -> None:
    module, solution = coded(layer)
    torch.testing.assert_close(module.weight(), dequantize(solution.tensors, solution.spec))
    again = module.tensors()
    assert again.keys() == {n for n, t in solution.tensors.items() if t.is_floating_point()}
    assert all(torch.equal(again[name], solution.tensors[name]) for name in again)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_parameter_of_a_coded_linear_can_be_trained(layer: LayerRecipe) -> None:
    module, _ = coded(layer)
    goal = torch.randn(21, 40, generator=torch.Generator().manual_seed(1))
    training = Training(dict(module.named_parameters()), 0.05, 30)
    losses = []
    for _ in range(30):
        loss = (module.weight() - goal).square().sum()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        training.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def student_and_teacher() -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes)).eval()
    student = copy.deepcopy(teacher)
    layer, recipe = LayerRecipe(centroids=16, residual_centroids=0), Recipe(rounds=0)
    linears = {n: m for n, m in student.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for name, linear in linears.items():
        solution = solve(linear.weight.data, torch.eye(linear.in_features), layer, recipe, torch.float16)
        replace_linears(student, [(name, CodedLinear(solution.tensors, solution.spec, None))])
    batches = [torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    return student, teacher, batches


def divergence(student: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        a, b = (torch.log_softmax(model(ids).logits, -1) for model in (teacher, student))
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_steps_are_smaller_where_books_leave_less() -> None:
    def spec(v: int, k: int, columns: int = 512) -> LayerSpec:
        return LayerSpec(columns, 64, v, k, 0)

    assert first_rate(0.25, 0.002, [spec(2, 256)]) == 0.25
    assert first_rate(None, 0.002, [spec(8, 256), spec(4, 256)]) == 0.002
    assert first_rate(None, 0.002, [spec(2, 256)]) == pytest.approx(0.002 * 2**-1.75)
    assert first_rate(None, 0.002, [spec(2, 256), spec(8, 256)]) == pytest.approx(0.002 * 2**-0.25)
    assert first_rate(None, 0.002, [spec(2, 256, 1536), spec(8, 256)]) == pytest.approx(0.002 * 2**-1)  # by weights


def test_training_brings_the_student_to_its_teacher_on_other_text() -> None:
    student, teacher, batches = student_and_teacher()
    fresh = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(9))
    before = divergence(student, teacher, fresh)
    training = Training(trainable(student), 0.01, 30)
    assert any("layernorm" in name for name in training.parameters)
    assert any("centroids" in name for name in training.parameters)
    frozen = {n: p.clone() for n, p in student.named_parameters() if n not in training.parameters}
    losses: list[float] = []
    tune_model(student, teacher, batches, training, lambda i, n, loss: losses.append(loss), lambda state: None)
    assert len(losses) == training.step == 30 and losses[-1] < losses[0]
    assert divergence(student, teacher, fresh) < 0.85 * before
    assert all(torch.equal(p, frozen[n]) for n, p in student.named_parameters() if n in frozen)


def test_steps_of_norms_and_biases_go_by_each_element_and_books_by_their_whole() -> None:
    # As biases of Qwen2.5's k_proj: by the root mean square of all, small ones would move by half of themselves.
    values = {
        "bias": torch.tensor([0.7, -0.5, 354.0, 0.0]),
        "centroids": torch.tensor([[3.0, 4.0]]),
        "weight_scale": torch.tensor([2.0, 2.0]),
        "weight_bias": torch.tensor([0.0, 0.1]),
    }
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    training = Training(parameters, 0.01, 1)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    training.update()
    warm = 0.01 / (0.05 + 1)  # the first step of all is that much shorter
    moved = {name: (values[name] - parameter.detach()) / warm for name, parameter in parameters.items()}
    torch.testing.assert_close(moved["bias"], torch.tensor([0.7, 0.5, 354.0, 0.05]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moved["centroids"], torch.full((1, 2), 12.5**0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved["weight_scale"], torch.full((2,), 2.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved["weight_bias"], torch.full((2,), 2.0), rtol=1e-3, atol=0)  # by the scale


def test_a_batch_in_pieces_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for tokens in (2048, 64, 1):
        monkeypatch.setattr(finetune, "_PIECE_TOKENS", tokens)
        student, teacher, batches = student_and_teacher()
        training = Training(trainable(student), 0.01, 2)
        tune_model(student, teacher, batches, training, lambda *_: None, lambda state: None)
        found.append(training)
    for training in found[1:]:
        assert training.losses == pytest.approx(found[0].losses, rel=1e-4)
        for name, parameter in training.parameters.items():
            torch.testing.assert_close(parameter, found[0].parameters[name], rtol=1e-3, atol=1e-4)


def test_training_that_stops_goes_on_to_the_same_bits() -> None:
    class Stopped(Exception):
        pass

    def stop(training: Training) -> None:
        if training.step == 4:
            saved.update({name: tensor.clone() for name, tensor in training.state().items()})
            raise Stopped

    results, saved = [], {}
    for interrupted in (False, True):
        student, teacher, batches = student_and_teacher()
        training = Training(trainable(student), 0.01, 8)
        if interrupted:
            with pytest.raises(Stopped):
                tune_model(student, teacher, batches, training, lambda *_: None, stop)
            student, teacher, batches = student_and_teacher()
            training = Training(trainable(student), 0.01, 8)
            training.load(saved)
        tune_model(student, teacher, batches, training, lambda *_: None, lambda state: None)
        results.append(training.state())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
