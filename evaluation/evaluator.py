"""Scores splits with one model, image by image on disk, so that a half-done evaluation goes on where it was."""

import collections
import functools
import hashlib
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from config.training_config import TrainingConfig
from data.dataset import check_unreadable_fraction
from evaluation.metrics import adjust_scores, measure_replies
from evaluation.report import (
    Calibration,
    Scored,
    abstention_rate,
    calibrate,
    compute_metrics,
    result_lines,
    write_report,
)
from models.builder import DTYPES, unwrap
from models.scoring import generate_batches, score_batches
from runtime.atomic import write_file
from runtime.checkpoint import describe_best
from runtime.device import fit_workers
from runtime.distributed import Distributed, assert_same_across_ranks, get_local_world_size
from runtime.run_files import BEST
from utils.image_utils import grey_image
from utils.logging_utils import UserError, logger

CALIBRATION_FILE = "calibration.json"
ROUND = 16  # images of each rank between two gathers, which a kill loses
DIGITS = 4  # of a stored log-probability, in nats: far below what 16-bit weights resolve


def read_entries(path: Path) -> tuple[dict | None, list[dict]]:
    """(header, entries) of a per-image file; what a kill tore off at its end is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return (entries[0], entries[1:]) if entries else (None, [])


def score_with_cache(
    rows,
    compute: Callable,
    path: Path,
    header: dict,
    max_unreadable_fraction: float = 1.0,
    dist: Distributed | None = None,
) -> tuple[list[dict], float | None]:
    """(entry of each image, photos/s): those that the file of the same header holds are not computed again.

    `compute(rows)` yields an entry with the "id" for each of these rows whose image opens. A replaced image is
    computed again, and a label is always that of the row. Of several ranks each computes a part; the main one
    keeps and returns all entries, and the others return ([], None).
    """
    dist = dist or Distributed()
    if not dist.is_main_process:
        left = dist.gather_object([])
        collections.deque(compute(rows.select(left)) if left else (), maxlen=0)
        return [], None
    found, entries = read_entries(path)
    marks = {row["id"]: image_fingerprint(row["image"]) for row in rows}
    known = [entry for entry in entries if found == header and entry["image"] == marks.get(entry["id"], entry["image"])]
    # Rewritten, since a torn last line would swallow the next one.
    write_file(path, "".join(json.dumps(entry) + "\n" for entry in [header, *known]))
    by_id = {entry["id"]: entry for entry in known}
    left = [index for index, image in enumerate(rows["id"]) if image not in by_id]
    if len(left) < len(rows):
        logger.info("%s images were done before (%s)", f"{len(rows) - len(left):,}", path)
    dist.gather_object(left)
    began, count = time.perf_counter(), 0
    with open(path, "a", encoding="utf-8") as file:
        for computed in compute(rows.select(left)) if left else ():
            entry = computed | {"image": marks[computed["id"]]}
            file.write(json.dumps(entry) + "\n")
            file.flush()
            by_id[entry["id"]] = entry
            count += 1
    check_unreadable_fraction([image for image in rows["id"] if image not in by_id], len(rows), max_unreadable_fraction)
    kept = [by_id[image] | {"label": label} for image, label in zip(rows["id"], rows["label"]) if image in by_id]
    if not kept:
        raise UserError(f"{path}: no image could be opened; the lines above name what is wrong with each")
    return kept, count / (time.perf_counter() - began) if count else None


def image_fingerprint(image: dict) -> list[int]:
    """What tells an image from another one under the same name: checksum of its bytes, or size and time of its file.

    Empty for a file that is not there: opening it says so, and counts it among the unreadable images.
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


def read_correct(folder: Path, split: str) -> tuple[dict, dict[str, bool]]:
    """(facts, {image: was its likeliest name the true one}) of the plain scores kept in a folder.

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


def build_evaluator(
    config: TrainingConfig,
    model,
    collator,
    precision: str,
    folder: str | Path,
    adapter: str | None,
    dist: Distributed,
    **options,
) -> "Evaluator":
    """An Evaluator whose facts are all that its scores depend on but the images themselves."""
    local = Path(config.model)  # of a hub model there is no such folder, and its commit stands for its files
    names = json.dumps([collator.class_names, collator.name_ids, collator.prompt.prompt])
    facts = {
        "model": config.model,
        "commit": getattr(unwrap(model).config, "_commit_hash", None),
        "files": sorted(
            [path.name, *image_fingerprint({"bytes": None, "path": path})] for path in local.glob("*.safetensors")
        ),
        "adapter": adapter,
        "load_in_4bit": config.load_in_4bit,
        "precision": precision,
        "question": config.question,
        "image_size": config.image_size,
        "dataset": config.dataset,
        "names": hashlib.sha256(names.encode()).hexdigest()[:12],
        "seed": config.seed,
    }
    assert_same_across_ranks({name: facts[name] for name in ("adapter", "commit", "precision", "names")}, dist)
    batch_bytes = collator.batch_bytes(config.per_device_eval_batch_size) * get_local_world_size()
    workers = fit_workers(config.num_workers, batch_bytes)
    batches = config.per_device_eval_batch_size, workers, DTYPES[precision], config.max_unreadable_fraction
    return Evaluator(model, collator, folder, facts, *batches, dist=dist, **options)


class Evaluator:
    """Scores splits with one model and writes what came out to the run folder.

    `facts` say what is scored (model, adapter, question, ...): they stand in each report, and scores kept on disk are
    used again only if they are the same. `per_token` divides scores by each name's tokens; `prior_calibration`
    subtracts those under an image of plain grey; `limit`, the number of images that the caller took, is only recorded.
    Of several ranks all make the same calls; the main one writes, and the others get nothing back.
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
        max_unreadable_fraction: float = 1.0,
        per_token: bool = False,
        prior_calibration: bool = False,
        limit: int | None = None,
        target_selective_accuracy: float = 0.95,
        dist: Distributed | None = None,
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
        self.max_unreadable_fraction = max_unreadable_fraction
        self.target_selective_accuracy = target_selective_accuracy
        self.dist = dist or Distributed()
        self.how = {"per_token": per_token, "prior_calibration": prior_calibration, "limit": limit}
        self._scored: dict[str, tuple[Scored, float | None]] = {}
        if prior_calibration:
            # Plain grey shows nothing: what the names score by themselves.
            (content_free,) = self._raw_scores([{"image": grey_image((336, 336)), "label": 0, "id": "content-free"}])
            self.prior = content_free["scores"]

    def _by_all(self, compute: Callable, rows) -> Iterator[dict]:
        """What compute(rows) yields, in equal parts by all processes, all of which get it, unreadable images aside."""
        count = self.dist.world_size
        own = compute(Subset(rows, range(self.dist.rank, len(rows), count)))
        while some := self.dist.gather_object(list(itertools.islice(own, ROUND if count > 1 else 1))):
            for one in some:
                if "unreadable" not in one:
                    yield one
                elif self.dist.is_main_process:
                    logger.warning("photo left out: %s", one["unreadable"])

    def _raw_scores(self, rows) -> Iterator[dict]:
        return self._by_all(self._own_scores, rows)

    def _own_scores(self, rows) -> Iterator[dict]:
        options = self.batch_size, self.num_workers, self.dtype
        for scores, unreadable in score_batches(self.model, self.collator, rows, *options):
            yield from ({"unreadable": one} for one in unreadable)
            for one in scores:
                yield {"id": one.id, "label": one.label, "scores": [round(value, DIGITS) for value in one.values]}

    def _own_replies(self, rows, longest: int) -> Iterator[dict]:
        options = self.batch_size, self.num_workers, self.dtype, longest
        for replies, unreadable in generate_batches(self.model, self.collator, rows, *options):
            yield from ({"unreadable": one} for one in unreadable)
            yield from (one._asdict() for one in replies)

    def score(self, rows, split: str) -> tuple[Scored | None, float | None]:
        """Scores of a split, computed once, and photos/s where any were computed now."""
        if split not in self._scored:
            path = self.folder / f"eval_{split}.scores.jsonl"
            how = self.facts, self.max_unreadable_fraction, self.dist
            entries, rate = score_with_cache(rows, self._raw_scores, path, *how)
            self._scored[split] = self._adjust(entries) if self.dist.is_main_process else None, rate
        return self._scored[split]

    def _adjust(self, entries: Sequence[dict]) -> Scored:
        scores = adjust_scores(np.array([entry["scores"] for entry in entries]), self.lengths, self.prior)
        return Scored([entry["id"] for entry in entries], np.array([entry["label"] for entry in entries]), scores)

    def calibrate(self, validation) -> Calibration | None:
        """Temperature and "not sure" threshold from val; of plain scores of all of val also to calibration.json."""
        scored, _ = self.score(validation, "val")
        if scored is None:
            return None
        calibration = calibrate(scored, self.target_selective_accuracy)
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
        ood: dict[str, Sequence[dict]] | None = None,
        duplicates: Sequence[str] = (),
    ) -> dict:
        """eval_<split>.json (returned), .md and .png, a picture of some images, and a result line."""
        scored, rate = self.score(rows, split)
        strange = {} if why_not_calibrated else {kind: self._adjusted(some) for kind, some in (ood or {}).items()}
        if scored is None:
            return {}
        names = self.collator.class_names
        report = {"split": split, **self.facts, **self.how, "images_per_s": rate, "processes": self.dist.world_size}
        report |= {"unreadable_images": len(rows) - len(scored.ids), "exact_match": None, "substring_match": None}
        report |= self._replies_of(rows, split)
        report |= compute_metrics(scored, calibration, names) | {
            "not_calibrated": why_not_calibrated,
            "duplicates": list(duplicates),
        }
        if calibration is not None:
            report["ood"] = {
                kind: {"n": len(scores), "abstention_rate": abstention_rate(scores, calibration)}
                for kind, scores in strange.items()
            }
        write_report(report, scored, calibration, rows, names, self.folder)
        for line in result_lines(report):
            logger.info("result %s: %s", split, line)
        return report

    def _adjusted(self, ood: Sequence[dict]) -> np.ndarray:
        entries = list(self._raw_scores(ood))
        if not entries:
            raise UserError("--ood: none of its images can be opened; the lines above say why")
        return self._adjust(entries).scores

    def measure_replies(
        self, rows, split: str, parse: Callable[[str, Sequence[str]], int | None], longest: int
    ) -> dict:
        """Free replies of at most `longest` tokens, kept in eval_<split>.replies.jsonl, as metrics.

        `parse(text, names)` is the class that a reply names, or None.
        """
        path = self.folder / f"eval_{split}.replies.jsonl"
        entries, rate = score_with_cache(
            rows,
            functools.partial(self._by_all, functools.partial(self._own_replies, longest=longest)),
            path,
            self.facts | {"longest": longest},
            self.max_unreadable_fraction,
            self.dist,
        )
        if not self.dist.is_main_process:
            return {}
        names, texts = self.collator.class_names, [entry["text"] for entry in entries]
        labels = [entry["label"] for entry in entries]
        metrics = dict(measure_replies(texts, [parse(text, names) for text in texts], names, labels))
        text = json.dumps({"scored": self.facts, "metrics": metrics | {"replies_per_s": rate}}, indent=2)
        self._replies_path(split).write_text(text + "\n", encoding="utf-8")
        logger.info(
            f"result {split}: free replies: exact match {metrics['exact_match']:.3f}, substring match "
            f"{metrics['substring_match']:.3f} on {metrics['replies']:,} images; {metrics['unparsed']} named no class"
        )
        return metrics

    def _replies_path(self, split: str) -> Path:
        return self.folder / f"eval_{split}.replies.json"

    def _replies_of(self, rows, split: str) -> dict:
        """Figures of free replies of the same model to as many images, if they were measured."""
        path = self._replies_path(split)
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"scored": None}
        is_same = saved["scored"] == self.facts and saved["metrics"]["replies"] <= len(rows)
        return saved["metrics"] if is_same else {}
