"""From scores of val to how far answers can be trusted: temperature, "not sure" threshold, prediction sets.

Shapes as in evaluation/metrics.py.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from evaluation.conformal import Conformal, find_sets, fit_sets
from evaluation.metrics import SplitScores, accept, confidence, mean_interval, wilson_interval

MIN_ABSTENTION = 0.05  # share of val, the least confident, that is rejected however often it is right


class Calibration(NamedTuple):
    """Fitted on val alone; threshold None: no confidence reaches the target selective accuracy there."""

    temperature: float
    threshold: float | None
    target_selective_accuracy: float
    images: int
    conformal: Conformal | None = None  # None: of a run made before there were prediction sets
    levels: dict | None = None  # threshold of genus and of family, where a taxonomy is known (evaluation/hierarchy.py)
    taxonomy: dict | None = None  # by level the taxon of each class; not in reports
    pairs: dict | None = None  # the same, fitted on the mean scores of two images of one plant (evaluation/fusion.py)
    pairs_share: str | None = None  # what the images of these have in common: "observation" or "class"
    open_set: dict | None = None  # for "none of these" (evaluation/open_set.py); None: of a run made before there was

    def of_images(self, count: int) -> "Calibration":
        """For the mean scores of so many images of one plant: as fitted for pairs, T / n^a of n images."""
        if count == 1 or self.pairs is None:
            return self
        pairs = Calibration(**self.pairs, taxonomy=self.taxonomy)
        exponent = np.log2(self.temperature / pairs.temperature)
        return pairs._replace(temperature=float(self.temperature / count**exponent))

    def accept(self, scores: np.ndarray) -> np.ndarray:
        """(n,) whether the model is sure of the class of images (n, C)."""
        return accept(confidence(scores, self.temperature), self.threshold)

    def measure_sets(self, split: SplitScores | None) -> dict | None:
        """How often prediction sets contain the true class, and their size; of None, the images of the fit, no metrics.

        There they would reach the target whatever the model.
        """
        if self.conformal is None:
            return None
        found: dict = dict.fromkeys(("coverage", "coverage_interval", "mean_size", "mean_size_interval"))
        if split and (sets := find_sets(softmax(split.scores / self.temperature, axis=1), self.conformal)) is not None:
            covered = sets[np.arange(len(sets)), split.labels]
            found |= {"coverage": float(covered.mean()), "coverage_interval": wilson_interval(covered)}
            sizes = sets.sum(axis=1)
            found |= {"mean_size": float(sizes.mean()), "mean_size_interval": mean_interval(sizes)}
        has_sets = self.conformal["quantile"] is not None
        return {"method": self.conformal["method"] if has_sets else None, "target": self.conformal["target"]} | found

    def measure_ood(self, scores: np.ndarray) -> dict[str, float]:
        """Of out-of-distribution images (n, C): their number, and the share whose confidence is below the threshold."""
        return {"n": len(scores), "abstention_rate": 1 - float(self.accept(scores).mean())}


UNCALIBRATED = Calibration(temperature=1.0, threshold=0.0, target_selective_accuracy=0.0, images=0)  # always confident


def calibrate(
    split: SplitScores, target_selective_accuracy: float, coverage: float = 0.9, temperature: float | None = None
) -> Calibration:
    """Temperature, unless one is given, "not sure" threshold and prediction sets, from val.

    The threshold is what the target needs, but never so low that every image is accepted: out-of-distribution images
    are found by being less confident than nearly all of val, and a good model may be right on all of val.
    """
    temperature = temperature or fit_temperature(split.scores, split.labels)
    confidences = confidence(split.scores, temperature)
    threshold = choose_threshold(confidences, split.correct, target_selective_accuracy)
    if threshold is not None:
        threshold = max(threshold, float(np.quantile(confidences, MIN_ABSTENTION, method="higher")))
    sets = fit_sets(softmax(split.scores / temperature, axis=1), split.labels, coverage)
    return Calibration(temperature, threshold, target_selective_accuracy, len(confidences), sets)


def fit_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The temperature, between 0.01 and 100, that makes the true classes likeliest (Guo et al. 2017).

    A standard normal prior on its logarithm, worth one image, keeps it finite where the model is right on every image.
    """

    def loss(log_temperature: float) -> float:
        logs = log_softmax(scores / np.exp(log_temperature), axis=1)[np.arange(len(labels)), labels]
        return -logs.mean() + log_temperature**2 / (2 * len(labels))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.01), np.log(100)), method="bounded").x))


def choose_threshold(confidences: np.ndarray, correct: np.ndarray, target: float) -> float | None:
    """The lowest confidence at and above which the accuracy is at least `target`; None: there is none."""
    order = np.argsort(-confidences, kind="stable")
    accuracies = np.cumsum(correct[order]) / np.arange(1, len(correct) + 1)
    ends = np.append(np.diff(confidences[order]) != 0, True)  # equal confidences are accepted together
    good = np.flatnonzero((accuracies >= target) & ends)
    return float(confidences[order][good[-1]]) if len(good) else None
