"""What a report says beside accuracy: would a much cheaper model do, and are images of other plants noticed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp

from evaluation.calibration import Calibration
from evaluation.metrics import SplitScores
from evaluation.open_set import SCORES, SUMS, Reference, Space, build_spaces, combine, measure_strangeness, tabulate
from evaluation.probe import TrainFeatures, measure_probe
from evaluation.reference import REFERENCE_FILE, read_reference
from models.features import Examined, feature_widths
from utils.logging_utils import UserError


class Detector(NamedTuple):
    """Tells images of none of the classes, with what was fitted on val and the features of train images."""

    fitted: dict  # an OpenSet
    spaces: dict[str, Space]
    temperature: float

    def measure(self, images: SplitScores) -> dict[str, np.ndarray]:
        """{score: (n,)} of images; open_set.py says what they mean."""
        return combine(measure_strangeness(images, self.spaces, self.temperature), self.fitted["scale"])

    def find_excess(self, images: Sequence[Examined]) -> float:
        """How far images of one plant are above the threshold, on average: above 0 they show none of the classes."""
        scores = np.array([image.scores for image in images])
        features = {"log_mass": logsumexp(scores, axis=1)}
        features |= {name: np.stack([getattr(image, name) for image in images]) for name in self.spaces}
        measured = self.measure(SplitScores([], np.zeros(len(images), dtype=int), scores, features=features))
        return float(measured[self.fitted["score"]].mean() - self.fitted["threshold"])


def find_strange(split: SplitScores, calibration: Calibration | None, reference: Reference | str) -> np.ndarray | None:
    """(n,) whether each image gets "none of these"; None where that was not fitted."""
    fitted = calibration and calibration.open_set
    if calibration is None or isinstance(reference, str) or not fitted or fitted["score"] is None:
        return None
    detector = Detector(fitted, build_spaces(reference), calibration.temperature)
    return detector.measure(split)[fitted["score"]] > fitted["threshold"]


def load_detector(folder: Path, calibration: Calibration | None, config: Any) -> Detector | str | None:
    """That of a run, whose model has this config, or why it has none; None of a run made before there were any.

    Raises UserError for a score that does not exist.
    """
    fitted = calibration and calibration.open_set
    if not calibration or not fitted:
        return None
    if fitted["score"] is None or fitted["threshold"] is None:
        return f'no "none of these": {fitted["missing"]}'
    again = f"make it again: python evaluate.py {folder}"
    parts = tuple(fitted["score"].split(" + "))
    if not (parts in SUMS or len(parts) == 1) or not fitted["scale"].keys() >= set(parts) <= SCORES:
        raise UserError(f"{folder}: calibration.json: {fitted['score']!r} is no open-set score; {again}")
    reference, widths = read_reference(folder / REFERENCE_FILE), feature_widths(config)
    if (
        reference is None
        or reference.facts["identity"] != fitted.get("reference")
        or {name: features.shape[1] for name, features in reference.features.items()} != widths
    ):
        return f'no "none of these": {REFERENCE_FILE} is missing, corrupted or another one; {again}'
    return Detector(fitted, build_spaces(reference), calibration.temperature)


def measure_trust(
    reference: Reference | str,
    calibration: Calibration | None,
    val: SplitScores | None,
    split: SplitScores,
    others: Mapping[str, SplitScores],
    device: torch.device,
) -> dict:
    """{"probe", "open_set", "none_of_these"} of a report; without a reference, a sentence on why there is none."""
    if isinstance(reference, str):
        probe = dict.fromkeys(("linear_top1", "knn_top1", "seconds")) | {"advice": f"not measured: {reference}"}
        return {"probe": probe, "open_set": [], "none_of_these": {"score": None, "missing": reference}}
    facts = reference.facts
    train = TrainFeatures(
        reference.features["tower"].astype("f4"), reference.labels["tower"], facts["images"], facts["seconds"]
    )
    found: dict = {"probe": measure_probe(train, val, split, device) | {"tower_is_trained": facts["tower_is_trained"]}}
    if calibration is None or calibration.open_set is None:
        return found | {"open_set": [], "none_of_these": {"score": None, "missing": "the run was trained on val"}}
    fitted = calibration.open_set
    detector = Detector(fitted, build_spaces(reference), calibration.temperature)
    known, other = detector.measure(split), {kind: detector.measure(images) for kind, images in others.items()}
    answer = {name: fitted[name] for name in ("score", "threshold", "kept", "missing")}
    if fitted["score"]:
        beyond = {kind: each[fitted["score"]] > fitted["threshold"] for kind, each in {"known": known, **other}.items()}
        answer["rates"] = {kind: float(each.mean()) for kind, each in beyond.items()}
    return found | {"open_set": tabulate(known, other), "none_of_these": answer}
