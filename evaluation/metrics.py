"""From scores and labels to metrics. Pure: no model, no files.

Shapes: n images, C classes. `scores` (n, C) are log-probabilities in nats, `labels` (n,) the true classes, `correct`
(n,) whether the likeliest class is the true one, `confidences` (n,) the probability of the likeliest class.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import softmax
from scipy.stats import binomtest, ttest_1samp

from models.scoring import rank_true_classes

if TYPE_CHECKING:
    from evaluation.calibration import Calibration

BINS = 15  # of confidence, equally wide, as in Guo et al. 2017
MAX_CONFUSIONS = 20  # pairs in a report


class SplitScores(NamedTuple):
    """The log-probability of every class name for the images of a split."""

    ids: list[str]
    labels: np.ndarray  # (n,)
    scores: np.ndarray  # (n, C) in nats
    plants: Sequence[str] = ()  # what images of one plant share, "" for an image on its own; or not known
    features: Mapping[str, np.ndarray] = {}  # (n, D) of "tower" and "state", (n,) of "log_mass"; or not computed

    @property
    def correct(self) -> np.ndarray:
        return self.scores.argmax(axis=1) == self.labels


# ---- accuracy


def measure_accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | list[float]]:
    """Top-1 with its 95% Wilson interval, top-5, and the mean of the classes' own accuracies.

    Papers on Oxford Flowers report both means, since its test split has 20 to 238 images a class.
    """
    correct, above, _ = rank_true_classes(scores, labels)
    return {
        "n": len(labels),
        "top1": float(correct.mean()),
        "top1_interval": wilson_interval(correct),
        "top5": float((above < 5).mean()),
        "mean_per_class": float(np.mean([correct[labels == label].mean() for label in np.unique(labels)])),
    }


def wilson_interval(correct: np.ndarray) -> list[float]:
    """The 95% interval of a share."""
    interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def mean_interval(values: np.ndarray) -> list[float] | None:
    """The 95% interval of a mean, by Student's t; None where all values are equal."""
    if len(np.unique(values)) < 2:
        return None
    interval = ttest_1samp(values, 0).confidence_interval()
    return [float(interval.low), float(interval.high)]


def measure_replies(
    texts: Sequence[str], predictions: Sequence[int | None], names: Sequence[str], labels: Sequence[int]
) -> dict[str, float]:
    """Metrics of generated replies; a prediction of None, a reply that is no class name, counts as wrong.

    `substring_match` is that of the published protocol (arXiv 2405.18415): the reply contains the true name.
    """
    exact = [prediction == label for prediction, label in zip(predictions, labels, strict=True)]
    inside = [names[label].lower() in text.lower() for text, label in zip(texts, labels, strict=True)]
    return {
        "replies": len(exact),
        "exact_match": sum(exact) / len(exact),
        "substring_match": sum(inside) / len(inside),
        "unparsed": sum(prediction is None for prediction in predictions),
    }


def per_class(scores: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, dict]:
    """{name: {"n", "top1", "precision", "recall", "f1"}} of every class that has images; its recall is its top-1.

    The precision of a class that is never predicted counts as 0.
    """
    predictions, found = scores.argmax(axis=1), {}
    for label in np.unique(labels):
        n, predicted = int((labels == label).sum()), int((predictions == label).sum())
        right = int(((predictions == label) & (labels == label)).sum())
        found[names[label]] = {"n": n, "top1": right / n, "precision": right / max(predicted, 1), "recall": right / n}
        found[names[label]]["f1"] = 2 * right / (n + predicted)
    return found


def confusions(scores: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[dict]:
    """{"names", "confused": images of either class that are predicted as the other} of pairs with any, worst first."""
    predicted = scores.argmax(axis=1)
    wrong = np.sort(np.stack([labels, predicted], axis=1)[predicted != labels], axis=1)
    pairs, counts = np.unique(wrong, axis=0, return_counts=True)
    worst = np.argsort(counts, kind="stable")[::-1][:MAX_CONFUSIONS]
    return [{"names": [names[label] for label in pairs[at]], "confused": int(counts[at])} for at in worst]


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """McNemar's exact test of two models on the same images, of each whether it was right."""
    a, b = np.array(first, bool), np.array(second, bool)
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_first + only_second
    return {
        "n": len(a),
        "first": float(a.mean()),
        "second": float(b.mean()),
        "only_first": only_first,
        "only_second": only_second,
        "p": float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
    }


# ---- confidence


def adjust_scores(scores: np.ndarray, lengths: Sequence[int] | int = 1, prior: Sequence[float] | float = 0):
    """Scores (n, C) minus the content-free prior (C,), divided by the number of tokens of each name (C,)."""
    return (scores - np.asarray(prior)) / np.asarray(lengths)


def confidence(scores: np.ndarray, temperature: float) -> np.ndarray:
    """(n,) probability of the likeliest class: softmax over the classes of scores / temperature."""
    return softmax(scores / temperature, axis=1).max(axis=1)


def calibration_bins(confidences: np.ndarray, correct: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, images) of each bin that has images."""
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    return [
        (float(confidences[bins == index].mean()), float(correct[bins == index].mean()), int((bins == index).sum()))
        for index in np.unique(bins)
    ]


def expected_calibration_error(confidences: np.ndarray, correct: np.ndarray) -> float:
    """Mean over images of |confidence - accuracy| of the image's bin."""
    bins = calibration_bins(confidences, correct)
    return sum(count * abs(mean - accuracy) for mean, accuracy, count in bins) / len(confidences)


def accept(confidences: np.ndarray, threshold: float | None) -> np.ndarray:
    """(n,) bool; without a threshold nothing is accepted."""
    return confidences >= (np.inf if threshold is None else threshold)


def measure_selective(accepted: np.ndarray, correct: np.ndarray) -> dict[str, float | None]:
    """Selective prediction: share of images that are accepted (coverage), and the accuracy on them."""
    return {
        "coverage": float(accepted.mean()),
        "selective_accuracy": float(correct[accepted].mean()) if accepted.any() else None,
    }


def measure_split(split: SplitScores, calibration: "Calibration | None", names: Sequence[str]) -> dict:
    """All metrics of eval_<split>.json that come from scores; without a calibration, of the model's own confidence."""
    confidences = confidence(split.scores, 1.0 if calibration is None else calibration.temperature)
    selective: dict = {"coverage": None, "selective_accuracy": None}
    if calibration is not None:
        selective = measure_selective(calibration.accept(split.scores), split.correct)
    classes = per_class(split.scores, split.labels, names)
    return {
        **measure_accuracy(split.scores, split.labels),
        # Of classes that have images; macro F1 is the mean of their F1, not the F1 of the means (Opitz & Burst 2019).
        **{f"macro_{key}": fmean(found[key] for found in classes.values()) for key in ("precision", "recall", "f1")},
        "ece_uncalibrated": expected_calibration_error(confidence(split.scores, 1.0), split.correct),
        "ece": expected_calibration_error(confidences, split.correct),
        **selective,
        "calibration": None if calibration is None else calibration._replace(taxonomy=None)._asdict(),
        "confusions": confusions(split.scores, split.labels, names),
        "per_class": classes,
    }
