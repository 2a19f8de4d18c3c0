"""The file that a comparison writes, after every figure, so that a killed run keeps what it measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_vptq.bench import METHOD, checkout
from vllm_vptq.bench.settings import BenchError, Contestant, Settings
from vllm_vptq.doctor import machine

Row = dict[str, Any]
_MUST_MATCH = ("gpu", "driver", "settings")
"""What makes the figures of two runs comparable, and their rows fit for one file; and the versions."""


def default_path() -> Path:
    """``benchmarks/results/serving-DATE-GPU.json``; ``cpu`` where there is no GPU."""
    gpus = machine.nvidia_smi()
    short = re.sub(r"[^a-z0-9]+", "-", gpus[0][0].lower().removeprefix("nvidia ")) if gpus else "cpu"
    return Path("benchmarks/results") / f"serving-{date.today()}-{short}.json"


class Results:
    """``rows``, one for a model and batch, ``models``, with what is measured once for each, ``rooms`` on small cards.

    A file that exists is continued: models measured again replace their former figures, others stay. Its ``commit``
    then names all commits that were measured; there is none where none is known.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        gpus = machine.nvidia_smi()
        self.head: dict[str, Any] = {
            "date": str(date.today()),
            "gpu": gpus[0][0] if gpus else None,
            "driver": gpus[0][1] if gpus else None,
            "versions": {"vllm_vptq": _own_version()},
            "settings": _shared(settings),
            "method": METHOD,
        }
        if found := checkout.commit():
            self.head["commit"] = found
        self.models: list[Row] = []
        self.rows: list[Row] = []
        self.rooms: list[Row] = []
        if path.exists():
            self._continue()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchError(f"cannot write {path}: {error.strerror}; choose another --out") from error

    def add(self, contestant: Contestant, tp: int, event: Mapping[str, Any]) -> None:
        """Takes a worker's event and writes the file."""
        key = _key(contestant, tp)
        values = {name: value for name, value in event.items() if name not in ("event", "versions", "device")}
        if event["event"] == "started":
            self._check_versions(event["versions"])
            self.models = [row for row in self.models if not same(row, key)]
            self.rows = [row for row in self.rows if not same(row, key)]
            self.models.append(key | values)
        elif event["event"] == "first_token":
            self.model(key).update(values)
        else:
            self.rows.append(key | values | {"weight_gib": self.model(key)["weight_gib"]})
        self._write()

    def add_room(self, contestant: Contestant, card_gb: float, event: Mapping[str, Any]) -> None:
        """Takes what a worker says of its start with the memory of a card of ``card_gb`` GB, and writes the file."""
        key = _key(contestant, 1) | {"card_gb": card_gb}
        self.rooms = [row for row in self.rooms if not (same(row, key) and row["card_gb"] == card_gb)]
        self.rooms.append(key | {name: event[name] for name in ("weight_gib", "kv_cache_tokens")})
        self._write()

    def model(self, key: Mapping[str, Any]) -> Row:
        """The entry of ``models`` for a row."""
        return next(row for row in self.models if same(row, key))

    def rows_of(self, model: Row) -> list[Row]:
        """The ``rows`` of an entry of ``models``, by batch."""
        return sorted((row for row in self.rows if same(row, model)), key=lambda row: int(row["batch"]))

    @property
    def batches(self) -> list[int]:
        """All batches measured."""
        return sorted({row["batch"] for row in self.rows})

    def dense(self, rows: list[Row], row: Row) -> Row | None:
        """The one of ``rows`` (or ``models``) to compare a row with: dense, of its shape, dtype, cards and batch."""

        def comparable(other: Row) -> bool:
            return all(other.get(name) == row.get(name) for name in ("shape", "dtype", "tp", "batch"))

        return next((other for other in rows if other["kind"] == "dense" and comparable(other)), None)

    def _continue(self) -> None:
        try:
            before = json.loads(self.path.read_text())
            for name in _MUST_MATCH:
                if before[name] != self.head[name]:
                    other = f"another {name} ({before[name]})"
                    if name == "settings":
                        was, now = before[name], self.head[name]
                        differing = (f"{key} {was.get(key)}" for key in now if was.get(key) != now[key])
                        other = f"other settings ({', '.join(differing)})"
                    raise BenchError(f"{self.path} was measured with {other}; choose another --out")
            self.models, self.rows = before["models"], before["rows"]
            self.rooms = before.get("rooms", [])
            if commits := _commits(before.get("commit"), self.head.get("commit")):
                self.head["commit"] = commits
            own, self.head["versions"] = self.head["versions"], before["versions"]
            self._check_versions(own)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BenchError(f"{self.path} is no result file of this command; choose another --out") from error

    def _check_versions(self, found: Mapping[str, str]) -> None:
        for name, version in found.items():
            before = self.head["versions"].setdefault(name, version)
            if before != version:
                raise BenchError(f"{self.path} was measured with {name} {before}, not {version}; choose another --out")

    def _write(self) -> None:
        """In one go: a file half written would lose all."""
        lists = {"models": self.models, "rows": self.rows} | ({"rooms": self.rooms} if self.rooms else {})
        head = json.dumps(self.head, indent=1)[:-2]
        parts = (
            f' "{name}": [\n' + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]"
            for name, rows in lists.items()
        )
        partial = self.path.with_suffix(".part")
        partial.write_text(head + ",\n" + ",\n".join(parts) + "\n}\n")
        partial.replace(self.path)


def _commits(before: str | None, now: str | None) -> str | None:
    """What a file's figures were measured with, each once; None if that is not known of any."""
    found = list(dict.fromkeys([*(before or "unknown").split(", "), now or "unknown"]))
    return None if found == ["unknown"] else ", ".join(found)


def _own_version() -> str:
    try:
        return metadata.version("vllm-vptq")
    except metadata.PackageNotFoundError:
        return "not installed"


def _shared(settings: Settings) -> Row:
    """What must be alike for rows to be comparable: neither which batches, nor on how many cards."""
    left_out = ("tp", "batches")
    return {name: value for name, value in asdict(settings).items() if name not in left_out}


def _key(contestant: Contestant, tp: int) -> Row:
    known = {name: getattr(contestant, name) for name in ("shape", "format", "kind", "dtype", "layout")}
    return {"model": contestant.name, **known, "tp": tp}


def same(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    """Whether two entries are of one model, run in the same way."""
    return all(row[name] == key[name] for name in ("model", "layout", "tp"))
