"""The command line: six commands, their help, and one line for everything that is wrong."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from quantize import cli, estimate, evaluate, pipeline
from quantize.push import model_card
from quantize.recipe import PRESETS, Recipe
from tests.tiny import command, one_line, set_config
from vllm_vptq import cli as serving

pytest_plugins = ("tests.tiny_fixtures",)
Call = tuple[int, str, str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the console script in this process: exit code, stdout, stderr. An escaping exception fails the test."""
    monkeypatch.setenv("COLUMNS", "200")

    def run_main(*arguments: object) -> Call:
        monkeypatch.setattr(sys, "argv", ["vptq-quantize", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


SMALL = ("--vector-length", 8, "--centroids", 16, "--residual-centroids", 0, "--tokens", 2048, "--context", 64)


def test_run_eval_and_dequantize(tied: Path, tmp_path: Path, call: Any) -> None:
    code, out, _ = call("run", tied, "--out", tmp_path / "q", *SMALL)
    assert code == 0 and "14 linear layers" in out and "v8-k16-0" in out and f"vllm serve {tmp_path / 'q'}" in out
    assert call("dequantize", tmp_path / "q", "--out", tmp_path / "d", "--dtype", "float32")[0] == 0
    code, out, _ = call("eval", tied, tmp_path / "q", tmp_path / "d", "--context", 64, "--tokens", 512)
    assert code == 0
    lines = [line for line in out.splitlines() if "x)" in line]
    assert len(lines) == 3 and "1.000x" in lines[0] and lines[1] == lines[2] != lines[0]
    assert "KL" not in lines[0] and "KL" in lines[1]


def test_results_go_to_the_card(tied: Path, fine: Path, tmp_path: Path, call: Any) -> None:
    checkpoint = Path(shutil.copytree(fine, tmp_path / "q"))
    text = tmp_path / "some.txt"
    text.write_text("some text " * 500)
    words = ("--context", 64, "--tokens", 512, "--text", text, "--record")
    code, out, _ = call("eval", tied, checkpoint, *words)
    assert code == 0 and "on some.txt, 504 tokens in windows of 64" in out
    card = model_card(checkpoint, "org/base", ["speed=fast"])
    shown = [line.split()[0] for line in out.splitlines() if "x)" in line]
    row = next(line for line in card.splitlines() if "perplexity on some.txt, 504 tokens" in line)
    assert [float(cell) for cell in row.split("|")[2:4]] == pytest.approx([float(value) for value in shown], rel=1e-3)
    assert "KL to the original on some.txt" in card and "| speed | | fast |" in card
    assert f"torch {torch.__version__}" in card
    code, _, err = call("eval", tied, tied, *words)
    assert code == 1 and "no VPTQ configuration" in one_line(err)


def test_a_full_disk_is_one_line(tied: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is transformers that writes."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/tokenizer.json")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    code, _, err = call("run", tied, "--out", tmp_path / "q", *SMALL)
    assert code == 1 and one_line(err) == "error: some/tokenizer.json: No space left on device"


def test_a_plan_takes_the_words_of_a_run(
    tied: Path, text_file: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every word of its recipe, to the same recipe."""
    values = {"--preset": "balanced", "--recipe": tmp_path / "recipe.yaml", "--device": "cpu"}
    values |= {"--calibration": text_file, "--tokens": 4096, "--context": 128, "--seed": 3, "--finetune-steps": 2}
    values |= {"--vector-length": 8, "--centroids": 16, "--residual-centroids": 0, "--bits": 5, "--books": "any"}
    commands: Any = typer.main.get_command(cli.app)
    run_, plan_ = ({o for p in commands.commands[c].params for o in p.opts if o[0] == "-"} for c in ("run", "plan"))
    assert run_ - plan_ == {"--out", "--ray"} and plan_ - set(values) == {
        "--trust-remote-code",
        "--revision",
        "--curvature",
    }
    (tmp_path / "recipe.yaml").write_text("damping: 0.02\n")
    recipes: list[Recipe] = []
    monkeypatch.setattr(pipeline, "quantize_model", lambda *words: recipes.append(words[2]) or sys.exit(7))
    monkeypatch.setattr(estimate, "estimate", lambda model, plan, recipe: recipes.append(recipe) or "about a day")
    words = [*(word for pair in values.items() for word in pair), "--curvature"]
    assert call("run", tied, "--out", tmp_path / "q", *words)[0] == 7
    code, out, _ = call("plan", tied, *words)
    assert code == 0 and "about a day" in out
    training = {"steps": 2}
    expected = PRESETS["balanced"] | {"calibration": [str(text_file)], "finetune": training, "damping": 0.02}
    numbers = {name.strip("-").replace("-", "_"): value for name, value in values.items() if isinstance(value, int)}
    del numbers["finetune_steps"]
    numbers["tokens_per_input"] = 0  # tokens that are asked for are exact
    assert recipes == [Recipe(**expected | numbers, curvature=True, device="cpu")] * 2
    assert "bits a weight in a GPU's memory, by layout: " in out and " stationary" in out


def test_a_plan_says_that_a_model_is_too_large(tied: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "fits", lambda *_: False)
    for words, expected in [
        (("--preset", "balanced", "--calibration", "c4.txt"), "--finetune-steps 0"),
        (("--preset", "balanced", "--finetune-steps", 0), "give it some by --calibration"),
        (("--preset", "balanced", "--calibration", "c4.txt", "--finetune-steps", 0), None),
    ]:
        code, out, _ = call("plan", tied, "--bits", 5, *words)
        assert code == 0 and "GiB on this machine" in out
        assert ("a run would stop here" in out and expected in out) if expected else "would stop" not in out, words


def test_a_plan_for_a_gpu_needs_none(tied: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "recipe.yaml").write_text("device: cuda\n")
    code, out, _ = call("plan", tied, "--bits", 5, "--recipe", tmp_path / "recipe.yaml")
    assert code == 0 and "note: torch finds no GPU here" in out and "GiB on this machine (cpu)" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["plan", "run", "eval", "dequantize", "plot", "push"]),
        (
            ["run"],
            [
                "--out",
                "--bits",
                "--preset",
                "--recipe",
                "--vector-length",
                "--residual-centroids",
                "--tokens",
                "--seed",
                "--finetune-steps",
            ],
        ),
        (["eval"], ["--text", "--context", "--tokens"]),
        (["dequantize"], ["--out", "--dtype"]),
    ],
    ids=["", "run", "eval", "dequantize"],
)
def test_help(words: list[str], expected: list[str], call: Any) -> None:
    code, out, _ = call(*words, "--help")
    assert code == 0 and all(word in out for word in expected)


@pytest.mark.parametrize("app", [cli.app, serving.app], ids=["vptq-quantize", "vllm-vptq"])
def test_help_is_printed_as_it_is_written(app: typer.Typer) -> None:
    """With its brackets: defaults, names of extras."""
    commands: Any = typer.main.get_command(app)
    for name, command_ in commands.commands.items():
        printed = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).output
        for parameter in command_.params:
            # Without spaces: lines are wrapped, at hyphens too.
            assert "".join((parameter.help or "").split()) in "".join(printed.split()), (name, parameter.name)


def test_one_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = command("dequantize", tmp_path, "--out", tmp_path / "x")
    assert done.returncode == 1 and one_line(done.stderr).startswith("error: ") and not done.stdout


def test_a_missing_compiler_is_said_before_the_work(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("VLLM_VPTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    done = command("run", tied, "--out", tmp_path / "q", "--device", "cpu", *SMALL)
    assert done.returncode == 1 and one_line(done.stderr).startswith("error: no C++ compiler found")
    assert not done.stdout and not (tmp_path / "q").exists()


def test_mistakes_are_one_line(tied: Path, fine: Path, tmp_path: Path, call: Any) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "bad.yaml").write_text("centroids: 100\n")
    for match, *words in [
        ("centroids", "run", tied, "--out", tmp_path / "1", "--centroids", 100),
        ("centroids", "run", tied, "--out", tmp_path / "1", "--recipe", tmp_path / "bad.yaml"),
        ("preset", "run", tied, "--out", tmp_path / "1", "--preset", "quick"),
        ("at least", "run", tied, "--out", tmp_path / "6", "--bits", 1.0001, "--preset", "paper"),
        # Before the calibration text is looked at, let alone anything measured.
        ("at least", "run", tied, "--out", tmp_path / "7", "--bits", 1.0001, "--calibration", tmp_path / "short.txt"),
        ("at least", "plan", tied, "--bits", 1.0001),
        ("only the hub has revisions", "plan", tied, "--revision", "main"),
        ("only the hub has revisions", "run", tied, "--out", tmp_path / "8", "--revision", "main"),
        ("absent", "plan", tmp_path / "absent"),
        ("no readable report", "plot", tied),
        ("device", "run", tied, "--out", tmp_path / "1", "--device", "tpu"),
        ("not empty", "run", tied, "--out", tied),
        ("absent", "run", tmp_path / "absent", "--out", tmp_path / "2"),
        ("short.txt", "run", tied, "--out", tmp_path / "3", *SMALL, "--calibration", tmp_path / "short.txt"),
        ("absent", "eval", tmp_path / "absent"),
        ("window of 64", "eval", tied, "--context", 64, "--text", tmp_path / "short.txt"),
        ("absent.txt", "eval", tied, "--text", tmp_path / "absent.txt"),
        ("dtype int4", "dequantize", fine, "--out", tmp_path / "4", "--dtype", "int4"),
        ("config.json", "dequantize", tied, "--out", tmp_path / "5"),
    ]:
        code, _, err = call(*words)
        assert code == 1 and one_line(err).startswith("error: ") and match in one_line(err), (words, code, err)


def test_eval_refuses_before_anything_is_evaluated(
    tied: Path, fine: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_any", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    for match, *words in [
        ("device foo", tied, "--device", "foo"),
        ("device cuda was asked for", tied, "--device", "cuda"),
        ("dtype int8, expected one of float32, bfloat16, float16, auto", tied, "--dtype", "int8"),
        (f"--context 257: {tied} has 256 positions", tied, "--context", 257),
        ("give that first", tied, "--record"),
        ("no VPTQ configuration", tied, tied, "--record"),
        ("directory, and", tied, tmp_path / "absent", "--record"),
        ("absent", tied, tmp_path / "absent"),
        ("absent.txt", tied, "--text", tmp_path / "absent.txt"),
        ("LM Evaluation Harness", tied, "--tasks", "piqa"),
        ("engine jax, expected one of transformers, vllm", tied, "--tasks", "piqa", "--engine", "jax"),
        ("--engine vllm is for --tasks", tied, "--engine", "vllm"),
    ]:
        code, out, err = call("eval", *words)
        assert code == 1 and not out and one_line(err).startswith("error: ") and match in one_line(err), (words, err)


def test_windows_are_no_longer_than_the_model_has_positions(tied: Path, call: Any) -> None:
    code, out, _ = call("eval", tied, "--tokens", 600)
    assert code == 0 and "510 tokens in windows of 256" in out


def test_eval_keeps_the_first_model_and_one_more(
    tied: Path, untied: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those alive when another is loaded; and tasks have as many requests in a pass as scores have windows."""
    loaded: list[Any] = []
    alive: list[list[bool]] = []
    batches: list[int] = []
    load = evaluate.load_any

    def watched(*words: Any) -> Any:
        alive.append([model() is not None for model in loaded])
        model, tokenizer = load(*words)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(evaluate, "load_any", watched)
    monkeypatch.setattr("quantize.tasks.require_harness", lambda _: None)
    monkeypatch.setattr("quantize.tasks.task_scores", lambda *words: batches.append(words[-1]) or {})
    for fit in (True, False):
        monkeypatch.setattr(evaluate, "fits", lambda *_, fit=fit: fit)
        monkeypatch.setattr("quantize.devices.fits", lambda *_, fit=fit: fit)
        monkeypatch.setattr(evaluate, "free_memory", lambda _: 1 << 40)
        loaded.clear()
        words = ("--context", 64, "--tokens", 256, "--tasks", "piqa")
        code, _, err = call("eval", tied, untied, tied, untied, *words)
        assert code == 0, err
    assert alive == [[], [True], [True, False], [True, False, False]] * 2
    assert batches == [1] * 4 + [8] * 4


def test_eval_in_another_dtype_says_so(tied: Path, fine: Path, call: Any) -> None:
    words = ("--context", 64, "--tokens", 512)
    _, exact, _ = call("eval", tied, fine, *words)
    code, out, _ = call("eval", tied, fine, *words, "--dtype", "bfloat16")
    assert code == 0 and "in windows of 64, bfloat16" in out and "float32" not in exact
    lines = [[line for line in text.splitlines() if "x)" in line] for text in (exact, out)]
    for one, two in zip(*lines, strict=True):
        assert one != two and float(one.split()[0]) == pytest.approx(float(two.split()[0]), rel=0.05)
    assert call("eval", tied, fine, *words, "--dtype", "auto")[1].replace(", float32", "") == exact


def test_checkpoints_on_the_hub(tied: Path, fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the hub's cache, without a network."""
    folder = tmp_path / "hub" / "models--me--model"
    shutil.copytree(fine, folder / "snapshots" / "0123abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    there, here = (command("eval", tied, name, "--context", 64, "--tokens", 512) for name in ("me/model", fine))
    assert there.returncode == 0, there.stderr
    assert there.stdout.replace("me/model", "X") == here.stdout.replace(str(fine), "X")
    done = command("dequantize", "me/model", "--out", tmp_path / "dense")
    assert done.returncode == 0 and (tmp_path / "dense" / "model.safetensors").is_file(), done.stderr
    for name, code in (("me/model", 0), ("me/other", 1)):
        words = [sys.executable, "-m", "vllm_vptq.cli", "inspect", name]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
    assert "me/other: no such directory, so it was looked up on the hub" in one_line(done.stderr)
    done = command("dequantize", "me/other", "--out", tmp_path / "other")
    assert done.returncode == 1 and one_line(done.stderr).startswith("error: me/other") and not done.stdout


@pytest.mark.parametrize(("option", "value"), [("--context", 0), ("--context", 1), ("--context", -5), ("--tokens", 0)])
def test_eval_refuses_windows_that_are_none(tied: Path, option: str, value: int, call: Any) -> None:
    small = {"--context": 64, "--tokens": 256} | {option: value}
    code, _, err = call("eval", tied, *(word for pair in small.items() for word in pair))
    assert code != 0 and ("window" in err or option in err)


def test_messages_keep_their_brackets(broken: Path, tmp_path: Path, call: Any) -> None:
    set_config(broken, "vector_lens", 4)
    code, _, err = call("dequantize", broken, "--out", tmp_path / "out")
    assert code == 1 and one_line(err).endswith("expected [outlier, main]")
    code, _, err = call("eval", tmp_path / "[/red]")
    assert code == 1 and "[/red]" in one_line(err)
