"""Models on the hub by branch, tag or commit. The hub is a cache of files, and no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantize.push import model_card
from tests.tiny import command, one_line

pytest_plugins = ("tests.tiny_fixtures",)
COMMITS = {"main": "0" * 40, "older": "1" * 40}
SMALL = ("--vector-length", 8, "--centroids", 16, "--residual-centroids", 0, "--tokens", 1024, "--context", 64)


@pytest.fixture
def hub(tied: Path, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was another once."""
    folder = tmp_path / "hub" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    for (branch, commit), files in zip(COMMITS.items(), (untied, tied), strict=True):
        (folder / "refs" / branch).write_text(commit)
        shutil.copytree(files, folder / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("revision", [None, "older", "1" * 40])
def test_a_run_of_a_revision(hub: None, text_file: Path, tmp_path: Path, revision: str | None) -> None:
    out, words = tmp_path / "q", () if revision is None else ("--revision", revision)
    done = command("run", "org/tiny", "--out", out, *SMALL, "--calibration", text_file, *words)
    assert done.returncode == 0, done.stderr
    commit = COMMITS["main" if revision is None else "older"]
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == (revision is not None)
    assert json.loads((out / "vptq_versions.json").read_text())["revision"] == commit
    card = model_card(out, "org/tiny", [])
    assert f"vptq-quantize run org/tiny --revision {commit} --out DIR" in card and ", revision" not in card


def test_a_plan_of_a_revision(hub: None) -> None:
    done = command("plan", "org/tiny", *SMALL, "--revision", "older")
    assert done.returncode == 0 and "effective bits" in done.stdout
    done = command("plan", "org/tiny", *SMALL, "--revision", "absent")
    assert done.returncode == 1 and one_line(done.stderr).startswith("error: cannot load model org/tiny")


def test_the_card_of_a_model_from_a_directory_names_no_revision(fine: Path) -> None:
    assert "--revision" not in model_card(fine, "org/base", [])
