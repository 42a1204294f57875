"""From scores and truth to figures. Pure: no model, no files.

Shapes: n images, C classes. `scores` (n, C) are log-probabilities in nats, `labels` (n,) the true classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest

from models.scoring import rank_true_classes

BINS = 15  # of confidence, equally wide, as in Guo et al. 2017


def measure_scores(scores: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, float | list[float]]]:
    """(name, value) pairs of closed-set naming; `top1_interval` is Wilson's at 95 %.

    `mean_per_class` is the mean over the classes present of each one's own share: papers on Oxford Flowers report both,
    since its test split has 20 to 238 images a class.
    """
    correct, above, _ = rank_true_classes(scores, labels)
    interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(method="wilson")
    yield "n", len(labels)
    yield "top1", float(correct.mean())
    yield "top1_interval", [float(interval.low), float(interval.high)]
    yield "top5", float((above < 5).mean())
    yield "mean_per_class", float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))


def measure_replies(
    texts: Sequence[str], predictions: Sequence[int | None], names: Sequence[str], labels: Sequence[int]
):
    """(name, value) pairs of free naming; a prediction of None is a reply that is no class name, and counts as wrong.

    `substring_match` is the published protocol's (arXiv 2405.18415): the true name occurs in the reply, whatever else
    does.
    """
    exact = [prediction == label for prediction, label in zip(predictions, labels, strict=True)]
    inside = [names[label].lower() in text.lower() for text, label in zip(texts, labels, strict=True)]
    yield "replies", len(exact)
    yield "exact_match", sum(exact) / len(exact)
    yield "substring_match", sum(inside) / len(inside)
    yield "unparsed", sum(prediction is None for prediction in predictions)


def per_class(scores: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, dict]:
    """{name: {"n", "top1"}} of every class that has images."""
    correct = scores.argmax(axis=1) == labels
    return {
        names[label]: {"n": int((labels == label).sum()), "top1": float(correct[labels == label].mean())}
        for label in np.unique(labels)
    }


def confusions(scores: np.ndarray, labels: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(one class, another, images of either taken for the other), worst first, of the pairs that were confused."""
    predictions = scores.argmax(axis=1)
    table = np.zeros((scores.shape[1],) * 2, dtype=int)
    np.add.at(table, (labels, predictions), 1)
    both = np.triu(table + table.T, k=1)
    worst = np.argsort(both, axis=None, kind="stable")[::-1][:most]
    pairs = [(int(place // len(both)), int(place % len(both))) for place in worst]
    return [(one, other, int(both[one, other])) for one, other in pairs if both[one, other]]


def adjust_scores(
    scores: np.ndarray, lengths: Sequence[int] | None = None, prior: Sequence[float] | None = None
) -> np.ndarray:
    """Scores less those under a neutral image (`prior`), divided by each name's number of tokens (`lengths`)."""
    scores = scores if prior is None else scores - np.asarray(prior)
    return scores if lengths is None else scores / np.asarray(lengths)


# ---- confidence


def confidence(scores: np.ndarray, temperature: float) -> np.ndarray:
    """(n,) probability of the likeliest class: softmax over the classes of scores / temperature."""
    return softmax(scores / temperature, axis=1).max(axis=1)


def fit_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that makes the true classes likeliest (Guo et al. 2017), sought between 0.01 and 100.

    A standard normal prior on its logarithm, worth one image, keeps it finite where the model is right on every image.
    """

    def loss(log_temperature: float) -> float:
        logs = log_softmax(scores / np.exp(log_temperature), axis=1)[np.arange(len(labels)), labels]
        return -logs.mean() + log_temperature**2 / (2 * len(labels))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.01), np.log(100)), method="bounded").x))


def calibration_bins(confidences: np.ndarray, correct: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, images) of each bin that holds images."""
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    return [
        (float(confidences[bins == one].mean()), float(correct[bins == one].mean()), int((bins == one).sum()))
        for one in np.unique(bins)
    ]


def expected_calibration_error(confidences: np.ndarray, correct: np.ndarray) -> float:
    """Mean over images of |confidence - share right| of the image's bin."""
    bins = calibration_bins(confidences, correct)
    return sum(count * abs(mean - share) for mean, share, count in bins) / len(confidences)


def choose_threshold(confidences: np.ndarray, correct: np.ndarray, precision: float) -> float | None:
    """The lowest confidence at and above which at least `precision` of the images are right; None: no such."""
    order = np.argsort(-confidences, kind="stable")
    shares = np.cumsum(correct[order]) / np.arange(1, len(correct) + 1)
    ends = np.append(np.diff(confidences[order]) != 0, True)  # equal confidences are answered together
    good = np.flatnonzero((shares >= precision) & ends)
    return float(confidences[order][good[-1]]) if len(good) else None


def measure_selective(
    confidences: np.ndarray, correct: np.ndarray, threshold: float | None
) -> Iterator[tuple[str, float | None]]:
    """(name, value) pairs of answering only at or above the threshold: share answered, share of those that is right."""
    answered = confidences >= (np.inf if threshold is None else threshold)
    yield "coverage", float(answered.mean())
    yield "selective_accuracy", float(correct[answered].mean()) if answered.any() else None


# ---- two models on the same images


def compare(first: Sequence[bool], second: Sequence[bool]) -> Iterator[tuple[str, float]]:
    """(name, value) pairs of McNemar's exact test on images that both were shown."""
    only_first = sum(one and not other for one, other in zip(first, second, strict=True))
    only_second = sum(other and not one for one, other in zip(first, second, strict=True))
    yield "n", len(first)
    yield "first", sum(first) / len(first)
    yield "second", sum(second) / len(second)
    yield "only_first", only_first
    yield "only_second", only_second
    discordant = only_first + only_second
    yield "p", float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
