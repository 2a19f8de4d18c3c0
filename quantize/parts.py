"""What a run has finished so far, on disk: one file per layer, so that a killed run starts again where it stopped.

The folder ``parts`` in the output directory holds what was asked for (``run.json``), the calibration tokens, what every
measured block is worth, the chosen layer recipes and every finished layer with its record. Files appear under their
name only when they are whole. Everything else is computed again from these, with the same result; a finished run
leaves no ``parts``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.errors import QuantizeError


class Parts:
    """The finished parts of a run into ``out``; QuantizeError if ``out`` holds anything but the same run's parts.

    ``run`` is what makes two runs the same: model, recipe, versions.
    """

    def __init__(self, out: Path, run: Mapping[str, Any]) -> None:
        self.folder, self._finished = out / "parts", out / "parts.finished"
        if self._finished.is_dir():  # a run that was killed when all was done but this
            shutil.rmtree(self._finished)
        if not (self.folder / "run.json").is_file():
            if self.folder.is_dir() and {file.name for file in self.folder.iterdir()} <= {"run.partial"}:
                shutil.rmtree(self.folder)  # killed before it began
            require_empty(out)
            self.folder.mkdir()
            self.write_json("run", run)
        before = self.read_json("run")
        changed = [key for key in run if not isinstance(before, dict) or before.get(key) != run[key]]
        if changed and not self._has_work():
            self.remove()  # nothing is lost, say after a mistake in the options
            self.folder.mkdir()
            self.write_json("run", run)
        elif changed:
            raise QuantizeError(
                f"{out} holds an unfinished run with another {' and '.join(changed)}; finish that one, choose another "
                "--out or remove it"
            )

    def _has_work(self) -> bool:
        """Whether there is a layer, or something measured; text for calibration does not count."""
        kinds = ("*.safetensors", "*.worth.json", "gradients.json")
        return any(file.name != "calibration.safetensors" for kind in kinds for file in self.folder.glob(kind))

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def save(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> None:
        """Writes tensors and their record under a name, all or nothing."""
        path = self._path(name)
        write_tensors(tensors, path, {"record": json.dumps(record or {})})

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of a name."""
        try:
            return load_file(self._path(name))
        except (OSError, SafetensorError) as error:
            raise QuantizeError(f"{self._path(name)} is damaged ({error}); remove it to have it made again") from error

    def record(self, name: str) -> dict[str, Any]:
        """The record of a name."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                record: dict[str, Any] = json.loads(file.metadata()["record"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise QuantizeError(f"{self._path(name)} is damaged ({error}); remove it to have it made again") from error
        return record

    def read_json(self, name: str) -> Any:
        """A JSON value, None if there is none."""
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf8")) if path.is_file() else None
        except ValueError as error:
            raise QuantizeError(f"{path} is damaged ({error}); remove it to have it made again") from error

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON value, all or nothing."""
        write_text(self.folder / f"{name}.json", json.dumps(value, indent=1) + "\n")

    def remove(self) -> None:
        """Removes all parts, once the checkpoint is written: a run that is killed here has either all or none."""
        self.folder.replace(self._finished)
        shutil.rmtree(self._finished)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def require_empty(out: Path) -> None:
    """Makes a directory to write to; QuantizeError if there is anything in it already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantizeError(f"{out} exists and is not empty; choose another --out or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuantizeError(f"cannot write to {out}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears under its name only when it is whole; QuantizeError if it can't be."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text, encoding="utf8")
        partial.replace(path)
    except OSError as error:
        raise QuantizeError(f"cannot write {path}: {error.strerror}") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that appears under its name only when it is whole; QuantizeError if it can't be."""
    partial = path.with_suffix(".partial")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(on_cpu, partial, metadata=dict(metadata))
        partial.chmod(mode)  # safetensors leaves files that nobody else may read
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise QuantizeError(f"cannot write {path}: {error}") from error
