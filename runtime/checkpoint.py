"""What makes a folder a checkpoint: a manifest of sizes and sha256, written and synced last.

transformers writes a checkpoint file by file, so a kill leaves folders that look like one. Without a manifest that
holds they are not; damaged ones are renamed aside, and the newest that holds is resumed. Each is marked with its run
before anything else is in it: what another run wrote is neither resumed, renamed nor deleted.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from runtime.run_files import BEST, PREFIX, checkpoints_in, cut_metrics, step_of
from utils.logging_utils import UserError, logger

MANIFEST = "manifest.json"
RUN_MARK = "run_id"  # file in a checkpoint: the run that wrote it
DELETED = ".deleted"  # end of the name of a folder that is being deleted
METRICS_OF_BEST = "best.json"
CARD = "README.md"  # is written anew after every evaluation, so no manifest has it
MARGIN_BYTES = 200e6  # logs, pictures, the processor's files


def write_manifest(folder: str | Path) -> None:
    """Sync every file of the folder to disk, then record its size and sha256 in manifest.json, which is synced last."""
    folder = Path(folder)
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, CARD)):
        _sync(path)
        entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(json.dumps(entries, indent=2), encoding="utf-8")
    _sync(draft)
    os.replace(draft, folder / MANIFEST)
    _sync(folder)


def verify_checkpoint(folder: str | Path) -> str | None:
    """Why this folder is no checkpoint, or None if every file is as its manifest says."""
    folder = Path(folder)
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in entries.items():
            if name == CARD:  # of runs that began before the card was written
                continue
            path = folder / name
            if not path.is_file() or path.is_symlink() or folder.resolve() not in path.resolve().parents:
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
                return f"{name} differs from its manifest"
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was not finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def last_checkpoint(run_folder: str | Path, run_id: str = "") -> Path | None:
    """The run's newest checkpoint that holds; newer ones that do not are renamed corrupted-checkpoint-N and told.

    Raises UserError for a newer one that another run wrote: this run would come to its step.
    """
    for path in checkpoints_in(run_folder):
        if not _is_of(path, run_id):
            raise UserError(f"{path}: is in the way, another run wrote it; move it, and the same command goes on")
        damage = verify_checkpoint(path)
        if damage is None:
            return path
        aside = path.with_name(f"corrupted-{path.name}")
        number = 2
        while aside.exists():
            aside, number = path.with_name(f"corrupted-{path.name}-{number}"), number + 1
        path.rename(aside)
        logger.warning("%s: %s; renamed to %s", path, damage, aside.name)
    return None


def create_checkpoint_dir(folder: Path, run_id: str) -> None:
    """Make a checkpoint's folder, its run's from the first moment. Raises UserError where another run's stands."""
    if folder.exists():
        if not _is_of(folder, run_id):
            raise UserError(f"{folder}: is in the way, another run wrote it; move it, and the same command goes on")
        return
    draft, _ = _beside(folder)
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir()
    if run_id:
        (draft / RUN_MARK).write_text(run_id, encoding="utf-8")
    draft.rename(folder)


def _is_of(folder: Path, run_id: str) -> bool:
    """Whether a run wrote this checkpoint: by its mark or, where that is damaged, by the mark's hash in the manifest.

    Runs that began before runs had names are "" and wrote no mark.
    """
    mark = folder / RUN_MARK
    if mark.is_file() and mark.read_text(encoding="utf-8", errors="replace") == run_id:
        return True
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[RUN_MARK]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return not run_id and not mark.exists()
    return recorded == hashlib.sha256(run_id.encode()).hexdigest()


def rotate(run_folder: str | Path, run_id: str, keep: int) -> None:
    """Delete the run's own checkpoints that are older than its newest `keep` finished ones."""
    own = [path for path in checkpoints_in(run_folder) if _is_of(path, run_id)]
    finished = [path for path in own if (path / MANIFEST).exists()]
    if len(finished) >= keep:
        for path in own[own.index(finished[keep - 1]) + 1 :]:  # the newest stand first
            path.rename(path.with_name(path.name + DELETED))  # half deleted it would look like a damaged one
    for path in Path(run_folder).glob(f"{PREFIX}*{DELETED}"):
        if path.is_dir() and _is_of(path, run_id):
            shutil.rmtree(path)


@contextlib.contextmanager
def atomic_replace_dir(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to fill, which takes its place when all of it was written."""
    draft, old = _beside(folder)
    recover_interrupted_replace(folder)
    for left_over in (draft, old):
        if left_over.exists():
            shutil.rmtree(left_over)
    draft.mkdir()
    yield draft
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def recover_interrupted_replace(folder: Path) -> None:
    """Finish a replace that was killed between its two renames: take the complete draft, or the old directory."""
    draft, old = _beside(folder)
    if not folder.exists():
        for whole in (draft, old):
            if verify_checkpoint(whole) is None:
                whole.rename(folder)
                return


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.draft"), folder.with_name(f"{folder.name}.old")


def require_valid_checkpoint(checkpoint: Path) -> None:
    """Raises UserError for a damaged checkpoint."""
    damage = verify_checkpoint(checkpoint)
    if damage is not None:
        raise UserError(f"--resume {checkpoint}: {damage}; name another checkpoint of {checkpoint.parent}")


def fork_checkpoint(checkpoint: Path, run_folder: str | Path, run_id: str) -> Path:
    """A run that begins at another's checkpoint: a copy of it, its metrics, and best/ if it is of then. The copy."""
    cut_metrics(checkpoint.parent, run_folder, step_of(checkpoint))
    best = read_best(checkpoint.parent / BEST)
    if best is not None and best["step"] <= step_of(checkpoint):
        with atomic_replace_dir(Path(run_folder) / BEST) as draft:
            shutil.copytree(checkpoint.parent / BEST, draft, dirs_exist_ok=True)
    copy = Path(run_folder) / checkpoint.name
    with atomic_replace_dir(copy) as draft:
        shutil.copytree(checkpoint, draft, dirs_exist_ok=True)
        (draft / RUN_MARK).write_text(run_id, encoding="utf-8")
        write_manifest(draft)
    return copy


def read_best(folder: Path) -> dict | None:
    """Step and metrics of best/, or None where it is missing, torn, or was not chosen by an evaluation."""
    if verify_checkpoint(folder) is not None:
        return None
    return json.loads((folder / METRICS_OF_BEST).read_text(encoding="utf-8"))


def describe_best(folder: Path) -> str:
    """Which weights these are: their step and a hash of their manifest. Raises UserError for damaged ones."""
    damage = verify_checkpoint(folder)
    if damage is not None:
        raise UserError(
            f"{folder}: holds no finished weights ({damage}); finish the run with the command that began it"
        )
    return f"step {read_best(folder)['step']}, manifest {_sha256(folder / MANIFEST)[:12]}"


def check_disk(run_folder: str | Path, model, checkpoints: int) -> None:
    """Raise UserError unless the disk has room: fp32 weights and two Adam moments of what learns a checkpoint."""
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed = (
        # rotation deletes the oldest after the newest is written; best/ stands beside its successor and the old one
        4 * learning * (3 * (checkpoints + 1) + 3) + MARGIN_BYTES
    )
    holds = [*checkpoints_in(run_folder), Path(run_folder) / BEST]  # a run that goes on has some of it already
    held = sum(path.stat().st_size for folder in holds for path in folder.rglob("*") if path.is_file())
    needed = max(needed - held, 4 * learning * (3 + 1) + MARGIN_BYTES)
    free = shutil.disk_usage(run_folder).free
    if free < needed:
        raise UserError(
            f"{run_folder}: {free / 1e9:.1f} GB free on its disk, the checkpoints need {needed / 1e9:.1f} GB; make "
            "room or name "
            "another --output-dir"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
