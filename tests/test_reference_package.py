"""What the quantizer writes, read by the reference's own package (``vptq`` on PyPI), whose layer decodes it in torch.

scripts/test.sh installs that package without what it depends on, which is much and old; without it these are skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quantize.recipe import Recipe
from tests.tiny import COARSE, FINE, module_tensors, read, run
from vllm_vptq.format import dequantize, read_layer_specs

pytest_plugins = ("tests.tiny_fixtures",)

# Its residual indices are read with as many bits as its main ones, so they may not have more.
RECIPES = {
    "residual, perm, norm": FINE,
    "padding": FINE.model_copy(update={"vector_length": 6, "centroids": 64, "residual_centroids": 16}),
    "one book": COARSE.model_copy(update={"perm": False}),
    "groups": COARSE.model_copy(update={"groups": 2}),
    "outliers": COARSE.model_copy(update={"outliers": 8, "residual_centroids": 8}),
    "no norm": COARSE.model_copy(update={"norm": False}),
    # As --bits writes them: vectors of lengths that no public checkpoint has.
    "v2": COARSE.model_copy(update={"vector_length": 2, "norm": False}),
    "v3": COARSE.model_copy(update={"vector_length": 3, "centroids": 64, "norm": False}),
    "v5": COARSE.model_copy(update={"vector_length": 5, "centroids": 32, "norm": False}),
}


@pytest.fixture(scope="module")
def layer_class() -> Any:
    """The reference's ``VQuantLinear``."""
    if importlib.util.find_spec("vptq") is None:
        pytest.skip("the package vptq is not installed")
    # Imported at the top of its packing tool, for one isinstance.
    absent = ModuleType("sentence_transformers.SentenceTransformer")
    absent.SentenceTransformer = type("SentenceTransformer", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault("sentence_transformers", ModuleType("sentence_transformers"))
    sys.modules.setdefault(absent.__name__, absent)
    return importlib.import_module("vptq.layers.vqlinear").VQuantLinear


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_reference_decodes_the_same_weights(
    layer_class: Any, recipe: Recipe, tied: Path, text_file: Path, tmp_path: Path
) -> None:
    run(tied, tmp_path / "out", recipe.model_copy(update={"calibration": (str(text_file),)}))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    specs, tensors = read_layer_specs(config), read(tmp_path / "out")
    layers = config["quantization_config"]["config_for_layers"]
    assert len(layers) == 14
    for name, arguments in layers.items():
        own = module_tensors(tensors, name)
        has_bias = own.pop("bias", None) is not None
        # As its loader makes a layer: from its entry of the configuration, then the tensors by name.
        layer = layer_class(**arguments, bias=False, enable_proxy_error=False, dtype=torch.float32)
        layer.load_state_dict(own, strict=True)
        with torch.no_grad():
            found = layer(torch.eye(layer.in_features)).T
        torch.testing.assert_close(found, dequantize(own, specs[name]), rtol=1e-5, atol=1e-6)
        assert has_bias == (name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj"))
