"""Prediction sets that contain the true class at a chosen rate: split conformal prediction, fitted on val.

A score says how badly a class fits an image. The set holds the classes that score at most the ceil((n + 1) target)-th
smallest of the n scores of val's true classes. For images drawn as val's were it contains the true class at least at
the target's rate (Vovk, Gammerman & Shafer 2005): on average, not within each class, and not for other plants.

Two scores of probabilities p, both 0 for the likeliest class, so that no set is empty:

- LAC: 1 - p (Sadinle, Lei & Wasserman 2019), the smallest sets on average if the probabilities are right.
- APS: the mass of all likelier classes (Romano, Sesia & Candes 2020). Their randomization, which makes sets smaller and
  the rate exact among ties, is not used: the same image must always get the same set.

Used is the one with the smaller mean set on val, of equals LAC. Temperature and choice come from val too, which the
theorem does not cover; both are a single number, and tests/unit/test_conformal.py measures the rate of the whole.

Shapes: n images, C classes.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TypedDict

import numpy as np

METHODS = ("lac", "aps")


class Conformal(TypedDict):
    """What was fitted on val; quantile None: its images are too few for the target."""

    method: str
    target: float
    quantile: float | None


def nonconformity(probabilities: np.ndarray, method: str) -> np.ndarray:
    """(n, C): how badly each class fits, from 0 to 1; the same for classes of the same probability."""
    if method == "lac":
        is_likeliest = probabilities == probabilities.max(axis=1, keepdims=True)
        return np.where(is_likeliest, 0, 1 - probabilities)
    order = np.argsort(-probabilities, axis=1)
    shares = np.take_along_axis(probabilities, order, axis=1)  # (n, C) descending
    likelier = np.minimum(np.cumsum(shares, axis=1) - shares, 1)
    starts = np.where(np.diff(shares, axis=1, prepend=2) != 0, np.arange(shares.shape[1]), 0)
    likelier = np.take_along_axis(likelier, np.maximum.accumulate(starts, axis=1), axis=1)  # of equals, the first's
    scores = np.empty_like(likelier)
    np.put_along_axis(scores, order, likelier, axis=1)
    return scores


def find_quantile(scores: np.ndarray, target: float) -> float | None:
    """The ceil((n + 1) target)-th smallest of n scores; None: there are not so many. Exact for decimal targets."""
    rank = math.ceil((len(scores) + 1) * Fraction(str(target)))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else None


def fit_sets(probabilities: np.ndarray, labels: np.ndarray, target: float) -> Conformal:
    """The method with the smaller mean set on these images (n, C), of true classes (n,), and its quantile."""

    def fit(method: str) -> tuple[float, Conformal]:
        scores = nonconformity(probabilities, method)
        quantile = find_quantile(np.take_along_axis(scores, labels[:, None], axis=1)[:, 0], target)
        size = 0.0 if quantile is None else float((scores <= quantile).sum(axis=1).mean())
        return size, Conformal(method=method, target=target, quantile=quantile)

    return min(map(fit, METHODS), key=lambda fitted: fitted[0])[1]


def find_sets(probabilities: np.ndarray, conformal: Conformal | None) -> np.ndarray | None:
    """(n, C) whether each class is in the image's set; None: there are no sets."""
    if conformal is None or conformal["quantile"] is None:
        return None
    return nonconformity(probabilities, conformal["method"]) <= conformal["quantile"]


def explain_missing(calibration: Mapping | None) -> str | None:
    """Why a calibration has no sets, as a sentence; None: it has some, or was made before there were any."""
    conformal = calibration and calibration.get("conformal")
    if calibration is None or conformal is None or conformal["quantile"] is not None:
        return None
    images, target = calibration["images"], Fraction(str(conformal["target"]))
    few = f"{images} images of val are too few for a coverage of {conformal['target']:g}"
    return f"no prediction sets: {few}, which needs {math.ceil(target / (1 - target))}"
