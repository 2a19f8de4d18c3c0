"""Recipes: YAML and options, rules, and one line for everything that is wrong."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from quantize import cli
from quantize.errors import QuantizeError
from quantize.recipe import PRESETS, BlockTuning, Finetuning, LayerRecipe, Recipe, Rule
from tests.strategies import few
from vllm_vptq.format import LayerSpec, VPTQFormatError


def load(tmp_path: Path, content: Any, **options: Any) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return Recipe.load(path, **options)


def refused(tmp_path: Path, content: Any, **options: Any) -> str:
    """The message of a QuantizeError of one line."""
    with pytest.raises(QuantizeError) as caught:
        load(tmp_path, content, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def rules(*entries: dict[str, Any]) -> Recipe:
    return Recipe(rules=tuple(Rule(**entry) for entry in entries))


# ---------------------------------------------------------------------------------------------------------------
# Reading


def test_defaults() -> None:
    recipe = Recipe.load(None)
    assert recipe == Recipe()
    assert recipe.norm and not recipe.perm and not recipe.rules and not recipe.calibration


def test_the_help_of_the_command_line_names_the_defaults() -> None:
    for field, option in inspect.signature(cli.run).parameters.items():
        if field in Recipe.model_fields and field not in ("calibration", "bits"):
            (info,) = get_type_hints(cli.run, include_extras=True)[field].__metadata__
            default = Recipe.model_fields[field].default
            shown = {False: "no", True: "yes"}[default] if isinstance(default, bool) else default
            assert option.default is None and f"[{shown}]" in info.help, field


def test_the_example_of_the_module_reads(tmp_path: Path) -> None:
    from quantize import recipe as module

    assert module.__doc__
    text = module.__doc__.partition("matches:")[2]
    recipe = load(tmp_path, text)
    assert recipe.layer("model.layers.0.mlp.down_proj") is None
    down, up = recipe.layer("model.layers.1.mlp.down_proj"), recipe.layer("model.layers.1.mlp.up_proj")
    assert down is not None and down.residual_centroids == 256
    assert up is not None and up.residual_centroids == 128


EVERYTHING = {
    "vector_length": 8,
    "centroids": 4096,
    "residual_centroids": 0,
    "norm": False,
    "perm": True,
    "groups": 4,
    "outliers": 16,
    "outlier_vector_length": 4,
    "outlier_centroids": 64,
    "bits": 2.5,
    "books": "any",
    "largest_book": 512,
    "residual_books": False,
    "allocation": "uniform",
    "activations": "original",
    "correction": 0.25,
    "guided": 4,
    "curvature": False,
    "algorithm": "vptq",
    "rounds": 0,
    "fit_steps": 3,
    "finetune_blocks": {"steps": 4, "rate": 0.25},
    "finetune": {"steps": 5, "rate": 0.5, "tokens": 64},
    "rules": [{"match": "a.*", "skip": True}, {"match": "b", "norm": True, "vector_length": 16}],
    "calibration": ["text.txt", "name:config@0.5"],
    "tokens": 2048,
    "tokens_per_input": 3,
    "context": 64,
    "damping": 0.5,
    "iterations": 1,
    "candidates": 7,
    "seed": 3,
    "device": "cpu",
}


def test_every_field_is_read(tmp_path: Path) -> None:
    assert set(EVERYTHING) == set(Recipe.model_fields)
    recipe = load(tmp_path, EVERYTHING)
    for key, value in EVERYTHING.items():
        if key not in ("rules", "finetune", "finetune_blocks"):
            found = getattr(recipe, key)
            assert (list(found) if isinstance(found, tuple) else found) == value, key
    assert recipe.finetune_blocks == BlockTuning(steps=4, rate=0.25)
    assert recipe.finetune == Finetuning(steps=5, rate=0.5, tokens=64)
    assert recipe.rules == (Rule(match="a.*", skip=True), Rule(match="b", norm=True, vector_length=16))


def test_tokens_that_are_asked_for_are_exact(tmp_path: Path) -> None:
    assert load(tmp_path, {}, preset="fast").tokens_per_input == 8
    for recipe in (load(tmp_path, {"tokens": 4096}), load(tmp_path, {}, preset="best", tokens=4096)):
        assert (recipe.tokens, recipe.tokens_per_input) == (4096, 0)
    assert load(tmp_path, {"tokens": 4096, "tokens_per_input": 5}).tokens_per_input == 5


def test_books_of_bytes_go_with_bits_and_with_nothing_else_about_books(tmp_path: Path) -> None:
    assert load(tmp_path, {"bits": 2.5, "books": "bytes"}).books == "bytes"
    for more, expected in (
        ({}, "recipe: books bytes are for bits"),
        ({"bits": 2.5, "residual_books": False}, "recipe: books bytes are pairs of 256; leave residual_books"),
        ({"bits": 2.5, "largest_book": 128}, "recipe: books bytes are pairs of 256"),
    ):
        with pytest.raises(QuantizeError, match=expected):
            load(tmp_path, {"books": "bytes"} | more)


@pytest.mark.parametrize("other", [{"guided": 2}, {"algorithm": "vptq"}], ids=str)
def test_curvature_goes_with_neither(tmp_path: Path, other: dict) -> None:
    assert load(tmp_path, {"curvature": True}).curvature
    with pytest.raises(QuantizeError, match="recipe: curvature goes with algorithm joint and without guided"):
        load(tmp_path, {"curvature": True} | other)


def test_a_recipe_survives_being_written(tmp_path: Path) -> None:
    recipe = load(tmp_path, EVERYTHING)
    for kept in (recipe, load(tmp_path, {}, preset="paper"), load(tmp_path, {}, tokens=16384), Recipe(tokens=2048)):
        assert load(tmp_path, json.dumps(kept.written())) == kept
    assert load(tmp_path, json.dumps(recipe.model_dump())) == recipe


def test_options_win_over_the_file(tmp_path: Path) -> None:
    recipe = load(tmp_path, EVERYTHING, vector_length=2, seed=0, calibration="other", centroids=None, device=None)
    assert (recipe.vector_length, recipe.seed, recipe.calibration) == (2, 0, ("other",))
    assert (recipe.centroids, recipe.device) == (4096, "cpu")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_file_wins_over_a_preset_and_an_option_over_both(tmp_path: Path, preset: str) -> None:
    assert load(tmp_path, {}, preset=preset) == Recipe(**PRESETS[preset])
    assert load(tmp_path, {"rounds": 77, "seed": 5}, preset=preset, seed=6) == Recipe(
        **PRESETS[preset] | {"rounds": 77, "seed": 6}
    )


def test_steps_of_training_win_and_leave_the_rest_of_it(tmp_path: Path) -> None:
    assert Recipe.load(None, "balanced", 0) == Recipe(**PRESETS["balanced"] | {"finetune": {"steps": 0}})
    assert Recipe.load(None, finetune_steps=7).finetune == Finetuning(steps=7)
    recipe = load(tmp_path, EVERYTHING, finetune_steps=9)
    assert recipe.finetune == Finetuning(steps=9, rate=0.5, tokens=64)
    assert PRESETS["balanced"]["finetune"] == {"steps": 100}
    assert "finetune" in refused(tmp_path, {"finetune": 5}, finetune_steps=9)
    assert "finetune.steps" in refused(tmp_path, {}, finetune_steps=-1)


def test_presets_that_do_not_exist_are_refused_with_those_that_do() -> None:
    with pytest.raises(QuantizeError, match=r"preset quick, expected one of fast, balanced, best, paper, gptvq-like"):
        Recipe.load(None, preset="quick")


def test_an_option_of_zero_wins() -> None:
    assert Recipe.load(None, residual_centroids=0).residual_centroids == 0


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_an_empty_file_is_no_mistake_or_a_named_one(tmp_path: Path, text: str) -> None:
    try:
        assert load(tmp_path, text) == Recipe()
    except QuantizeError as error:
        assert "recipe.yaml" in str(error) and len(str(error).splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------
# Rules


def test_later_rules_win_field_by_field() -> None:
    recipe = rules(
        {"match": "*", "centroids": 16, "norm": False},
        {"match": "*.down_proj", "centroids": 1024, "residual_centroids": 0},
        {"match": "model.layers.1.*", "vector_length": 8, "perm": False},
    )
    assert recipe.layer("model.layers.0.mlp.up_proj") == LayerRecipe(centroids=16, norm=False)
    down = LayerRecipe(centroids=1024, residual_centroids=0, norm=False)
    assert recipe.layer("model.layers.0.mlp.down_proj") == down
    expected = down.model_copy(update={"vector_length": 8, "perm": False})
    assert recipe.layer("model.layers.1.mlp.down_proj") == expected


def test_a_layer_of_a_recipe_has_its_defaults() -> None:
    recipe = Recipe(vector_length=6, centroids=64, residual_centroids=0, norm=False, perm=False)
    plain = LayerRecipe(vector_length=6, centroids=64, residual_centroids=0, norm=False, perm=False)
    assert recipe.layer("x") == plain
    assert plain.spec(30, 20) == LayerSpec(20, 30, 6, 64)


def test_skip_and_the_way_back() -> None:
    recipe = rules({"match": "*", "skip": True}, {"match": "*.q_proj", "skip": False})
    assert recipe.layer("a.k_proj") is None
    assert recipe.layer("a.q_proj") == LayerRecipe()


def test_a_rule_that_does_not_speak_of_skip_leaves_it() -> None:
    """The module's own example in the other order: layer 0 stays dense, whatever its down_proj would get."""
    recipe = rules({"match": "model.layers.0.*", "skip": True}, {"match": "*.down_proj", "residual_centroids": 256})
    assert recipe.layer("model.layers.0.mlp.up_proj") is None
    assert recipe.layer("model.layers.0.mlp.down_proj") is None


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("*.down_proj", "model.layers.0.mlp.down_proj", True),
        ("*.down_proj", "down_proj", False),
        ("down_proj", "model.layers.0.mlp.down_proj", False),
        ("model.layers.1.*", "model.layers.10.mlp.up_proj", False),
        ("model.layers.1*", "model.layers.10.mlp.up_proj", True),
        ("model.layers.?.*", "model.layers.7.mlp.up_proj", True),
        ("model.layers.[0-3].*", "model.layers.3.mlp.up_proj", True),
        ("model.layers.[!0-3].*", "model.layers.3.mlp.up_proj", False),
        ("*.Q_proj", "a.q_proj", False),
        ("", "a.q_proj", False),
    ],
)
def test_patterns(pattern: str, name: str, hit: bool) -> None:
    assert (rules({"match": pattern, "skip": True}).layer(name) is None) == hit


# ---------------------------------------------------------------------------------------------------------------
# Mistakes

BAD = [
    ("vector_length", 1),
    ("vector_length", 17),
    ("vector_length", 4.5),
    ("vector_length", "four"),
    ("vector_length", None),
    ("centroids", 0),
    ("centroids", 1),
    ("centroids", -256),
    ("centroids", 100),
    ("centroids", 1 << 17),
    ("centroids", [256, 128]),
    ("residual_centroids", -1),
    ("residual_centroids", 1),
    ("residual_centroids", 3),
    ("residual_centroids", 1 << 17),
    ("norm", "maybe"),
    ("perm", 7),
    ("rules", "all"),
    ("rules", {"match": "*"}),
    ("calibration", 5),
    ("calibration", [5]),
    ("calibration", ["a.txt@heavy"]),
    ("calibration", "a.txt@-1"),
    ("groups", 0),
    ("outliers", -1),
    ("outlier_centroids", 3),
    ("outlier_vector_length", 1),
    ("bits", 0.5),
    ("bits", 9),
    ("bits", "two"),
    ("books", "words"),
    ("allocation", "fair"),
    ("activations", "none"),
    ("guided", -1),
    ("algorithm", "awq"),
    ("rounds", -1),
    ("fit_steps", 0),
    ("finetune", {"steps": -1}),
    ("finetune", {"speed": 1}),
    ("finetune_blocks", {"tokens": 64}),
    ("tokens", 0),
    ("tokens", 1023),
    ("context", 31),
    ("context", -512),
    ("damping", 0),
    ("damping", 1),
    ("damping", -0.01),
    ("damping", float("nan")),
    ("damping", float("inf")),
    ("iterations", 0),
    ("candidates", 0),
    ("seed", "lucky"),
    ("seed", 1 << 70),
    ("device", "tpu"),
    ("device", "CUDA"),
    ("vector_lenght", 4),
    ("layer", 4),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=str)
def test_every_bad_value_is_named(tmp_path: Path, field: str, value: Any) -> None:
    assert field in refused(tmp_path, {field: value})
    if value is not None:
        with pytest.raises(QuantizeError, match=field):
            Recipe.load(None, **{field: value})


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ({"skip": True}, "match"),
        ({"match": 5}, "match"),
        ({"match": "*", "skip": "often"}, "skip"),
        ({"match": "*", "centroids": 3}, "centroids"),
        ({"match": "*", "residual_centroids": 1}, "residual_centroids"),
        ({"match": "*", "vector_length": 99}, "vector_length"),
        ({"match": "*", "seed": 1}, "seed"),
        ({"match": "*", "norm": 4}, "norm"),
    ],
    ids=str,
)
def test_every_bad_rule_is_named_with_its_number(tmp_path: Path, rule: dict[str, Any], field: str) -> None:
    message = refused(tmp_path, {"rules": [{"match": "fine"}, rule]})
    assert "rules.1" in message and field in message


@pytest.mark.parametrize(
    "text",
    ["- 1\n- 2\n", "just words", "7", "centroids: [1, 2", "a: b: c", "centroids: 16\n\tseed: 1", "x: !!python/none 1"],
    ids=str,
)
def test_what_is_no_table_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    assert "recipe.yaml" in refused(tmp_path, text)


def test_keys_that_are_no_names_are_refused(tmp_path: Path) -> None:
    assert "1" in refused(tmp_path, "1: 2\n")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00centroids")
    for path in (tmp_path / "absent.yaml", tmp_path, binary):
        with pytest.raises(QuantizeError) as caught:
            Recipe.load(path)
        assert path.name in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_recipes_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Recipe().seed = 5  # type: ignore[misc]


@few(200)
@given(
    v=st.integers(0, 20),
    k=st.integers(-1, 17).map(lambda bits: 1 << bits if bits >= 0 else 0),
    r=st.integers(-1, 17).map(lambda bits: 1 << bits if bits >= 0 else 0),
)
def test_what_a_recipe_allows_the_format_allows(v: int, k: int, r: int) -> None:
    """And the other way round."""
    spec = LayerSpec(64, 48, v, k, r)
    try:
        readable = LayerSpec.from_config(spec.to_config()) == spec
    except VPTQFormatError:
        readable = False
    try:
        recipe = LayerRecipe(vector_length=v, centroids=k, residual_centroids=r, norm=False, perm=False)
    except ValidationError:
        assert not readable
    else:
        assert readable, spec
        assert recipe.spec(48, 64) == spec
