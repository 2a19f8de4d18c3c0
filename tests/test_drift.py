"""Targets that make up for the drift of their inputs in the coded layers before."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.blocks import wanted_outputs
from quantize.drift import Drift, Original, corrected, drift, residual_stream
from quantize.evaluate import load_any, score
from quantize.model import decoder_blocks, first_inputs
from tests.tiny import COARSE, TEXT, read, run

pytest_plugins = ("tests.tiny_fixtures",)


def drifted() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its inputs, and those inputs scaled and disturbed."""
    gen = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 12, generator=gen), torch.randn(4000, 12, generator=gen)
    return weight, x, 0.8 * x + 0.3 * torch.randn(4000, 12, generator=gen)


def test_the_whole_correction_is_the_best_weight_for_drifted_inputs() -> None:
    weight, x, y = drifted()
    found = Drift((x - y).T @ y / len(x), y.T @ y / len(x))
    best = torch.linalg.lstsq(y, x @ weight.T).solution.T
    torch.testing.assert_close(corrected(weight, found, 1.0), best, rtol=0.02, atol=0.02)
    half = corrected(weight, found, 0.5)
    torch.testing.assert_close(half, (weight + corrected(weight, found, 1.0)) / 2)


def test_what_a_residual_stream_has_lost_is_made_up_for() -> None:
    weight, x, y = drifted()
    lost = y @ torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    found = Drift((x - y).T @ y / len(x), y.T @ y / len(x), lost.T @ y / len(x))
    best = torch.linalg.lstsq(y, x @ weight.T + lost).solution.T
    torch.testing.assert_close(corrected(weight, found, 1.0), best, rtol=0.02, atol=0.06)


def test_inputs_that_were_never_seen_leave_the_weight_alone() -> None:
    weight, x, y = drifted()
    x[:, 3] = y[:, 3] = 0
    found = corrected(weight, Drift((x - y).T @ y / len(x), y.T @ y / len(x)), 1.0)
    assert bool(torch.isfinite(found).all()) and torch.equal(found[:, 3], weight[:, 3])


def test_drift_is_what_lies_between_the_two_prefixes(tied: Path) -> None:
    model: nn.Module = load_any(str(tied), torch.device("cpu"))[0]
    blocks = decoder_blocks(model)
    ids = [torch.randint(2, 200, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    batches = first_inputs(model, blocks, ids)
    reference = Original(batches)
    before = blocks[0].module.mlp.act_fn, [batch.hidden.clone() for batch in batches]
    linear = "model.layers.0.self_attn.o_proj"

    def inputs() -> Tensor:
        seen: list[Tensor] = []
        hook = blocks[0].linears[linear].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            for batch in batches:
                batch.run(0, blocks[0].module)
        hook.remove()
        return torch.cat(seen)

    with reference.beside(0, blocks[0]) as twin:
        none = drift(0, blocks[0], twin, linear, batches, reference)
        assert not none.inputs.any() and none.residual is not None and not none.residual.any()
        x = inputs()
        value = blocks[0].linears["model.layers.0.self_attn.v_proj"]
        value.weight = nn.Parameter(value.weight.detach() * 1.5 + 0.01)
        y = inputs()
        found = drift(0, blocks[0], twin, linear, batches, reference)
        assert found.residual is not None and not found.residual.any()  # no layer before o_proj adds to the stream
        later = drift(0, blocks[0], twin, "model.layers.0.mlp.down_proj", batches, reference)
    with torch.no_grad():
        stream = torch.cat([hidden.flatten(0, 1) for hidden in before[1]]) + blocks[0].linears[linear](x)
    weight = 2 ** (1 / stream.square().mean(1, keepdim=True)).log2().round()
    assert len(weight.unique()) > 1
    torch.testing.assert_close(found.inputs, (x - y).T @ (weight * y) / weight.sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.moment, y.T @ (weight * y) / weight.sum(), rtol=1e-4, atol=1e-5)
    assert later.residual is not None and later.residual.any()
    assert before[0] is blocks[0].module.mlp.act_fn
    # The reference went through the block as it was, the batches have not moved.
    assert all(torch.equal(batch.hidden, old) for batch, old in zip(batches, before[1], strict=True))
    assert not any(torch.equal(b.hidden, o) for b, o in zip(reference.batches, before[1], strict=True))


@torch.inference_mode()
def test_a_trained_block_makes_up_for_drift_as_far_as_targets_do(tied: Path) -> None:
    model: nn.Module = load_any(str(tied), torch.device("cpu"))[0]
    blocks = decoder_blocks(model)
    batches = first_inputs(model, blocks, [torch.randint(2, 200, (2, 24))])
    reference = Original(batches)
    undrifted = wanted_outputs(0, blocks[0], batches)[0]
    batches[0].keep(batches[0].hidden * 1.1)
    drifted = wanted_outputs(0, blocks[0], batches)[0]
    assert not torch.allclose(drifted, undrifted)
    with reference.beside(0, blocks[0]) as twin:
        (wanted,) = wanted_outputs(0, blocks[0], batches, 0.25, reference, twin)
    torch.testing.assert_close(wanted, 0.75 * drifted + 0.25 * undrifted)


def test_a_corrected_run_is_closer_to_the_original(tied: Path, text_file: Path, tmp_path: Path) -> None:
    base = COARSE.model_copy(update={"calibration": (str(text_file),), "tokens": 4096})
    original, tokenizer = load_any(str(tied), torch.device("cpu"))
    divergences = []
    for name, share in (("plain", 0.0), ("corrected", 0.5), ("again", 0.5)):
        run(tied, tmp_path / name, base.model_copy(update={"correction": share}))
        model, _ = load_any(str(tmp_path / name), torch.device("cpu"))
        divergences.append(score(model, tokenizer, TEXT, 64, 4096, reference=original).divergence)
    assert divergences[1] < divergences[0]
    first, second = read(tmp_path / "corrected"), read(tmp_path / "again")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_residual_streams_are_found_by_looking(tied: Path) -> None:
    model: nn.Module = load_any(str(tied), torch.device("cpu"))[0]
    blocks = decoder_blocks(model)
    (batch,) = first_inputs(model, blocks, [torch.randint(2, 200, (2, 24))])
    found = {name: residual_stream(1, blocks[1].module, name.removeprefix(f"{blocks[1].name}."), batch)
             for name in blocks[1].linears}  # fmt: skip
    streams = {name.rpartition(".")[2]: stream for name, stream in found.items() if stream is not None}
    assert streams == {"o_proj": "", "down_proj": "post_attention_layernorm"}


def test_a_scaled_output_has_no_residual_stream_of_its_own(tied: Path) -> None:
    model: nn.Module = load_any(str(tied), torch.device("cpu"))[0]
    blocks = decoder_blocks(model)
    (batch,) = first_inputs(model, blocks, [torch.randint(2, 200, (2, 24))])
    mlp = blocks[0].module.mlp
    mlp.register_forward_hook(lambda _, __, output: 0.5 * output)
    assert residual_stream(0, blocks[0].module, "mlp.down_proj", batch) is None
