"""Where native sources and built libraries are, and how several processes agree on who builds one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from vllm_vptq.build.errors import BuildError

CACHE = "VLLM_VPTQ_CACHE"

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Say, in a cache that another user made, or on a full disk."""

# A child of vLLM's logger: its level and handler apply without importing vLLM.
logger = logging.getLogger("vllm.vptq")


def package() -> Path:
    """The folder of the package ``vllm_vptq``."""
    return Path(__file__).resolve().parents[1]


def sources() -> Path:
    """``csrc``: beside the package in a checkout, inside it when installed."""
    inside = package() / "csrc"
    return inside if inside.is_dir() else package().parent / "csrc"


def folder() -> Path:
    """The folder of built libraries, made if need be: in $VLLM_VPTQ_CACHE, or in the user's cache."""
    base = os.environ.get(CACHE) or os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    path = Path(base) / "vllm_vptq"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot make {path} ({error.strerror}); set {CACHE} to a writable folder") from None
    return path


def key(*parts: str) -> str:
    """A name for everything that a built library depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def contents(files: Iterable[Path]) -> str:
    """Names and contents of source files, as one part of a key."""
    return "\0".join(f"{file.name}\0{file.read_text()}" for file in sorted(files))


def build_once(target: Path, build: Callable[[Path], Path]) -> None:
    """Makes ``target`` unless it exists. ``build`` gets an empty private folder and returns the file it made there.

    Safe when many processes ask at once: one builds and the others wait. The finished file is renamed into place, so
    that none sees half a library, not even where the lock does not hold (some network file systems have none).
    """
    if target.exists():
        return
    try:
        _build_once(target, build)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise BuildError(
            f"cannot write to {target.parent} ({error.strerror}); set {CACHE} to a writable folder with room"
        ) from error


def _build_once(target: Path, build: Callable[[Path], Path]) -> None:
    asked = time.time()
    failure = target.with_suffix(".error")
    with _locked(target.with_suffix(".lock")):
        if target.exists():
            return
        # A build that failed while this process waited would fail again, once for each of eight workers.
        if failure.exists() and failure.stat().st_mtime >= asked:
            raise BuildError(failure.read_text())
        for left in target.parent.glob(f"{target.stem}.*.partial"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            dir=target.parent, prefix=f"{target.stem}.", suffix=".partial", ignore_cleanup_errors=True
        ) as private:
            try:
                build(Path(private)).rename(target)
            except BuildError as error:
                failure.write_text(str(error))
                raise
        failure.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The kernel drops a flock when its process dies, however it dies. The file stays: removing it would race.
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # ENOLCK: no locks on this file system, see build_once
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("Waiting for another process that builds %s", path.stem)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
