"""Scores splits with one model, photo by photo on disk, so that a half-done evaluation goes on where it was."""

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config.training_config import TrainingConfig
from models.builder import DTYPES, unwrap
from models.evaluation import adjust_scores, measure_replies
from models.generation import generate_replies
from models.report import Calibration, Scored, calibrate, figures_of, not_sure, write_report
from models.scoring import score_rows
from utils.logging_utils import UserError, logger

CALIBRATION_FILE = "calibration.json"
DIGITS = 4  # of a stored log-probability, in nats: far below what 16-bit weights resolve


def read_entries(path: Path) -> tuple[dict | None, list[dict]]:
    """(header, entries) of a per-photo file; what a kill tore off at its end is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return (entries[0], entries[1:]) if entries else (None, [])


def keep_by_photo(rows, compute: Callable, path: Path, header: dict) -> tuple[list[dict], float | None]:
    """(entry of each row, photos/s): those that the file of the same header holds are not computed again.

    `compute(rows)` yields an entry with the "id" for each of these rows whose photo opens.
    """
    found, entries = read_entries(path)
    entries = entries if found == header else []
    # Written anew, so that a torn last line does not swallow the next one.
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [header, *entries]), encoding="utf-8")
    by_id = {entry["id"]: entry for entry in entries}
    left = [index for index, photo in enumerate(rows["id"]) if photo not in by_id]
    if len(left) < len(rows):
        logger.info("%s photos were done before (%s)", f"{len(rows) - len(left):,}", path)
    began, count = time.perf_counter(), 0
    with open(path, "a", encoding="utf-8") as file:
        for entry in compute(rows.select(left)) if left else ():
            file.write(json.dumps(entry) + "\n")
            file.flush()
            by_id[entry["id"]] = entry
            count += 1
    kept = [by_id[photo] for photo in rows["id"] if photo in by_id]
    if not kept:
        raise UserError(f"{path}: no photo could be opened; the lines above name what is wrong with each")
    return kept, count / (time.perf_counter() - began) if count else None


def read_hits(folder: Path, split: str) -> dict[str, bool]:
    """{photo: was its likeliest name the true one} of the scores kept in a folder."""
    path = folder / f"eval_{split}.scores.jsonl"
    _, entries = read_entries(path)
    if not entries:
        raise UserError(f"{path}: no scores yet; make them first: python evaluate.py {folder} --split {split}")
    return {entry["id"]: int(np.argmax(entry["scores"])) == entry["label"] for entry in entries}


def build_assessor(config: TrainingConfig, model, collator, precision: str, folder, adapter: str | None, **options):
    """An Assessor whose facts are all that its scores depend on but the photos themselves."""
    facts = {
        "model": config.model,
        "commit": getattr(unwrap(model).config, "_commit_hash", None),
        "adapter": adapter,
        "load_in_4bit": config.load_in_4bit,
        "precision": precision,
        "question": config.question,
        "image_size": config.image_size,
        "dataset": config.dataset,
        "classes": len(collator.class_names),
        "seed": config.seed,
    }
    batches = config.per_device_eval_batch_size, config.num_workers, DTYPES[precision]
    return Assessor(model, collator, folder, facts, *batches, **options)


class Assessor:
    """Scores splits with one model and writes what came out to the run folder.

    `facts` say what is scored (model, adapter, question, ...): they stand in each report, and scores kept on disk are
    used again only if they are the same. `per_token` divides scores by each name's tokens; `use_prior` subtracts those
    under a photo of plain grey.
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
        per_token: bool = False,
        use_prior: bool = False,
        target_precision: float = 0.95,
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
        self.target_precision = target_precision
        self._scored: dict[str, tuple[Scored, float | None]] = {}
        if use_prior:
            (neutral,) = self._raw_scores([neutral_row()])
            self.prior = neutral["scores"]

    def _raw_scores(self, rows) -> Iterator[dict]:
        options = self.batch_size, self.num_workers, self.dtype
        for one in score_rows(self.model, self.collator, rows, self.collator.name_ids, *options):
            yield {"id": one.id, "label": one.label, "scores": [round(value, DIGITS) for value in one.values]}

    def _replies(self, rows, longest: int) -> Iterator[dict]:
        options = self.batch_size, self.num_workers, self.dtype, longest
        for one in generate_replies(self.model, self.collator, rows, *options):
            yield one._asdict()

    def score(self, rows, split: str) -> tuple[Scored, float | None]:
        """Scores of a split, computed once, and photos/s where any were computed now."""
        if split not in self._scored:
            path = self.folder / f"eval_{split}.scores.jsonl"
            entries, rate = keep_by_photo(rows, self._raw_scores, path, self.facts)
            self._scored[split] = self._adjust(entries), rate
        return self._scored[split]

    def _adjust(self, entries: Sequence[dict]) -> Scored:
        scores = adjust_scores(np.array([entry["scores"] for entry in entries]), self.lengths, self.prior)
        return Scored([entry["id"] for entry in entries], np.array([entry["label"] for entry in entries]), scores)

    def calibrate(self, validation) -> Calibration:
        """Temperature and "not sure" threshold from val, written to calibration.json."""
        calibration = calibrate(self.score(validation, "val")[0], self.target_precision)
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
        replies: dict | None = None,
        twins: Sequence[str] = (),
    ) -> dict:
        """eval_<split>.json (returned), .md and .png, a picture of some photos, and a result line."""
        scored, rate = self.score(rows, split)
        names = self.collator.class_names
        report = {"split": split, **self.facts, "photos_per_s": rate, "bad_photos": len(rows) - len(scored.ids)}
        report |= {"exact_match": None, "substring_match": None} | (replies or {})
        report |= figures_of(scored, calibration, names) | {"not_calibrated": why_not_calibrated, "twins": list(twins)}
        if calibration is not None:
            report["strangers"] = {
                kind: {
                    "n": len(some),
                    "not_sure": not_sure(self._adjust(list(self._raw_scores(some))).scores, calibration),
                }
                for kind, some in (strangers or {}).items()
            }
        write_report(report, scored, calibration, rows, names, self.folder)
        low, high = report["top1_interval"]
        logger.info(
            "result %s: top-1 %.3f (%.3f to %.3f), top-5 %.3f, mean per class %.3f on %s photos",
            *(split, report["top1"], low, high, report["top5"], report["mean_per_class"], f"{report['n']:,}"),
        )
        if calibration is not None:
            logger.info(
                'result %s: calibration error %.3f, %.3f at temperature %.2f; %.0f %% answered%s, %.0f %% "not sure"',
                *(split, report["ece_uncalibrated"], report["ece"], calibration.temperature, 100 * report["answered"]),
                "" if report["answered_precision"] is None else f" ({report['answered_precision']:.3f} right)",
                100 * (1 - report["answered"]),
            )
        for kind, own in report.get("strangers", {}).items():
            logger.info('result %s: %.0f %% of %d %s "not sure"', split, 100 * own["not_sure"], own["n"], kind)
        return report

    def measure_replies(
        self, rows, split: str, parse: Callable[[str, Sequence[str]], int | None], longest: int
    ) -> dict:
        """Free replies of at most `longest` tokens, kept in eval_<split>.replies.jsonl, as figures.

        `parse(text, names)` is the class that a reply names, or None.
        """
        path = self.folder / f"eval_{split}.replies.jsonl"
        entries, rate = keep_by_photo(
            rows, lambda left: self._replies(left, longest), path, self.facts | {"longest": longest}
        )
        names, texts = self.collator.class_names, [entry["text"] for entry in entries]
        figures = measure_replies(
            texts, [parse(text, names) for text in texts], names, [entry["label"] for entry in entries]
        )
        return dict(figures) | {"replies_per_s": rate}


def neutral_row() -> dict:
    """Plain grey, which shows nothing: what the names score by themselves."""
    file = io.BytesIO()
    Image.new("RGB", (336, 336), (128, 128, 128)).save(file, "PNG")
    return {"image": {"bytes": file.getvalue(), "path": None}, "label": 0, "id": "neutral"}
