"""Calibration text: files, conversations, mixtures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.calibration import calibration_tokens, shares, trained_tokens, wanted_tokens
from quantize.errors import QuantizeError
from quantize.recipe import Finetuning, Recipe
from tests.strategies import few


@few(100)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), count=st.integers(1, 500))
def test_shares_are_whole_and_fair(weights: list[float], count: int) -> None:
    found = shares(weights, count)
    assert sum(found) == count
    assert all(abs(n - count * w / sum(weights)) < 1 for n, w in zip(found, weights, strict=True))


class Letters:
    """A tokenizer of characters, with a chat template on request."""

    all_special_ids = ()

    def __init__(self, template: str | None = None) -> None:
        self.chat_template = template

    def __call__(self, text: str, **_: object) -> object:
        return type("Encoding", (), {"input_ids": torch.tensor([[ord(c) for c in text]])})

    def apply_chat_template(self, messages: list[dict], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def tokens(tokenizer: Letters, *sources: str) -> torch.Tensor:
    recipe = Recipe(calibration=sources, tokens=1024, context=32)
    return calibration_tokens(None, tokenizer, recipe, lambda done, total: None)


def text(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.flatten().tolist()))


def test_one_file_is_read_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 200)
    assert text(tokens(Letters(), str(tmp_path / "a.txt"))) == ("0123456789" * 200)[:1024]


def test_a_mixture_holds_its_shares_in_any_order(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 2000)
    ids = tokens(Letters(), f"{tmp_path}/a.txt@3", f"{tmp_path}/b.txt")
    rows = [set(text(row)) for row in ids]
    assert len(rows) == 32 and rows.count({"a"}) == 24 and rows.count({"b"}) == 8
    assert rows[:24] != [{"a"}] * 24


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x" * 2000}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    assert text(tokens(Letters("yes"), f"{tmp_path}/c.jsonl")).startswith("<user>xxx")
    with pytest.raises(QuantizeError, match="no chat template"):
        tokens(Letters(), f"{tmp_path}/c.jsonl")


def test_conversations_of_older_data_sets_are_read_alike(tmp_path: Path) -> None:
    rows = [{"from": "human", "value": "x" * 2000}, {"from": "gpt", "value": "y"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"conversations": rows}))
    assert text(tokens(Letters("yes"), f"{tmp_path}/c.jsonl")).startswith("<user>xxx")
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [{"text": "x"}]}))
    with pytest.raises(QuantizeError, match="template refuses a row"):
        tokens(Letters("yes"), f"{tmp_path}/c.jsonl")


def test_a_data_set_is_read_as_far_as_needed(tmp_path: Path) -> None:
    """A folder of files is one; names on the hub go the same way."""
    rows = "".join(json.dumps({"id": str(i), "text": "0123456789"}) + "\n" for i in range(500))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(rows)
    assert text(tokens(Letters(), str(tmp_path / "set"))) == ("0123456789\n\n" * 200)[:1024]
    with pytest.raises(QuantizeError, match="neither a text file nor a data set"):
        tokens(Letters(), f"{tmp_path}/absent")


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [
        ("org/set", None, "train"),
        ("org/set:", None, "train"),
        ("org/set:en", "en", "train"),
        ("org/set:en:", "en", "train"),
        ("org/set:en:validation", "en", "validation"),
        ("org/set::train_sft@2", None, "train_sft"),
    ],
)
def test_configuration_and_split(monkeypatch: pytest.MonkeyPatch, name: str, config: str | None, split: str) -> None:
    asked: list[object] = []

    def load_dataset(*words: object, **options: object) -> list[dict[str, str]]:
        asked.append((*words, options))
        return [{"text": "a" * 2000}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert text(tokens(Letters(), name)) == "a" * 1024
    assert asked == [("org/set", config, {"split": split, "streaming": True})]


def test_a_split_that_there_is_not_is_said(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        (tmp_path / "set" / f"{split}.jsonl").write_text(json.dumps({"text": split * 1000}))
    assert text(tokens(Letters(), f"{tmp_path}/set::test")).startswith("testtest")
    with pytest.raises(QuantizeError, match="absent"):
        tokens(Letters(), f"{tmp_path}/set::absent")


@pytest.mark.parametrize(("line", "match"), [("{", "line 2"), ("[1]", "line 2.*table"), ('{"n": 5}', "no text column")])
def test_lines_that_say_nothing_are_named(tmp_path: Path, line: str, match: str) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(QuantizeError, match=match):
        tokens(Letters(), f"{tmp_path}/c.jsonl")


def test_wide_layers_get_more_tokens_as_far_as_the_texts_go(tmp_path: Path) -> None:
    for name, size in (("a", 9000), ("b", 1800)):
        (tmp_path / f"{name}.txt").write_text(name * size)
    both = (f"{tmp_path}/a.txt@3", f"{tmp_path}/b.txt")

    def sequences(*sources: str, **more: int) -> dict[str, int]:
        recipe = Recipe(calibration=sources, tokens=1024, context=32, **more)
        ids = calibration_tokens(None, Letters(), recipe, lambda done, total: None, widest=600)
        assert ids.shape[1] == 32
        return {name: int((ids == ord(name)).all(1).sum()) for name in "ab"}

    assert sequences(both[0]) == {"a": 150, "b": 0}  # 8 for each of 600 inputs
    assert sequences(both[0], tokens_per_input=100) == {"a": 281, "b": 0}  # all there is
    assert sequences(both[0], tokens_per_input=1) == {"a": 32, "b": 0}
    mixed = sequences(*both, tokens_per_input=100)
    assert mixed["b"] == 56 and abs(mixed["a"] - 3 * 56) <= 3  # the shortest decides
    assert wanted_tokens(Recipe(calibration=both), 10_000) == 80_000
    assert wanted_tokens(Recipe(), 10_000) == wanted_tokens(Recipe(calibration=("self",)), 10_000) == 16384


def test_training_reads_on_where_a_text_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 500)
    given = Recipe(
        calibration=(f"{tmp_path}/a.txt",), tokens=1024, context=32, finetune=Finetuning(steps=3, tokens=960)
    )
    ids = calibration_tokens(None, Letters(), given, lambda done, total: None, widest=10)
    assert trained_tokens(given) == ids.numel() == 2880 and wanted_tokens(given, 10) == 1024
    assert text(ids) == ("0123456789" * 500)[:2880]
    longer = given.model_copy(update={"finetune": Finetuning(steps=100)})
    ids = calibration_tokens(None, Letters(), longer, lambda done, total: None, widest=10)
    assert ids.numel() == 5000 // 32 * 32  # all there is
    # Tokens that are asked for are exact, and text that the model writes takes long.
    assert trained_tokens(given.model_copy(update={"tokens_per_input": 0})) == 0
    assert trained_tokens(given.model_copy(update={"calibration": ("self",)})) == 0


def test_a_short_source_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 100)
    with pytest.raises(QuantizeError, match=r"a\.txt has 100 tokens, 1024 are needed"):
        tokens(Letters(), f"{tmp_path}/a.txt")
