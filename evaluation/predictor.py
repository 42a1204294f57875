"""Images to class names: the likeliest ones of each, their probabilities, and whether the first is certain enough."""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import softmax

from evaluation.calibration import UNCALIBRATED, Calibration
from evaluation.conformal import explain_missing, find_sets
from evaluation.hierarchy import find_taxa
from evaluation.metrics import accept
from evaluation.open_set import Detector
from evaluation.reference import load_detector
from evaluation.results import read_calibration, same_weights
from models.builder import PlantModel
from models.features import Examined
from models.search import MAX_SCORED, Found, Goal
from runtime.device import choose_device
from runtime.run_dir import Run
from utils.image_utils import MAX_BYTES
from utils.logging_utils import UserError, logger, printable

FEW_IMAGES = 30  # of val, with which a threshold says little


class Taxon(NamedTuple):
    """The likeliest genus or family, "" if that of the likeliest classes is not known."""

    name: str
    confidence: float
    is_confident: bool  # whether it is the answer if no deeper level is sure


class Prediction(NamedTuple):
    """Class names of an image with their probabilities, likeliest first: all, or the top ones of many."""

    likeliest: list[tuple[str, float]]
    is_confident: bool  # whether the likeliest reaches the threshold fitted on val
    at_most: float | None = None  # the likeliest's probability, where the one above is what it is at least
    prediction_set: list[str] | None = None  # contains the true name at the rate that was asked for; None: no sets
    strangeness: float | None = None  # above 0: it shows none of the classes; None: that is not known
    unreadable: Sequence[str] = ()  # "path: reason" of a plant's images that could not be opened
    taxa: dict[str, Taxon] = {}  # by level, the deepest first, where a taxonomy is known  # noqa: RUF012

    @property
    def is_none_of_these(self) -> bool:
        return self.strangeness is not None and self.strangeness > 0

    @property
    def level(self) -> str | None:
        """The deepest level that is sure: name, genus or family; None: not even that, or none of the classes."""
        if self.is_none_of_these:
            return None
        if self.is_confident:
            return "name"
        return next((level for level, taxon in self.taxa.items() if taxon.is_confident), None)


def to_json(images: str | Sequence[str], found: Prediction | str, top: int) -> dict:
    """What predict.py --json and the endpoint of app.py give of an image, or of the images of one plant.

    `found` is a str where there is no prediction: the reason.
    """
    line: dict = {"image" if isinstance(images, str) else "images": images}
    if isinstance(found, str):
        return line | {"error": found}
    likeliest = [{"name": name, "confidence": round(share, 6)} for name, share in found.likeliest[:top]]
    name = found.likeliest[0][0] if found.level == "name" else None
    line |= {"name": name, "confidence": likeliest[0]["confidence"], "likeliest": likeliest, "level": found.level}
    if found.strangeness is not None:
        line |= {"none_of_these": found.is_none_of_these, "strangeness": round(found.strangeness, 6)}
    line |= {} if found.prediction_set is None else {"set": found.prediction_set}
    for level, taxon in found.taxa.items():
        line[level] = {"name": taxon.name, "confidence": round(taxon.confidence, 6)} if taxon.name else None
    line |= {"unreadable": found.unreadable} if found.unreadable else {}
    return line if found.at_most is None else line | {"confidence_at_most": round(found.at_most, 6)}


def list_names(names: Sequence[str], shown: int) -> str:
    """`oak, ash or 3 more`: the first of them."""
    return ", ".join(names[:shown]) + (f" or {len(names) - shown:,} more" if len(names) > shown else "")


def load_predictor(run: Run) -> "Predictor":
    """A run's model with the calibration of its weights; warns where there is none. Raises UserError."""
    with same_weights(run) as weights:
        calibration = read_calibration(run.folder, weights)
        plant = PlantModel.from_run(run, choose_device(run.config.model, run.config.gpu_memory_fraction))
    doubt = None
    if calibration is None:
        reason = "was trained on val, so nothing could be calibrated"
        if not run.config.train_on_val:
            reason = f"has no calibration for its weights, make it with: python evaluate.py {run.folder}"
        doubt = f'{reason}; confidence is the model\'s own, and no image is "not sure"'
    elif calibration.images < FEW_IMAGES:
        doubt = f'"not sure" was calibrated on only {calibration.images} images of val; do not rely on it'
    elif calibration.threshold is None:
        target = f"{calibration.target_selective_accuracy:g}"
        doubt = f'no confidence reached a selective accuracy of {target} on val, so every image is "not sure"'
    if doubt:
        logger.warning(f"{run.folder}: {doubt}")
    if calibration and {*map(len, (calibration.taxonomy or {}).values())} - {len(plant.class_names)}:
        reason = "its taxonomy is not of the run's classes"
        raise UserError(f"{run.folder}: calibration.json: {reason}; make it again: python evaluate.py {run.folder}")
    missing = explain_missing(calibration and calibration._asdict())
    detector = None
    if len(plant.class_names) <= MAX_SCORED:
        detector = load_detector(run.folder, calibration, plant.base.config)
    elif calibration and calibration.conformal:
        missing = f"no prediction sets: above {MAX_SCORED:,} names not all are scored"
    for problem in (missing, detector):
        if isinstance(problem, str):
            logger.warning(f"{run.folder}: {problem}")
    return Predictor(plant, calibration, detector if isinstance(detector, Detector) else None)


class Predictor:
    """Classifies image files; without a calibration by the model's own confidence, and always confidently."""

    def __init__(self, plant: PlantModel, calibration: Calibration | None, detector: Detector | None = None):
        self.plant = plant
        self.detector = detector
        self.calibration = calibration
        self._calibration = calibration or UNCALIBRATED

    def predict(self, images: Sequence[str | Path | dict], top: int = 5) -> Iterator[Prediction | str]:
        """For each file in order its Prediction, or the reason why it cannot be opened, batch by batch.

        Images are paths, or {"bytes": contents, "path": name} as in rows.
        Of more than MAX_SCORED class names only the `top` likeliest are found.
        """
        names = self.plant.class_names
        goal = Goal(top, self._calibration.temperature, self._calibration.threshold)
        for result in self._compute(images, goal if len(names) > MAX_SCORED else None):
            if isinstance(result, Found):
                likeliest = [(names[label], float(share)) for label, share in zip(result.names, result.low)]
                is_confident = bool(accept(result.low, self._calibration.threshold)[0])
                yield Prediction(likeliest, is_confident, at_most=float(result.high[0]))
            else:
                yield result if isinstance(result, str) else self._answer([result])

    def predict_together(self, images: Sequence[str | Path | dict]) -> Prediction | str:
        """The class of one plant that all images show, whose scores are fused; the reason if none can be opened.

        Images that cannot be opened are in its `unreadable`, and the rest is fused; of copies the first alone, with
        a warning. All class names are scored.
        """
        found = list(self._compute(_without_copies(images), None))
        results = [result for result in found if not isinstance(result, str)]
        reasons = [result for result in found if isinstance(result, str)]
        if not results:
            return "; ".join(reasons)
        return self._answer(results)._replace(unreadable=reasons)

    def _compute(self, images: Sequence[str | Path | dict], goal: Goal | None) -> Iterator:
        """For each file in order its Examined, with a goal the names Found, or why it cannot be opened."""
        files = [image if isinstance(image, dict) else {"bytes": None, "path": str(image)} for image in images]
        rows = [{"image": file, "label": 0, "id": str(index)} for index, file in enumerate(files)]
        plant = self.plant
        batches: Iterator[tuple[list, list[str]]] = plant.search(rows, goal) if goal else plant.score(rows, True)
        for results, unreadable in batches:
            found: dict[int, Found | Examined | str] = {int(sample.id): result for sample, result in results}
            for message in unreadable:
                index, _, reason = message.partition(": ")
                found[int(index)] = reason
            yield from (found[index] for index in sorted(found))

    def _answer(self, images: Sequence[Examined]) -> Prediction:
        """For images of one plant."""
        scores = np.mean([image.scores for image in images], axis=0)
        found = decide(scores, self._calibration.of_images(len(images)), self.plant.class_names)
        return found if self.detector is None else found._replace(strangeness=self.detector.find_excess(images))


def decide(scores: np.ndarray, calibration: Calibration, names: Sequence[str]) -> Prediction:
    """By the scores (C,) of all names alone, whether or not it is none of them."""
    probabilities = softmax(scores / calibration.temperature)[None]
    order = np.argsort(-probabilities[0], kind="stable")
    likeliest = [(names[label], float(probabilities[0, label])) for label in order]
    sets = find_sets(probabilities, calibration.conformal)
    inside = None if sets is None else [names[label] for label in order if sets[0, label]]
    taxonomy, taxa = calibration.taxonomy or {}, {}
    for level, threshold in (calibration.levels or {}).items() if taxonomy else ():
        found = find_taxa(probabilities, taxonomy, level)
        taxa[level] = Taxon(str(found.names[0]), float(found.confidences[0]), bool(found.accept(threshold)[0]))
    is_confident = bool(accept(probabilities.max(axis=1), calibration.threshold)[0])
    return Prediction(likeliest, is_confident, prediction_set=inside, taxa=taxa)


def _without_copies(images: Sequence[str | Path | dict]) -> list[str | Path | dict]:
    """Of files with the same content the first: copies add nothing, and fused they would raise the confidence."""
    first: dict[object, tuple[str, str | Path | dict]] = {}
    for image in images:
        name = printable(image["path"] if isinstance(image, dict) else str(image))
        key: object = name
        with contextlib.suppress(OSError, ValueError):  # opening it as an image says why
            if isinstance(image, dict):
                key = zlib.crc32(image["bytes"])
            elif Path(image).is_file() and Path(image).stat().st_size <= MAX_BYTES:
                key = zlib.crc32(Path(image).read_bytes())
        original, _ = first.setdefault(key, (name, image))
        if first[key][1] is not image:
            logger.warning(f"{name}: a copy of {original}, which counts once")
    return [image for _, image in first.values()]
