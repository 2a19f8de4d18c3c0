"""Models and checkpoints that several files read. Imports are late: most tests need no transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, biases in the attention, float32."""
    from tests.tiny import make_model

    return make_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True, attention_bias=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of its own, no biases, bfloat16."""
    import torch

    from tests.tiny import make_model

    return make_model(tmp_path_factory.mktemp("untied"), dtype=torch.bfloat16, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import TEXT

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def fine(tied: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ``tied`` with many bits."""
    from tests.tiny import FINE, run

    out = tmp_path_factory.mktemp("fine") / "vptq"
    run(tied, out, FINE.model_copy(update={"calibration": (str(text_file),)}))
    return out


@pytest.fixture
def broken(fine: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(fine, tmp_path / "broken"))
