"""Scores splits with a model, every image's scores kept on disk, so that an interrupted evaluation resumes."""

import collections
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.special import logsumexp

from config.cli import EvaluationOptions
from data.collator import Sample
from data.dataset import PlantData, check_unreadable_fraction, take
from data.groups import find_plants
from data.labels import parse_reply
from data.oxford_flowers import known_duplicates
from data.synthetic import draw_ood_images
from data.taxonomy import Taxonomy
from evaluation.calibration import Calibration, calibrate
from evaluation.fusion import fit_pairs, measure_fusion
from evaluation.hierarchy import fit_levels, measure_levels
from evaluation.metrics import SplitScores, adjust_scores, measure_replies, measure_split
from evaluation.mistakes import write_mistakes
from evaluation.open_set import Reference, fit_open_set, measure_open_set
from evaluation.probe import measure_probe
from evaluation.reference import build_detector, find_reference, find_train_images
from evaluation.report import result_lines, write_report
from evaluation.results import CALIBRATION_FILE, scores_schema
from evaluation.spreadsheet import write_tables
from models.builder import PlantModel
from models.features import Examined, decode, encode, features_schema
from runtime.atomic import write_file
from runtime.distributed import Distributed, assert_same_across_ranks
from runtime.run_dir import Run
from runtime.run_files import COUNT, TEXT, read_entries
from utils.image_utils import gray_image, image_fingerprint
from utils.logging_utils import UserError, logger

MAX_UNKNOWN = 500  # images of classes that were not learned, of which a sample is scored
REPLY = {"text": TEXT, "label": COUNT}  # of an entry of eval_<split>.replies.jsonl
DIGITS = 4  # of a log-probability on disk, in nats: far below what 16-bit weights resolve


def entry_of(sample: Sample, found: Examined) -> dict:
    """Of a file of scores."""
    scores = [round(value, DIGITS) for value in found.scores]
    features = {"tower": encode(found.tower), "state": encode(found.state)}
    return {"id": sample.id, "label": sample.label, "scores": scores} | features


def build_evaluator(run: Run, plant: PlantModel, dist: Distributed, options: EvaluationOptions) -> "Evaluator":
    """An Evaluator of a run, whose facts are all that its scores depend on beside the images."""
    config = run.config
    names = json.dumps([plant.class_names, plant.collator.name_ids, plant.prompt.prompt])
    weights_files = sorted(Path(config.model).glob("*.safetensors"))  # none of a hub model, which has its commit
    facts = {
        "model": config.model,
        "commit": getattr(plant.base.config, "_commit_hash", None),
        "files": [[path.name, *image_fingerprint({"bytes": None, "path": path})] for path in weights_files],
        "adapter": run.describe_weights(),
        "load_in_4bit": config.load_in_4bit,
        "precision": plant.precision,
        "question": config.question,
        "image_size": config.image_size,
        "dataset": config.dataset,
        "names": hashlib.sha256(names.encode()).hexdigest()[:12],
        "seed": config.seed,
    }
    assert_same_across_ranks({name: facts[name] for name in ("adapter", "commit", "precision", "names")}, dist)
    taxonomy = run.recorded.get("taxonomy")
    is_own = run.is_base_model or Run.load(run.folder).config.dataset == config.dataset
    return Evaluator(
        plant, run.folder, facts, dist, options, is_own, config.max_bad_fraction, config.group_by, taxonomy
    )


@dataclass
class Evaluator:
    """Scores splits with one model and writes its metrics to the run directory.

    `facts` say what is scored (model, weights, question, ...): they are in each report, and scores on disk are used
    again only under the same ones. All ranks make the same calls; rank 0 writes, and other ranks get nothing back.
    """

    plant: PlantModel
    folder: Path
    facts: dict
    dist: Distributed = field(default_factory=Distributed)
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    is_own: bool = True  # whether the images are of the run's own data set
    max_bad_fraction: float = 1.0
    group_by: str | None = None  # rule of the user for what images are of one plant
    taxonomy: Taxonomy | None = None
    prior: list[float] | float = field(default=0.0, init=False)  # content-free, of each name

    @property
    def is_kept(self) -> bool:
        """Only plain scores of whole splits of the run's own data set make its calibration and reference."""
        return self.is_own and not (self.options.per_token or self.options.prior_calibration or self.options.limit)

    def __post_init__(self) -> None:
        if self.options.prior_calibration:
            neutral = {"image": gray_image((336, 336)), "label": 0, "id": "neutral"}  # what names score by themselves
            (entry,) = self.compute_scores([neutral])
            self.prior = entry["scores"]

    def compute_scores(self, rows) -> Iterator[dict]:
        """{"id", "label", "scores", "tower", "state"} of each readable image, across ranks; every rank gets all."""
        for sample, found in self.distribute(functools.partial(self.plant.score, with_features=True), rows):
            yield entry_of(sample, found)

    def keep(self, split: str, examined: Sequence[tuple[Sample, Examined]]) -> None:
        """Put what was found, with the weights that are scored here, where `score` looks first."""
        if self.dist.is_main_process and examined:
            entries = [entry_of(sample, found) | {"image": sample.image} for sample, found in examined]
            self._write_entries(f"eval_{split}.scores.jsonl", self.facts, entries)

    def _write_entries(self, name: str, header: dict, entries: Sequence[dict]) -> None:
        write_file(self.folder / name, "".join(json.dumps(entry) + "\n" for entry in [header, *entries]))

    def compute_replies(self, rows, max_new_tokens: int) -> Iterator[dict]:
        """{"id", "label", "text"} of each readable image, as compute_scores."""
        generate = functools.partial(self.plant.generate, max_new_tokens=max_new_tokens)
        for sample, text in self.distribute(generate, rows):
            yield {"id": sample.id, "label": sample.label, "text": text}

    def distribute(self, predict: Callable, rows) -> Iterator:
        """(sample, prediction) of each readable image of `rows`, computed across ranks; every rank gets all of them."""
        for found, unreadable in self.plant.distribute(predict, rows, self.dist):
            for each in unreadable if self.dist.is_main_process else ():
                logger.warning("unreadable image skipped: %s", each)
            yield from found

    def score(self, rows, split: str) -> tuple[SplitScores | None, float | None]:
        """Scores of a split, and images/s where any were computed now; None instead of scores on other ranks."""
        name = f"eval_{split}.scores.jsonl"
        schema = scores_schema(len(self.plant.class_names)) | features_schema(self.plant.base.config)
        entries, speed = self.score_with_cache(rows, self.compute_scores, name, self.facts, schema)
        if not self.dist.is_main_process:
            return None, speed
        plants = dict(zip(rows["id"], find_plants(rows, self.group_by)[0]))
        scores = self._adjust(entries)
        return scores._replace(plants=[plants[sample] for sample in scores.ids]), speed

    def score_with_cache(
        self, rows, compute: Callable, name: str, header: dict, schema: dict
    ) -> tuple[list[dict], float | None]:
        """(entry of each readable image, images/s): entries that file `name` has under the same header are used again.

        `compute(rows)` yields an entry with the "id" of each readable image. A replaced image is computed again, as is
        one whose entry the schema does not fit. A label is always that of the row.
        Raises UserError if no image is readable, ImageError if too few are.
        """
        path, is_main_process = self.folder / name, self.dist.is_main_process
        entries, known = {}, {}
        if is_main_process:
            known = {row["id"]: {"image": image_fingerprint(row["image"]), "label": row["label"]} for row in rows}
            found, cached = read_entries(path, schema)
            # Entries of images that are not asked for stay, those of images that were replaced go.
            kept = [entry for entry in cached if entry["image"] == known.get(entry["id"], entry)["image"]]
            kept = [entry | known.get(entry["id"], {}) for entry in kept if found == header]
            # Written anew, since a torn last line would swallow the next one.
            self._write_entries(name, header, kept)
            entries = {entry["id"]: entry for entry in kept}
        pending = [index for index, sample in enumerate(rows["id"]) if sample not in entries]
        # Too many for the store of broadcast_object.
        pending = self.dist.gather_object(pending if is_main_process else [])
        computed = compute(rows.select(pending)) if pending else ()
        if not is_main_process:
            collections.deque(computed, maxlen=0)
            return [], None
        if len(pending) < len(rows):
            logger.info("eval | %s images were scored before (%s)", f"{len(rows) - len(pending):,}", path)
        began, before = time.perf_counter(), len(entries)
        with open(path, "a", encoding="utf-8") as file:
            for entry in computed:
                entries[entry["id"]] = entry | known[entry["id"]]
                file.write(json.dumps(entries[entry["id"]]) + "\n")
                file.flush()
        count = len(entries) - before
        speed = count / (time.perf_counter() - began) if count else None
        unreadable = [sample for sample in rows["id"] if sample not in entries]
        check_unreadable_fraction(unreadable, len(rows), self.max_bad_fraction)
        if len(unreadable) == len(rows):
            raise UserError(f"{path}: no image could be opened; the lines above say why")
        return [entries[sample] for sample in rows["id"] if sample in entries], speed

    def _adjust(self, entries: Sequence[dict]) -> SplitScores:
        lengths = [len(ids) for ids in self.plant.collator.name_ids] if self.options.per_token else 1
        plain = np.array([entry["scores"] for entry in entries])
        features = {name: np.stack([decode(entry[name]) for entry in entries]) for name in ("tower", "state")}
        features["log_mass"] = logsumexp(plain, axis=1)
        ids, labels = [entry["id"] for entry in entries], np.array([entry["label"] for entry in entries])
        return SplitScores(ids, labels, adjust_scores(plain, lengths, self.prior), features=features)

    def calibrate(self, scores: SplitScores, reference: Reference | str = "") -> Calibration:
        """Temperature, thresholds and sets from scores of val; to calibration.json too, if it is kept."""
        calibration = calibrate(scores, self.options.target_selective_accuracy, self.options.coverage)
        calibration = fit_pairs(scores, fit_levels(scores, calibration, self.taxonomy))
        if isinstance(reference, Reference):
            calibration = calibration._replace(open_set=dict(fit_open_set(scores, reference, calibration.temperature)))
        if self.is_kept:
            saved = calibration._asdict() | {"scored": self.facts}
            write_file(self.folder / CALIBRATION_FILE, json.dumps(saved, indent=2) + "\n")
        elif not self.is_own:
            reason = f"not the data set of {self.folder}, whose calibration and features stay as they are"
            logger.warning(f"{self.facts['dataset']}: {reason}")
        return calibration

    def report(
        self, rows, split: str, validation=None, ood_rows: Sequence[dict] | None = None, data: PlantData | None = None
    ) -> dict:
        """eval_<split>.json (returned), .md and .png, a picture of some images, and result lines.

        Calibrated on `validation`, or on the rows themselves where they are val. `ood_rows` are out-of-distribution
        images of the user, scored beside synthetic ones and those of classes that were not learned. The train images of
        `data` are what the features of others are compared with. Without rows there is nothing to do.
        """
        if rows is None:
            return {}
        scores, speed = self.score(rows, split)
        is_calibrated = split == "val" or validation is not None
        val_scores = scores if split == "val" or validation is None else self.score(validation, "val")[0]
        reference = find_reference(self, data)
        ood = draw_ood_images() | ({} if ood_rows is None else {"your images": ood_rows})
        if data and data.unknown is not None:
            ood["held-out classes"] = take(data.unknown, MAX_UNKNOWN)
        ood_scores = {kind: self._score_ood(images) for kind, images in ood.items()} if is_calibrated else {}
        if scores is None or val_scores is None:
            return {}
        calibration = self.calibrate(val_scores, reference) if is_calibrated else None
        detector = build_detector(reference, calibration)
        report = {
            "split": split,
            **self.facts,
            **{key: getattr(self.options, key) for key in ("per_token", "prior_calibration", "limit")},
            "images_per_s": speed,
            "ranks": self.dist.world_size,
            "unreadable_images": len(rows) - len(scores.ids),
            "exact_match": None,
            "substring_match": None,
            **self._read_replies(rows, scores, split),
            **measure_split(scores, calibration, self.plant.class_names),
            "conformal": calibration.measure_sets(None if split == "val" else scores) if calibration else None,
            "hierarchy": measure_levels(scores, calibration) if calibration else None,
            "together": measure_fusion(scores, calibration) if calibration and split != "val" else None,
            "not_calibrated": None if is_calibrated else "the run was trained on val",
            "duplicates": known_duplicates(rows["id"]),
            "ood": {kind: calibration.measure_ood(found.scores) for kind, found in ood_scores.items() if calibration},
            "probe": measure_probe(reference, val_scores if is_calibrated else None, scores, self.plant.device),
            **measure_open_set(detector, scores, ood_scores),
        }
        write_report(report, scores, rows, self.plant.class_names, self.folder)
        stem = self.folder / f"eval_{split}"
        train = find_train_images(reference, data)
        write_mistakes(scores, rows, calibration, self.plant.class_names, stem, train)
        if self.options.csv:
            strange = None if isinstance(detector, str) else detector.find_strange(scores)
            write_tables(report, scores, calibration, self.plant.class_names, self.folder, strange)
        for line in result_lines(report):
            logger.info("result | %s | %s", split, line)
        return report

    def _score_ood(self, rows: Sequence[dict]) -> SplitScores:
        entries = list(self.compute_scores(rows))
        if not entries:
            raise UserError("--ood: none of its images can be opened; the lines above say why")
        return self._adjust(entries)

    def generate_report(self, rows, split: str, max_new_tokens: int) -> dict:
        """Metrics of greedy replies, kept in eval_<split>.replies.jsonl; the later report of scores contains them."""
        compute = functools.partial(self.compute_replies, max_new_tokens=max_new_tokens)
        header = self.facts | {"max_new_tokens": max_new_tokens}
        entries, _ = self.score_with_cache(rows, compute, f"eval_{split}.replies.jsonl", header, REPLY)
        if not self.dist.is_main_process:
            return {}
        metrics = self._measure_replies(entries)
        rates = f"exact match {metrics['exact_match']:.3f} | substring match {metrics['substring_match']:.3f}"
        counts = f"{metrics['replies']:,} images | {metrics['unparsed']} without a class"
        logger.info(f"result | {split} | generation: {rates} | {counts}")
        return metrics

    def _measure_replies(self, entries: Sequence[dict]) -> dict:
        names, texts = self.plant.class_names, [entry["text"] for entry in entries]
        predictions = [parse_reply(text, names) for text in texts]
        return measure_replies(texts, predictions, names, [entry["label"] for entry in entries])

    def _read_replies(self, rows, scores: SplitScores, split: str) -> dict:
        """Metrics of the same model's replies to the very images of the scores, if it gave them."""
        header, entries = read_entries(self.folder / f"eval_{split}.replies.jsonl", REPLY)
        images = {row["id"]: image_fingerprint(row["image"]) for row in rows}
        replies = {entry["id"]: entry for entry in entries if entry["image"] == images.get(entry["id"])}
        if not (header and header.items() >= self.facts.items() and replies.keys() >= {*scores.ids}):
            return {}
        labels = zip(scores.ids, scores.labels)
        return self._measure_replies([replies[image] | {"label": int(label)} for image, label in labels])
