"""What to do with which layer, as validated data: a YAML file or the command line's options.

A recipe has defaults for every linear layer and rules that change them where a module's name matches:

    vector_length: 4
    centroids: 256
    residual_centroids: 128
    rules:
      - match: "*.down_proj"
        residual_centroids: 256
      - match: "model.layers.0.*"
        skip: true
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from quantize.errors import QuantizeError
from vllm_vptq.specs import MAX_CENTROIDS, MAX_VECTOR, MIN_VECTOR, LayerSpec


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is no power of two")
    return value


def _not_one(value: int) -> int:
    if value == 1:
        raise ValueError("a book of 1 centroid holds nothing; 0 is none")
    return value


Vector = Annotated[int, Field(ge=MIN_VECTOR, le=MAX_VECTOR)]
Centroids = Annotated[int, Field(ge=2, le=MAX_CENTROIDS), AfterValidator(_power_of_two)]
Residual = Annotated[int, Field(ge=0, le=MAX_CENTROIDS), AfterValidator(_power_of_two), AfterValidator(_not_one)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRecipe(_Strict):
    """How one linear layer is coded."""

    vector_length: Vector = Field(4, description="output rows that share one index")
    centroids: Centroids = Field(256, description="entries of the main codebook, a power of two")
    residual_centroids: Residual = Field(128, description="entries of the residual codebook, 0 for none")
    norm: bool = Field(True, description="scale and shift every input column before coding")
    perm: bool = Field(True, description="code columns in descending order of their second moment")

    def spec(self, out_features: int, in_features: int) -> LayerSpec:
        """The checkpoint format's description of a layer of the given size."""
        return LayerSpec(
            in_features=in_features,
            out_features=out_features,
            vector_len=self.vector_length,
            num_centroids=self.centroids,
            num_res_centroids=self.residual_centroids,
            enable_norm=self.norm,
            enable_perm=self.perm,
        )


class Rule(_Strict):
    """Changes for the modules whose full name matches a shell pattern; later rules win."""

    match: str = Field(description="shell pattern on the full module name, such as *.down_proj")
    skip: bool | None = Field(None, description="leave the module dense")
    vector_length: Vector | None = None
    centroids: Centroids | None = None
    residual_centroids: Residual | None = None
    norm: bool | None = None
    perm: bool | None = None


class Recipe(LayerRecipe):
    """A whole run. Two runs with one recipe on one machine write the same files, bit for bit."""

    rules: tuple[Rule, ...] = ()
    calibration: str | None = Field(
        None, description="a text file, a datasets name as NAME[:CONFIG], or nothing: text the model writes itself"
    )
    tokens: int = Field(16384, ge=1024, description="calibration tokens")
    context: int = Field(256, ge=32, description="tokens in a calibration sequence")
    damping: float = Field(0.01, gt=0, lt=1, description="added to the second moments, relative to their mean")
    iterations: int = Field(10, ge=1, description="rounds of k-means")
    candidates: int = Field(4, ge=1, description="main centroids tried with every residual one, for each vector")
    seed: int = Field(0, ge=0, lt=1 << 63)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def layer(self, name: str) -> LayerRecipe | None:
        """What to do with a module; None to leave it dense."""
        fields = {key: getattr(self, key) for key in LayerRecipe.model_fields}
        skip = False
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                skip = skip if rule.skip is None else rule.skip
                fields |= {k: v for k in fields if (v := getattr(rule, k)) is not None}
        return None if skip else LayerRecipe(**fields)

    @classmethod
    def load(cls, path: Path | None, **options: Any) -> Recipe:
        """Reads a YAML recipe; options that are not None win over it. QuantizeError names what is wrong."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf8")) if path else {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise QuantizeError(f"recipe {path}: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise QuantizeError(f"recipe {path}: expected a table of options by name, found {str(data)[:60]!r}")
        try:
            return cls(**(data | {k: v for k, v in options.items() if v is not None}))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise QuantizeError(f"recipe: {where}: {first['msg']}") from error
