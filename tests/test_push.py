"""Cards, the licenses on them, uploads; and what is downloaded."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from quantize.errors import QuantizeError
from quantize.push import model_card, upload
from quantize.recipe import Recipe
from vllm_vptq.hub import checkpoint_folder
from vllm_vptq.specs import VPTQFormatError

pytest_plugins = ("tests.tiny_fixtures",)


class FakeHub:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, options))
            return types.SimpleNamespace(commit_url="https://hub/commit")

        return call


@pytest.mark.parametrize("revision", [None, "3bit"])
def test_upload(fine: Path, tmp_path: Path, revision: str | None) -> None:
    checkpoint, hub = Path(shutil.copytree(fine, tmp_path / "copy")), FakeHub()
    api: Any = hub
    assert upload(api, checkpoint, "me/model", "org/base", ["wikitext-2=12.3"], revision, True) == "https://hub/commit"
    assert [name for name, _ in hub.calls] == ["create_repo", *(["create_branch"] if revision else []), "upload_folder"]
    assert hub.calls[0][1]["private"] and hub.calls[-1][1]["revision"] == revision
    card = (checkpoint / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/base\n") and "| wikitext-2 | | 12.3 |" in card
    recipe = Recipe.load(checkpoint / "vptq_recipe.json")
    assert f'"tokens": {recipe.tokens}' in card and "14 linear layers" in card


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("license: mit", ["license: mit"]),
        (
            "license: other\nlicense_name: llama3.1\nlicense_link: LICENSE",
            ["license: other", "license_name: llama3.1", "license_link: {link}"],
        ),
        ("license_link: https://a.b/c\nlicense: other", ["license: other", "license_link: https://a.b/c"]),
        ("language: [en]", ["license: from-config"]),
        ("license: [broken", ["license: from-config"]),
        (None, ["license: from-config"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("hub", [False, True], ids=["directory", "hub"])
def test_a_card_has_the_license_of_the_original(
    fine: Path, tmp_path: Path, monkeypatch: Any, said: str | None, expected: list[str], hub: bool
) -> None:
    checkpoint, original = Path(shutil.copytree(fine, tmp_path / "copy")), tmp_path / "original"
    config = json.loads((checkpoint / "config.json").read_text()) | {"license": "from-config"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    original.mkdir()
    if said is not None:
        (original / "README.md").write_text(f"---\n{said}\n---\ntext")
    if hub:
        load = ModelCard.load
        monkeypatch.setattr(ModelCard, "load", lambda name: load({"org/base": original / "README.md"}[name]))
    name = "org/base" if hub else str(original)
    link = "https://huggingface.co/org/base/blob/main/LICENSE" if hub else "LICENSE"
    front = model_card(checkpoint, name, []).split("---\n")[1].splitlines()
    assert [line for line in front if line.startswith("license")] == [line.format(link=link) for line in expected]
    assert "pipeline_tag: text-generation" in front


def answer(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RemoteEntryNotFoundError("no README", response=answer(404)), None),
        (RepositoryNotFoundError("no repository", response=answer(404)), None),
        (GatedRepoError("ask for access\nthere", response=answer(403)), "(ask for access)"),
        (LocalEntryNotFoundError("offline"), "(offline)"),
        (TimeoutError(), "(TimeoutError)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_license_that_could_not_be_read_is_told(
    fine: Path, monkeypatch: Any, error: Exception, said: str | None
) -> None:
    def load(_: str) -> None:
        raise error

    monkeypatch.setattr(ModelCard, "load", load)
    notes: list[str] = []
    assert "license" not in yaml.safe_load(model_card(fine, "org/base", [], notes.append).split("---\n")[1])
    assert len(notes) == (said is not None) and all("license of org/base" in n and str(said) in n for n in notes)


def test_a_card_without_a_license_has_none_and_says_how_to_install(fine: Path, tied: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ModelCard, "load", lambda _: ModelCard("---\nlanguage: en\n---\n"))
    notes: list[str] = []
    card = model_card(fine, "org/base", [], notes.append)
    model_card(fine, str(tied), [], notes.append)
    assert not notes
    front = yaml.safe_load(card.split("---\n")[1])
    assert front.keys() == {"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"}
    assert '    pip install -e ".[gpu]"' in card and "pip install vllm-vptq" not in card


def test_what_cannot_be_uploaded(fine: Path, tied: Path, tmp_path: Path) -> None:
    class Refusing(FakeHub):
        def create_repo(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("no such user\nmore")  # the hub client has errors of many kinds

    checkpoint, api = Path(shutil.copytree(fine, tmp_path / "copy")), FakeHub()
    for match, hub, folder, results in [
        ("no such user$", Refusing(), checkpoint, []),
        ("expected NAME=VALUE", api, checkpoint, ["great"]),
    ]:
        given: Any = hub
        with pytest.raises(QuantizeError, match=match):
            upload(given, folder, "me/model", "org/base", results, None, True)
    (checkpoint / "parts").mkdir()
    with pytest.raises(QuantizeError, match="unfinished"):
        upload(api, checkpoint, "me/model", "org/base", [], None, True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"config\.json"):
        model_card(tied, "org/base", [])
    assert not api.calls


# ---------------------------------------------------------------------------------------------------------------
# Downloads


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (None, None),
        ({"model_type": "llama"}, "no VPTQ configuration"),
        ([], "holds a list"),
        ("{", "no readable config.json"),
    ],
    ids=["vptq", "dense", "list", "broken"],
)
def test_nothing_is_downloaded_before_the_configuration_is_vptq(
    fine: Path, tmp_path: Path, monkeypatch: Any, config: Any, refused: str | None
) -> None:
    folder, asked = Path(shutil.copytree(fine, tmp_path / "hub")), []
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(folder / file))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.extend(allow_patterns) or str(folder)
    )
    if refused:
        with pytest.raises(VPTQFormatError, match=refused):
            checkpoint_folder("me/model")
        assert not asked
        return
    assert checkpoint_folder("me/model") == folder
    wanted = {file.name for file in folder.iterdir() if any(file.match(pattern) for pattern in asked)}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= wanted
    assert any(name.endswith(".safetensors") for name in wanted) and "*.bin" not in asked and "*" not in asked
