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

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

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


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else () if value is None else value


def split_source(source: str) -> tuple[str, float]:
    """``NAME@WEIGHT`` as name and weight, which is 1 where none is given; ValueError if it is no positive number."""
    name, at, weight = source.rpartition("@")
    if not at:
        return source, 1.0
    try:
        share = float(weight)
    except ValueError:
        share = 0.0
    if not 0 < share < math.inf:
        raise ValueError(f"{source}: the weight of a source must be a number above 0")
    return name, share


def _source(value: str) -> str:
    split_source(value)
    return value


Source = Annotated[str, AfterValidator(_source)]


BYTE_BOOK = 256
"""Entries of a book whose indices are bytes."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRecipe(_Strict):
    """How one linear layer is coded."""

    vector_length: Vector = Field(4, description="output rows that share one index")
    centroids: Centroids = Field(256, description="entries of the main codebook, a power of two")
    residual_centroids: Residual = Field(128, description="entries of the residual codebook, 0 for none")
    norm: bool = Field(True, description="scale and shift every input column before coding")
    perm: bool = Field(
        False,
        description="store columns in the order they are coded in; costs bits, and only groups and outliers need it",
    )
    groups: int = Field(1, ge=1, description="column groups with books of their own")
    outliers: int = Field(0, ge=0, description="columns, the most important ones, that get an outlier book")
    outlier_vector_length: Vector = 2
    outlier_centroids: Centroids = 256

    def spec(self, out_features: int, in_features: int) -> LayerSpec:
        """The checkpoint format's description of a layer of the given size."""
        return LayerSpec(
            in_features=in_features,
            out_features=out_features,
            vector_len=self.vector_length,
            num_centroids=self.centroids,
            num_res_centroids=self.residual_centroids,
            group_num=self.groups,
            outlier_size=self.outliers,
            outlier_vector_len=self.outlier_vector_length if self.outliers else 0,
            num_outlier_centroids=self.outlier_centroids if self.outliers else 0,
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
    groups: Annotated[int, Field(ge=1)] | None = None
    outliers: Annotated[int, Field(ge=0)] | None = None
    outlier_vector_length: Vector | None = None
    outlier_centroids: Centroids | None = None


_Rate = Annotated[float | None, Field(gt=0, lt=1, description="by default by the bits: training.py")]


class BlockTuning(_Strict):
    """Training a block: how far and how fast, the rate being the first step's size relative to what it changes."""

    steps: Annotated[int, Field(ge=0, description="of 2048 calibration tokens; 0 for none")] = 0
    rate: _Rate = None


class Finetuning(_Strict):
    """Training end to end: how far and how fast, the rate being the first step's size relative to what it changes."""

    steps: Annotated[int, Field(ge=0, description="0 for none")] = 0
    tokens: Annotated[int, Field(ge=32, description="calibration tokens a step")] = 4096
    rate: _Rate = None


class Recipe(LayerRecipe):
    """A whole run. Two runs with one recipe on one machine write the same files, bit for bit."""

    rules: tuple[Rule, ...] = ()
    bits: float | None = Field(
        None, gt=1, le=8, description="effective bits, books included: chooses vector lengths and books per layer"
    )
    books: Literal["any", "bytes"] = Field(
        "any",
        description="for bits: of any sizes; or bytes, pairs of 256 entries and vectors as long as bits allow, which "
        "GPUs hold without padding and look up fastest",
    )
    largest_book: Centroids = Field(4096, description="for bits: the most centroids a book may have")
    residual_books: bool = Field(True, description="for bits: whether there may be residual books")
    allocation: Literal["measured", "uniform"] = Field(
        "measured", description="for bits: layer by layer, by what each is worth; or one kind for all"
    )
    activations: Literal["quantized", "original"] = Field(
        "quantized", description="second moments of what the coded layers before give, or of the original's"
    )
    correction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how far targets make up for what the coded layers before did to their inputs and to the residual "
        "stream that they add to",
    )
    guided: int = Field(
        0, ge=0, description="groups of output rows with second moments weighted by the end loss; 0 for plain ones"
    )
    curvature: bool = Field(
        False,
        description="couple output rows by what the end loss feels of them together: errors of rows that are coded are "
        "made up for by others; needs algorithm joint, and takes a pass forward and back",
    )
    calibration: Annotated[tuple[Source, ...], BeforeValidator(_one_or_many)] = Field(
        (), description="text files, datasets as NAME[:CONFIG[:SPLIT]], self for the model's own text; each @WEIGHT"
    )
    tokens: int = Field(16384, ge=1024, description="calibration tokens, at least")
    tokens_per_input: int = Field(
        8,
        ge=0,
        description="calibration tokens for every input of the widest layer, as far as a given text goes: with fewer, "
        "second moments are largely of the sample; 0 where only tokens are given",
    )
    context: int = Field(256, ge=32, description="tokens in a calibration sequence")
    damping: float = Field(0.01, gt=0, lt=1, description="added to the second moments, relative to their mean")
    algorithm: Literal["joint", "vptq"] = Field(
        "joint", description="vptq: random seeding, and the residual book trained on what a first walk leaves"
    )
    iterations: int = Field(10, ge=1, description="rounds of k-means, at most")
    candidates: int = Field(4, ge=1, description="main centroids tried with every residual one, for each vector")
    rounds: int = Field(1, ge=0, description="refinements: books and norm by least squares, then indices by descent")
    fit_steps: int = Field(12, ge=1, description="conjugate gradient steps of a least squares fit")
    finetune_blocks: BlockTuning = Field(
        default_factory=BlockTuning, description="each block as it is coded, towards the original block's output"
    )
    finetune: Finetuning = Field(default_factory=Finetuning, description="end to end, towards the original")
    seed: int = Field(0, ge=0, lt=1 << 63)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _books_of_bytes(self) -> Recipe:
        if self.books == "bytes":
            if self.bits is None:
                raise ValueError("books bytes are for bits; give some")
            if not self.residual_books or self.largest_book < BYTE_BOOK:
                raise ValueError("books bytes are pairs of 256; leave residual_books and largest_book as they are")
        return self

    @model_validator(mode="after")
    def _one_view_of_rows(self) -> Recipe:
        if self.curvature and (self.guided or self.algorithm != "joint"):
            raise ValueError("curvature goes with algorithm joint and without guided; leave it out: curvature: false")
        return self

    def layer(self, name: str) -> LayerRecipe | None:
        """What to do with a module; None to leave it dense."""
        fields = {key: getattr(self, key) for key in LayerRecipe.model_fields}
        skip = False
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                skip = skip if rule.skip is None else rule.skip
                fields |= {k: v for k in fields if (v := getattr(rule, k)) is not None}
        return None if skip else LayerRecipe(**fields)

    def written(self) -> dict[str, Any]:
        """What to keep of it in a file that loads as the same recipe: what is no default, and both counts of tokens."""
        tokens = {"tokens": self.tokens, "tokens_per_input": self.tokens_per_input}
        return self.model_dump(mode="json", exclude_defaults=True) | tokens

    @property
    def drifts(self) -> bool:
        """Whether targets are corrected for the drift of their inputs; the original's inputs do not drift."""
        return self.correction > 0 and self.activations == "quantized"

    def is_fixed(self, name: str) -> bool:
        """Whether a rule says what books a module gets, so that ``bits`` does not."""
        sizes = ("vector_length", "centroids", "residual_centroids", "groups", "outliers")
        rules = [rule for rule in self.rules if fnmatchcase(name, rule.match)]
        return any(getattr(rule, size) is not None for rule in rules for size in sizes)

    @classmethod
    def load(
        cls, path: Path | None, preset: str | None = None, finetune_steps: int | None = None, **options: Any
    ) -> Recipe:
        """Reads a YAML recipe; it wins over a preset, and options that are not None over both.

        Where file or options say how many calibration tokens, there are as many, however wide layers are.
        ``finetune_steps`` are those of ``finetune``, whose rate and tokens stay. QuantizeError names what is wrong.
        """
        if preset is not None and preset not in PRESETS:
            raise QuantizeError(f"preset {preset}, expected one of {', '.join(PRESETS)}")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf8")) if path else {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise QuantizeError(f"recipe {path}: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise QuantizeError(f"recipe {path}: expected a table of options by name, found {str(data)[:60]!r}")
        said = data | {k: v for k, v in options.items() if v is not None}
        only = {"tokens_per_input": 0} if "tokens" in said else {}
        data = PRESETS.get(preset or "", {}) | only | said
        training = data.get("finetune", {})
        if finetune_steps is not None and isinstance(training, dict):
            data["finetune"] = training | {"steps": finetune_steps}
        try:
            return cls(**data)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}." for part in first["loc"]).removesuffix(".")
            what = first["msg"].removeprefix("Value error, ")
            raise QuantizeError(f"recipe: {where}: {what}" if where else f"recipe: {what}") from error


_PAPER = {"perm": True, "algorithm": "vptq", "activations": "original", "candidates": 1, "iterations": 100, "rounds": 0}
PRESETS: dict[str, dict[str, Any]] = {
    # Second moments of the quantized prefix, targets that make up for its drift, joint books, one refinement.
    "fast": {"rounds": 1, "correction": 0.5, "allocation": "uniform"},
    # More of each, bits by measured sensitivity, and a short training end to end; for the best, rows coupled, too.
    "balanced": {
        "rounds": 3,
        "correction": 0.5,
        "iterations": 20,
        "tokens": 32768,
        "tokens_per_input": 64,
        "finetune": {"steps": 100},
    },
    "best": {
        "rounds": 6,
        "correction": 0.5,
        "iterations": 20,
        "candidates": 8,
        "tokens": 131072,
        "tokens_per_input": 128,
        "curvature": True,
        "finetune": {"steps": 500},
    },
    # VPTQ as released: no fine-tuning. Its norm forgets to scale the Hessian; this one does not.
    "paper": _PAPER | {"allocation": "uniform", "tokens": 32768},
    # GPTVQ's ways in VPTQ's format: no norm, no residual, books fitted to the layer's loss after the walk.
    "gptvq-like": {
        "norm": False,
        "residual_books": False,
        "residual_centroids": 0,
        "largest_book": 256,
        "rounds": 1,
        "tokens": 32768,
        "allocation": "uniform",
    },
}
"""Recipes by name; a file or an option changes what it names."""
