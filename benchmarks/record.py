"""Where results of a benchmark are kept: one file a day and GPU, which later runs add to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, Any]]


def path(benchmark: str, date: str, gpu: str) -> Path:
    """``kernels-2026-11-24-h200.json`` of ``NVIDIA H200``."""
    return RESULTS / f"{benchmark}-{date}-{gpu.removeprefix('NVIDIA ').split()[0].lower()}.json"


def add(file: Path, about: dict[str, Any], rows: Rows, key: tuple[str, ...]) -> None:
    """Writes rows to a file; those it has of the same ``key`` give way, and others stay."""
    kept: Rows = json.loads(file.read_text())["rows"] if file.exists() else []
    new = {tuple(row.get(name) for name in key) for row in rows}
    kept = [row for row in kept if tuple(row.get(name) for name in key) not in new]
    file.write_text(json.dumps(about | {"rows": kept + rows}, indent=1) + "\n")
