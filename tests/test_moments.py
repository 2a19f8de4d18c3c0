"""What a block's linears receive, in which order, and what the end loss feels of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantize.curvature import coupled, curvatures, shrunk
from quantize.evaluate import load_any
from quantize.model import decoder_blocks, first_inputs
from quantize.moments import collect, output_gradients, stages
from quantize.recipe import Recipe
from tests.tiny import COARSE, run

pytest_plugins = ("tests.tiny_fixtures",)


@pytest.fixture
def model(tied: Path) -> nn.Module:
    return load_any(str(tied), torch.device("cpu"))[0]


def token_batches() -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randint(2, 200, (2, 24), generator=gen) for _ in range(3)]


def test_stages_are_those_that_share_an_input(model: nn.Module) -> None:
    blocks = decoder_blocks(model)
    batches = first_inputs(model, blocks, token_batches())
    found = stages(0, blocks[0], list(blocks[0].linears), batches)
    leaves = [[name.rpartition(".")[2] for name in stage] for stage in found]
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_gradients_are_those_of_the_loss(model: nn.Module) -> None:
    """Against autograd with an output replaced by a leaf."""
    batches, name = token_batches(), "model.layers.1.mlp.up_proj"
    weights, means = output_gradients(model, decoder_blocks(model), {name: [slice(0, 40), slice(40, 96)]}, batches)
    assert weights[name].shape == (3 * 48, 2)
    assert float(weights[name].mean()) == pytest.approx(1, rel=1e-4)
    squares = []
    for ids in batches:
        outputs: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_hook(
            lambda _, __, output, outputs=outputs: outputs.append(output.detach().requires_grad_()) or outputs[0]
        )
        logits = model(ids).logits
        hook.remove()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, outputs)
        squares.append(gradient.square().flatten(0, 1))
    expected = torch.stack([torch.cat(squares)[:, rows].mean(1) for rows in (slice(0, 40), slice(40, 96))], 1)
    torch.testing.assert_close(weights[name] * means[name], expected, rtol=1e-3, atol=1e-7)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_curvature_is_that_of_the_loss_of_what_the_model_draws(model: nn.Module) -> None:
    """Against autograd with an output replaced by a leaf, and the same draws."""
    batches, names = token_batches(), ["model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"]
    found = curvatures(model, decoder_blocks(model), names, batches, seed=3)
    assert sorted(found) == sorted(names)
    generator, drawn = torch.Generator().manual_seed(3), []
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    for ids in batches:
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        drawn.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
        for name in names:
            outputs: list[Tensor] = []
            hook = model.get_submodule(name).register_forward_hook(
                lambda _, __, output, outputs=outputs: outputs.append(output.detach().requires_grad_()) or outputs[0]
            )
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            hook.remove()
            loss = nn.functional.cross_entropy(logits, drawn[-1], reduction="sum")
            gradients[name].append(torch.autograd.grad(loss, outputs)[0].flatten(0, 1))
    for name in names:
        products = torch.stack([torch.outer(g, g) for g in torch.cat(gradients[name])])
        expected = products.mean(0)
        away = 1 - torch.eye(len(expected))
        noise = ((products - expected) * away).square().sum((1, 2)).mean() / len(products)
        share = min(1.0, float(noise / (expected * away).square().sum()))
        assert share > 0.01
        expected *= 1 - share * away
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-7)
    assert not torch.equal(torch.cat(drawn), torch.cat([ids[:, 1:].flatten() for ids in batches]))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_layers_that_fan_out_are_not_coupled() -> None:
    shapes = {"q": (64, 64), "gate": (192, 64), "down": (64, 192), "wide": (128, 64)}
    assert coupled(shapes) == ["q", "down", "wide"]


def test_weighted_moments(model: nn.Module) -> None:
    blocks, ids = decoder_blocks(model), token_batches()
    batches = first_inputs(model, blocks, ids)
    stage = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    gen = torch.Generator().manual_seed(1)
    weights = {name: torch.rand(3 * 48, 2, generator=gen) for name in stage}
    found, plain = collect(0, blocks[0], stage, batches, weights), collect(0, blocks[0], stage, batches)
    x = torch.cat([blocks[0].module.input_layernorm(b.hidden).detach().flatten(0, 1) for b in batches])
    torch.testing.assert_close(plain[stage[0]], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    for name in stage:
        for g in range(2):
            expected = (x.T * weights[name][:, g]) @ x / len(x)
            torch.testing.assert_close(found[name][g], expected, rtol=1e-4, atol=1e-5)


def test_shrinking_takes_the_noise_of_a_sample() -> None:
    """Nearer to the truth than the sample; all that is left of independent outputs is the diagonal."""

    def sampled(g: Tensor) -> tuple[Tensor, Tensor]:
        squares = g.square()
        sample, fourth = g.T @ g / len(g), (squares.sum(1).square() - squares.square().sum(1)).mean()
        return sample, shrunk(sample, float(fourth), len(g))

    def apart(matrix: Tensor) -> Tensor:
        return matrix - matrix.diagonal().diag()

    gen = torch.Generator().manual_seed(1)
    mixing = torch.randn(40, 40, generator=gen) * torch.logspace(0, -1, 40)
    whole = mixing @ mixing.T
    for tokens, least, most in [(60, 0.05, 0.6), (20000, 0.0, 0.005)]:
        sample, found = sampled(torch.randn(tokens, 40, generator=gen) @ mixing.T)
        assert (found - whole).norm() < (sample - whole).norm()
        taken = float((found - sample).norm() / apart(sample).norm())
        assert least <= taken <= most, tokens
        assert torch.equal(found.diagonal(), sample.diagonal())
    sample, found = sampled(torch.randn(50, 40, generator=gen))
    assert apart(found).norm() < 0.2 * apart(sample).norm()


@pytest.mark.parametrize("update", [{"guided": 2}, {"curvature": True}, {"activations": "original"}], ids=str)
def test_runs_with_other_moments(tied: Path, text_file: Path, tmp_path: Path, update: dict) -> None:
    base = COARSE.model_copy(update={"calibration": (str(text_file),)})
    reports = []
    for name, recipe in (("plain", base), ("other", Recipe(**base.model_dump() | update))):
        run(tied, tmp_path / name, recipe)
        reports.append((tmp_path / name / "model-00001-of-00003.safetensors").read_bytes())
    assert reports[0] != reports[1]
