"""Uploading a checkpoint with a card that says how it was made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantize.errors import QuantizeError
from quantize.export import REVISION, VERSIONS, read_config
from quantize.plan import total_bits
from quantize.results import read_results

if TYPE_CHECKING:
    from huggingface_hub import HfApi


Note = Callable[[str], None]
"""Tells the user one line."""


def model_card(checkpoint: Path, original: str, results: Sequence[str], note: Note = print) -> str:
    """The card of a checkpoint, Markdown with the hub's front matter.

    ``results`` are rows as ``NAME=VALUE``, below those that evaluation left beside the checkpoint. ``note`` is told
    where the original's license could not be read.
    """
    config, specs = read_config(checkpoint)
    bits = total_bits(dict(specs))
    recipe = json.loads((checkpoint / "vptq_recipe.json").read_text(encoding="utf8"))
    rows = [
        f"| {name} | {'' if before is None else f'{before:.4g}'} | {after:.4g} |"
        for name, (before, after) in read_results(checkpoint).items()
    ]
    for result in results:
        name, equals, value = result.partition("=")
        if not (name and equals and value):
            raise QuantizeError(f"result {result!r}, expected NAME=VALUE")
        rows.append(f"| {name} | | {value} |")
    table = ["", "## Results", "", "| | original | this |", "|---|---|---|", *rows] if rows else []
    versions = json.loads((checkpoint / VERSIONS).read_text(encoding="utf8"))
    revision = f" --revision {versions[REVISION]}" if REVISION in versions else ""
    return "\n".join(
        [
            "---",
            f"base_model: {original}",
            "base_model_relation: quantized",
            "library_name: vllm",
            "pipeline_tag: text-generation",
            "tags: [vptq, vllm]",
            *_license(original, config, note),
            "---",
            "",
            f"# {original.rpartition('/')[2]}, {bits:.2f} bits a weight",
            "",
            f"[{original}](https://huggingface.co/{original}) with its {len(specs)} linear layers in VPTQ's format: "
            f"{bits:.3f} bits a weight with indices, codebooks and norms counted; embeddings and head unchanged.",
            "",
            '    pip install -e ".[gpu]"         # in a checkout of vllm-vptq',
            "    vllm serve THIS_REPOSITORY",
            *table,
            "",
            "## How it was made",
            "",
            f"    vptq-quantize run {original}{revision} --out DIR --recipe vptq_recipe.json",
            "",
            ", ".join(f"{name} {version}" for name, version in versions.items() if name != REVISION) + "; recipe:",
            "",
            *(f"    {line}" for line in json.dumps(recipe, indent=2).splitlines()),
            "",
        ]
    )


def _license(original: str, config: Mapping[str, Any], note: Note) -> list[str]:
    """Lines on the license, as the original's card has it, or else its config; none where neither says any."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    local = Path(original).is_dir()
    card: dict[str, Any] = {}
    try:
        if not local or (Path(original) / "README.md").is_file():
            card = ModelCard.load(Path(original) / "README.md" if local else original).data.to_dict()
    except Exception as error:  # whatever the hub client and YAML raise; a card is no condition for an upload
        absent = isinstance(error, (RemoteEntryNotFoundError, RepositoryNotFoundError))
        broken = isinstance(error, (yaml.YAMLError, ValueError))
        if isinstance(error, GatedRepoError) or not (absent or broken):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            note(f"the license of {original} could not be read ({reason}); see that the card has it")
    found = {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
    link = found.get("license_link")
    if link and not local and "://" not in link:  # a file beside the original
        found["license_link"] = f"https://huggingface.co/{original}/blob/main/{link}"
    if not found and config.get("license"):
        found = {"license": config["license"]}
    return yaml.safe_dump(found, sort_keys=False).splitlines() if found else []


def upload(
    api: HfApi,
    checkpoint: Path,
    repository: str,
    original: str,
    results: Sequence[str],
    revision: str | None,
    private: bool,
    note: Note = print,
) -> str:
    """Writes the card into the checkpoint's directory and uploads that; gives the address of the commit.

    QuantizeError if the directory is no finished checkpoint or the hub refuses.
    """
    if (checkpoint / "parts").exists():
        raise QuantizeError(f"{checkpoint} holds an unfinished run; start that again first")
    (checkpoint / "README.md").write_text(model_card(checkpoint, original, results, note), encoding="utf8")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=checkpoint,
            revision=revision,
            commit_message="VPTQ checkpoint made by vllm-vptq",
        )
    except Exception as error:  # whatever the hub client raises, from HTTP errors to a missing network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise QuantizeError(f"cannot upload to {repository}: {reason}") from error
    return str(done.commit_url)
