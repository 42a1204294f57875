"""Scores splits with one model, photo by photo on disk, so that a half-done evaluation goes on where it was."""

import collections
import functools
import hashlib
import io
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset

from config.training_config import TrainingConfig
from evaluation.metrics import adjust_scores, measure_replies
from evaluation.report import Calibration, Scored, calibrate, figures_of, not_sure, result_lines, write_report
from models.builder import DTYPES, unwrap
from models.generation import generate_batches
from models.scoring import score_batches
from runtime.checkpoint import BEST, describe_best
from runtime.device import fit_workers
from runtime.distributed import Processes, check_alike, local_count
from utils.image_utils import check_bad_share
from utils.logging_utils import UserError, logger

CALIBRATION_FILE = "calibration.json"
ROUND = 16  # photos of each of several processes between two exchanges, which a kill loses
DIGITS = 4  # of a stored log-probability, in nats: far below what 16-bit weights resolve


def read_entries(path: Path) -> tuple[dict | None, list[dict]]:
    """(header, entries) of a per-photo file; what a kill tore off at its end is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return (entries[0], entries[1:]) if entries else (None, [])


def keep_by_photo(
    rows, compute: Callable, path: Path, header: dict, max_bad_fraction: float = 1.0, processes: Processes | None = None
) -> tuple[list[dict], float | None]:
    """(entry of each photo, photos/s): those that the file of the same header holds are not computed again.

    `compute(rows)` yields an entry with the "id" for each of these rows whose photo opens. A photo that was replaced is
    computed again, and a label is always that of the row. Of several `processes` each computes a part; the main one
    keeps and returns all entries, and the others return ([], None).
    """
    processes = processes or Processes()
    if not processes.is_main:
        left = processes.gather([])
        collections.deque(compute(rows.select(left)) if left else (), maxlen=0)
        return [], None
    found, entries = read_entries(path)
    marks = {row["id"]: _mark(row["image"]) for row in rows}
    known = [entry for entry in entries if found == header and entry["photo"] == marks.get(entry["id"], entry["photo"])]
    # Written anew, since a torn last line would swallow the next one; beside it first, so that a kill loses nothing.
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text("".join(json.dumps(entry) + "\n" for entry in [header, *known]), encoding="utf-8")
    draft.replace(path)
    by_id = {entry["id"]: entry for entry in known}
    left = [index for index, photo in enumerate(rows["id"]) if photo not in by_id]
    if len(left) < len(rows):
        logger.info("%s photos were done before (%s)", f"{len(rows) - len(left):,}", path)
    processes.gather(left)
    began, count = time.perf_counter(), 0
    with open(path, "a", encoding="utf-8") as file:
        for computed in compute(rows.select(left)) if left else ():
            entry = computed | {"photo": marks[computed["id"]]}
            file.write(json.dumps(entry) + "\n")
            file.flush()
            by_id[entry["id"]] = entry
            count += 1
    check_bad_share([photo for photo in rows["id"] if photo not in by_id], len(rows), max_bad_fraction)
    kept = [by_id[photo] | {"label": label} for photo, label in zip(rows["id"], rows["label"]) if photo in by_id]
    if not kept:
        raise UserError(f"{path}: no photo could be opened; the lines above name what is wrong with each")
    return kept, count / (time.perf_counter() - began) if count else None


def _mark(image: dict) -> list[int]:
    """What tells a photo from another one under the same name: checksum of its bytes, or size and time of its file.

    Empty for a file that is not there: opening it says so, and counts it among the bad photos.
    """
    if image["bytes"] is not None:
        return [len(image["bytes"]), zlib.crc32(image["bytes"])]
    if not image["path"] or not Path(image["path"]).is_file():
        return []
    status = Path(image["path"]).stat()
    return [status.st_size, status.st_mtime_ns]


def read_calibration(folder: Path, adapter: str | None) -> Calibration | None:
    """What was fitted on val for just these weights, or None. Raises UserError for a file that cannot be read."""
    path = folder / CALIBRATION_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        calibration = Calibration(*(saved[name] for name in Calibration._fields))
        return calibration if saved["scored"]["adapter"] == adapter else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); make it again: python evaluate.py {folder}"
        ) from error


def read_hits(folder: Path, split: str) -> tuple[dict, dict[str, bool]]:
    """(facts, {photo: was its likeliest name the true one}) of the plain scores kept in a folder.

    Raises UserError where there are none, or where they are of other weights than those in best/.
    """
    path = folder / f"eval_{split}.scores.jsonl"
    facts, entries = read_entries(path)
    again = f"python evaluate.py {folder} --split {split}"
    if not entries:
        raise UserError(f"{path}: no scores yet; make them first: {again}")
    if facts["adapter"] is not None and facts["adapter"] != describe_best(folder / BEST):
        raise UserError(f"{path}: the scores are of other weights than {folder / BEST}; score them again: {again}")
    return facts, {entry["id"]: int(np.argmax(entry["scores"])) == entry["label"] for entry in entries}


def build_assessor(
    config: TrainingConfig,
    model,
    collator,
    precision: str,
    folder: str | Path,
    adapter: str | None,
    processes: Processes,
    **options,
) -> "Assessor":
    """An Assessor whose facts are all that its scores depend on but the photos themselves."""
    local = Path(config.model)  # of a hub model there is no such folder, and its commit stands for its files
    names = json.dumps([collator.class_names, collator.name_ids, collator.prompt.prompt])
    facts = {
        "model": config.model,
        "commit": getattr(unwrap(model).config, "_commit_hash", None),
        "files": sorted([path.name, *_mark({"bytes": None, "path": path})] for path in local.glob("*.safetensors")),
        "adapter": adapter,
        "load_in_4bit": config.load_in_4bit,
        "precision": precision,
        "question": config.question,
        "image_size": config.image_size,
        "dataset": config.dataset,
        "names": hashlib.sha256(names.encode()).hexdigest()[:12],
        "seed": config.seed,
    }
    check_alike({name: facts[name] for name in ("adapter", "commit", "precision", "names")}, processes)
    batch_bytes = collator.batch_bytes(config.per_device_eval_batch_size) * local_count()
    workers = fit_workers(config.num_workers, batch_bytes)
    batches = config.per_device_eval_batch_size, workers, DTYPES[precision], config.max_bad_fraction
    return Assessor(model, collator, folder, facts, *batches, processes=processes, **options)


class Assessor:
    """Scores splits with one model and writes what came out to the run folder.

    `facts` say what is scored (model, adapter, question, ...): they stand in each report, and scores kept on disk are
    used again only if they are the same. `per_token` divides scores by each name's tokens; `prior_calibration`
    subtracts those under a photo of plain grey; `limit`, the number of photos that the caller took, is only recorded.
    Of several `processes` all make the same calls; the main one writes, and the others get nothing back.
    """

    def __init__(
        self,
        model,
        collator,
        folder: str | Path,
        facts: dict,
        batch_size: int,
        num_workers: int,
        dtype: torch.dtype,
        max_bad_fraction: float = 1.0,
        per_token: bool = False,
        prior_calibration: bool = False,
        limit: int | None = None,
        target_precision: float = 0.95,
        processes: Processes | None = None,
    ):
        self.model = model
        self.collator = collator
        self.folder = Path(folder)
        self.facts = facts
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.dtype = dtype
        self.lengths = [len(ids) for ids in collator.name_ids] if per_token else None
        self.prior = None
        self.max_bad_fraction = max_bad_fraction
        self.target_precision = target_precision
        self.processes = processes or Processes()
        self.how = {"per_token": per_token, "prior_calibration": prior_calibration, "limit": limit}
        self._scored: dict[str, tuple[Scored, float | None]] = {}
        if prior_calibration:
            (neutral,) = self._raw_scores([neutral_row()])
            self.prior = neutral["scores"]

    def _by_all(self, compute: Callable, rows) -> Iterator[dict]:
        """What compute(rows) yields, done in equal parts by all processes, which all get it, but for bad photos."""
        count = self.processes.count
        own = compute(Subset(rows, range(self.processes.rank, len(rows), count)))
        while some := self.processes.gather(list(itertools.islice(own, ROUND if count > 1 else 1))):
            for one in some:
                if "bad" not in one:
                    yield one
                elif self.processes.is_main:
                    logger.warning("photo left out: %s", one["bad"])

    def _raw_scores(self, rows) -> Iterator[dict]:
        return self._by_all(self._own_scores, rows)

    def _own_scores(self, rows) -> Iterator[dict]:
        options = self.collator.name_ids, self.batch_size, self.num_workers, self.dtype
        for scores, bad in score_batches(self.model, self.collator, rows, *options):
            yield from ({"bad": one} for one in bad)
            for one in scores:
                yield {"id": one.id, "label": one.label, "scores": [round(value, DIGITS) for value in one.values]}

    def _own_replies(self, rows, longest: int) -> Iterator[dict]:
        options = self.batch_size, self.num_workers, self.dtype, longest
        for replies, bad in generate_batches(self.model, self.collator, rows, *options):
            yield from ({"bad": one} for one in bad)
            yield from (one._asdict() for one in replies)

    def score(self, rows, split: str) -> tuple[Scored | None, float | None]:
        """Scores of a split, computed once, and photos/s where any were computed now."""
        if split not in self._scored:
            path = self.folder / f"eval_{split}.scores.jsonl"
            how = self.facts, self.max_bad_fraction, self.processes
            entries, rate = keep_by_photo(rows, self._raw_scores, path, *how)
            self._scored[split] = self._adjust(entries) if self.processes.is_main else None, rate
        return self._scored[split]

    def _adjust(self, entries: Sequence[dict]) -> Scored:
        scores = adjust_scores(np.array([entry["scores"] for entry in entries]), self.lengths, self.prior)
        return Scored([entry["id"] for entry in entries], np.array([entry["label"] for entry in entries]), scores)

    def calibrate(self, validation) -> Calibration | None:
        """Temperature and "not sure" threshold from val; of plain scores of all of val also to calibration.json."""
        scored, _ = self.score(validation, "val")
        if scored is None:
            return None
        calibration = calibrate(scored, self.target_precision)
        if not any(self.how.values()):
            text = json.dumps(calibration._asdict() | {"scored": self.facts}, indent=2)
            (self.folder / CALIBRATION_FILE).write_text(text + "\n", encoding="utf-8")
        return calibration

    def report(
        self,
        rows,
        split: str,
        calibration: Calibration | None,
        why_not_calibrated: str | None = None,
        strangers: dict[str, Sequence[dict]] | None = None,
        twins: Sequence[str] = (),
    ) -> dict:
        """eval_<split>.json (returned), .md and .png, a picture of some photos, and a result line."""
        scored, rate = self.score(rows, split)
        strange = {} if why_not_calibrated else {kind: self._adjusted(some) for kind, some in (strangers or {}).items()}
        if scored is None:
            return {}
        names = self.collator.class_names
        report = {"split": split, **self.facts, **self.how, "photos_per_s": rate, "processes": self.processes.count}
        report |= {"bad_photos": len(rows) - len(scored.ids), "exact_match": None, "substring_match": None}
        report |= self._replies_of(rows, split)
        report |= figures_of(scored, calibration, names) | {"not_calibrated": why_not_calibrated, "twins": list(twins)}
        if calibration is not None:
            report["strangers"] = {
                kind: {"n": len(scores), "not_sure": not_sure(scores, calibration)} for kind, scores in strange.items()
            }
        write_report(report, scored, calibration, rows, names, self.folder)
        for line in result_lines(report):
            logger.info("result %s: %s", split, line)
        return report

    def _adjusted(self, strangers: Sequence[dict]) -> np.ndarray:
        entries = list(self._raw_scores(strangers))
        if not entries:
            raise UserError("--strangers: none of its photos can be opened; the lines above say why")
        return self._adjust(entries).scores

    def measure_replies(
        self, rows, split: str, parse: Callable[[str, Sequence[str]], int | None], longest: int
    ) -> dict:
        """Free replies of at most `longest` tokens, kept in eval_<split>.replies.jsonl, as figures.

        `parse(text, names)` is the class that a reply names, or None.
        """
        path = self.folder / f"eval_{split}.replies.jsonl"
        entries, rate = keep_by_photo(
            rows,
            functools.partial(self._by_all, functools.partial(self._own_replies, longest=longest)),
            path,
            self.facts | {"longest": longest},
            self.max_bad_fraction,
            self.processes,
        )
        if not self.processes.is_main:
            return {}
        names, texts = self.collator.class_names, [entry["text"] for entry in entries]
        labels = [entry["label"] for entry in entries]
        figures = dict(measure_replies(texts, [parse(text, names) for text in texts], names, labels))
        text = json.dumps({"scored": self.facts, "figures": figures | {"replies_per_s": rate}}, indent=2)
        self._replies_path(split).write_text(text + "\n", encoding="utf-8")
        logger.info(
            f"result {split}: free replies: exact match {figures['exact_match']:.3f}, substring match "
            f"{figures['substring_match']:.3f} on {figures['replies']:,} photos; {figures['unparsed']} named no class"
        )
        return figures

    def _replies_path(self, split: str) -> Path:
        return self.folder / f"eval_{split}.replies.json"

    def _replies_of(self, rows, split: str) -> dict:
        """Figures of free replies of the same model to as many photos, if they were measured."""
        path = self._replies_path(split)
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"scored": None}
        is_same = saved["scored"] == self.facts and saved["figures"]["replies"] <= len(rows)
        return saved["figures"] if is_same else {}


def neutral_row() -> dict:
    """Plain grey, which shows nothing: what the names score by themselves."""
    file = io.BytesIO()
    Image.new("RGB", (336, 336), (128, 128, 128)).save(file, "PNG")
    return {"image": {"bytes": file.getvalue(), "path": None}, "label": 0, "id": "neutral"}
