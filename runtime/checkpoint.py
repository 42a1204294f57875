"""What makes a directory a checkpoint: a manifest with the size and sha256 of every file, written and synced last.

transformers writes a checkpoint file by file, so a killed process leaves directories that look like one. Without a
valid manifest they are none: corrupted ones are renamed, and the newest valid one is resumed. Each holds the id of its
run before anything else: what another run wrote is neither resumed, renamed nor deleted.
"""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

from runtime import run_files
from runtime.atomic import beside, replace_dir, require_disk_space, sync, write_file
from runtime.run_files import BEST, PREFIX, checkpoints_in, read_json, read_text, step_of, truncate_metrics
from utils.logging_utils import UserError, logger

MANIFEST = "manifest.json"
RUN_ID_FILE = "run_id"  # in a checkpoint: the run that wrote it
METRICS_OF_BEST = "best.json"
MODEL_CARD = "README.md"  # rewritten after every evaluation, so no manifest has it
SCHEMAS: dict[str, dict] = {METRICS_OF_BEST: run_files.BEST_STEP, "trainer_state.json": run_files.STATE}
MARGIN_BYTES = 200e6  # logs, pictures, the processor's files


def write_manifest(folder: Path) -> None:
    """Sync every file of the directory to disk, then record its size and sha256 in manifest.json, synced last."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, MODEL_CARD):
            sync(path)
            entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_file(folder / MANIFEST, json.dumps(entries, indent=2))


def verify_checkpoint(folder: Path) -> str | None:
    """Why this directory is no checkpoint, or None if every file is as its manifest says and its JSON can be used.

    A link, which may lead anywhere, or a pipe is no file of it.
    """
    try:
        manifest = read_json(folder / MANIFEST, run_files.MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return f"{MANIFEST} is missing, so it was not completed"
    except ValueError as error:
        return f"{MANIFEST} is corrupted: {error}"
    if not manifest:
        return f"{MANIFEST} is corrupted: it lists no file"
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    for name, path in paths.items():
        if path.is_symlink():
            return f"{name} is a link"
        if not path.is_file() and not path.is_dir():
            return f"{name} is a pipe or device"
    for name, entry in manifest.items():
        if name not in paths or not (path := paths[name]).is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            return f"{name} differs from its manifest"
    for name in SCHEMAS.keys() & paths.keys():
        try:
            read_json(paths[name], SCHEMAS[name])
        except ValueError as error:
            return f"{name} is corrupted: {error}"
    return None


def require_valid_checkpoint(checkpoint: Path) -> None:
    """Raise UserError for a corrupted checkpoint."""
    if problem := verify_checkpoint(checkpoint):
        raise UserError(f"--resume {checkpoint}: {problem}; use another checkpoint of {checkpoint.parent}")


def last_checkpoint(run_folder: str | Path, run_id: str = "") -> Path | None:
    """The run's newest valid checkpoint; newer ones that are not are renamed corrupted-checkpoint-N and logged.

    Raises UserError for a newer one of another run: this run would come to its step.
    """
    for path in checkpoints_in(run_folder):
        _require_own(path, run_id)
        if (problem := verify_checkpoint(path)) is None:
            return path
        aside, number = path.with_name(f"corrupted-{path.name}"), 2
        while aside.exists():
            aside, number = path.with_name(f"corrupted-{path.name}-{number}"), number + 1
        path.rename(aside)
        logger.warning("%s: %s; renamed to %s", path, problem, aside.name)
    return None


def create_checkpoint_dir(folder: Path, run_id: str) -> None:
    """Create a checkpoint's directory together with its run's id. Raises UserError where another run's stands."""
    if folder.exists():
        _require_own(folder, run_id)
        return
    with replace_dir(folder) as draft:
        write_file(draft / RUN_ID_FILE, run_id)


def _require_own(checkpoint: Path, run_id: str) -> None:
    if not _is_own(checkpoint, run_id):
        raise UserError(f"{checkpoint}: written by another run; move it, then re-run the same command")


def _is_own(checkpoint: Path, run_id: str) -> bool:
    """Whether the run wrote this checkpoint: by its id or, where that is corrupted, the id's hash in the manifest."""
    with contextlib.suppress(OSError, ValueError):
        if read_text(checkpoint / RUN_ID_FILE) == run_id:
            return True
    with contextlib.suppress(OSError, ValueError, KeyError):
        recorded = read_json(checkpoint / MANIFEST, run_files.MANIFEST)[RUN_ID_FILE]["sha256"]
        return recorded == hashlib.sha256(run_id.encode()).hexdigest()
    return False


def rotate(run_folder: str | Path, run_id: str, keep: int) -> None:
    """Delete the run's checkpoints that are older than its newest `keep` completed ones."""
    deleted = f".{hashlib.sha256(run_id.encode()).hexdigest()[:12]}.deleted"  # a kill may leave no id inside
    newest_first = [path for path in checkpoints_in(run_folder) if _is_own(path, run_id)]
    completed = [path for path in newest_first if (path / MANIFEST).exists()]
    if len(completed) >= keep:
        for path in newest_first[newest_first.index(completed[keep - 1]) + 1 :]:
            aside = path.with_name(path.name + deleted)
            shutil.rmtree(aside, ignore_errors=True)  # what a kill left of this step, before the run came here again
            path.rename(aside)  # half deleted, it would look like a corrupted one
    for path in Path(run_folder).glob(f"{PREFIX}*.deleted"):
        if path.name.endswith(deleted) or _is_own(path, run_id):  # earlier versions wrote .deleted alone
            shutil.rmtree(path)


def fork_checkpoint(checkpoint: Path, run_folder: Path, run_id: str) -> Path:
    """Start a run from another run's checkpoint: copy it, its metrics, and best/ if no newer. Returns the copy."""
    truncate_metrics(checkpoint.parent, run_folder, step_of(checkpoint))
    best = read_best(checkpoint.parent / BEST)
    if best is not None and best["step"] <= step_of(checkpoint):
        with replace_dir(run_folder / BEST) as draft:
            shutil.copytree(checkpoint.parent / BEST, draft, dirs_exist_ok=True)
    copy = run_folder / checkpoint.name
    with replace_dir(copy) as draft:
        shutil.copytree(checkpoint, draft, dirs_exist_ok=True)
        (draft / RUN_ID_FILE).write_text(run_id, encoding="utf-8")
        write_manifest(draft)
    return copy


# ---- best/


def recover_interrupted_replace(folder: Path) -> None:
    """Finish a replacement that was killed between its two renames: take the complete draft, or the old directory."""
    for candidate in beside(folder):
        if not folder.exists() and verify_checkpoint(candidate) is None:
            candidate.rename(folder)


def read_best(folder: Path) -> dict | None:
    """Step and metrics of best/, or None where it is missing or corrupted."""
    problem = verify_checkpoint(folder)
    with contextlib.suppress(FileNotFoundError):  # best.json, which an edited manifest may not name
        return None if problem else read_json(folder / METRICS_OF_BEST, run_files.BEST_STEP)
    return None


def needs_best(run_folder: Path) -> bool:
    """Whether best/ is missing or corrupted, and a checkpoint holds weights to make it again."""
    if read_best(run_folder / BEST) is not None:
        return False
    return any(verify_checkpoint(path) is None for path in checkpoints_in(run_folder))


def describe_best(folder: Path) -> str:
    """Which weights these are: their step and a hash of their manifest. Raises UserError for corrupted ones."""
    best = read_best(folder)
    if best is None:
        command = f"its train.py command, with --output-dir {folder.parent},"
        if not folder.exists() and not run_files.is_completed(folder.parent):
            move = f"if it is training, wait for that; else {command} resumes it"
            raise UserError(f"{folder}: is not there yet; the first evaluation of the run writes it; {move}")
        problem = verify_checkpoint(folder) or f"{METRICS_OF_BEST} is missing"
        move = f"{command} makes them again"
        if run_files.is_completed(folder.parent) and not needs_best(folder.parent):
            move = "no checkpoint is left to make them from; train again, in another folder"
        raise UserError(f"{folder}: holds no complete weights ({problem}); {move}")
    return f"step {best['step']}, {_describe_manifest(folder)}"


def is_best(folder: Path, description: str) -> bool:
    """Whether these are still the weights of a description; they are not read again, as that takes a while."""
    with contextlib.suppress(FileNotFoundError):  # a training is just replacing them
        return description.endswith(_describe_manifest(folder))
    return False


def _describe_manifest(folder: Path) -> str:
    return f"manifest {_sha256(folder / MANIFEST)[:12]}"


def check_disk(run_folder: Path, num_trainable: int, keep: int) -> None:
    """Raise UserError unless the disk has room for `keep` checkpoints and best/.

    A checkpoint holds the trainable parameters and their two Adam moments in fp32. One more is written before the
    oldest is deleted, and best/ stands beside the one it replaces and its draft.
    """
    weights = 4 * num_trainable
    existing = [*checkpoints_in(run_folder), run_folder / BEST]  # of a run that resumes
    written = sum(path.stat().st_size for folder in existing for path in folder.rglob("*") if path.is_file())
    needed = max(weights * (3 * (keep + 1) + 3) - written, weights * (3 + 1)) + MARGIN_BYTES
    require_disk_space(run_folder, needed, "the checkpoints need", "use another --output-dir")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
