"""Files and directories that hold their old content or the new one, whatever happens meanwhile."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from utils.logging_utils import UserError


def write_file(path: Path, content: str | bytes) -> None:
    """Write beside `path`, sync to disk, then replace it. Raises UserError for a folder in its place."""
    draft, _ = beside(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder where a file is to be written; move it, then re-run the same command")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


@contextlib.contextmanager
def replace_dir(folder: Path) -> Iterator[Path]:
    """A directory beside `folder` to fill, which takes its place unless an error is raised inside."""
    draft, old = beside(folder)
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def require_disk_space(folder: str | Path, needed: float, purpose: str, next_move: str) -> int:
    """Free bytes where `folder` is or will be. Raises UserError unless they are `needed`; purpose: "a run needs"."""
    folder = next(place for place in (Path(folder), *Path(folder).absolute().parents) if place.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        problem = f"its disk has {free / 1e9:.1f} GB free, {purpose} {needed / 1e9:.1f} GB"
        raise UserError(f"{folder}: {problem}; free space, or {next_move}")
    return free


def beside(path: Path) -> tuple[Path, Path]:
    """Where a replacement of `path` is written, and where a directory that is being replaced waits."""
    return path.with_name(f"{path.name}.draft"), path.with_name(f"{path.name}.old")


def sync(path: Path) -> None:
    """Afterwards the content of a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
