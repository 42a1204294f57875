"""Genus or family where the class is not sure: probabilities summed up the tree, one threshold a level, fitted on val.

The probability of a genus is the sum of those of its classes, which needs no other model. The deepest level is the
answer whose likeliest taxon reaches the level's threshold (Deng et al. 2012 call it hedging). A threshold is fitted on
those images of val alone that reach none before: on all of val, easy images would lower it. They are few, so the mean
of their calibrated confidences has to reach the target, and not their accuracy: five right ones in a row once let
through 17 images of which 7 were right (docs/LOG.md). Where no image of val is that sure, the target is the threshold.

Shapes: n images, C classes.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import softmax

from data.taxonomy import LEVELS, Taxonomy
from evaluation.calibration import Calibration, choose_threshold
from evaluation.metrics import SplitScores, accept, wilson_interval


class Taxa(NamedTuple):
    """The likeliest taxon of each image and its probability."""

    names: np.ndarray  # (n,) text; "": a class without a taxon, which stands for itself
    confidences: np.ndarray  # (n,)

    def accept(self, threshold: float | None) -> np.ndarray:
        """(n,) bool"""
        return (self.names != "") & accept(self.confidences, threshold)


def find_taxa(probabilities: np.ndarray, taxonomy: Taxonomy, level: str) -> Taxa:
    """Of probabilities (n, C) of the classes."""
    names = np.array(taxonomy[level])
    keys = [taxon or f"\0{label}" for label, taxon in enumerate(taxonomy[level])]
    _, first, groups = np.unique(keys, return_index=True, return_inverse=True)
    sums = np.zeros((len(first), len(probabilities)))
    np.add.at(sums, groups, probabilities.T)
    sums = np.minimum(sums.round(9), 1)  # the sum of all classes is 1, and not a hair below a threshold of 1
    likeliest = sums.argmax(axis=0)
    return Taxa(names[first[likeliest]], sums[likeliest, np.arange(len(probabilities))])


def fit_levels(split: SplitScores, calibration: Calibration, taxonomy: Taxonomy | None) -> Calibration:
    """The calibration with the thresholds of the levels, from the images that it was fitted on."""
    if taxonomy is None:
        return calibration
    probabilities = softmax(split.scores / calibration.temperature, axis=1)
    rest, levels = ~calibration.accept(split.scores), dict[str, float]()
    for level in LEVELS:
        taxa = find_taxa(probabilities, taxonomy, level)
        confidences = taxa.confidences[rest & (taxa.names != "")]
        found = choose_threshold(confidences, confidences, calibration.target_selective_accuracy)
        levels[level] = calibration.target_selective_accuracy if found is None else found
        rest &= ~taxa.accept(levels[level])
    return calibration._replace(levels=levels, taxonomy=taxonomy)


def measure_levels(split: SplitScores, calibration: Calibration) -> dict | None:
    """Of the images whose class is not sure, how many get a genus or family, and how often it is the right one."""
    if calibration.taxonomy is None or calibration.levels is None:
        return None
    probabilities = softmax(split.scores / calibration.temperature, axis=1)
    rejected = ~calibration.accept(split.scores)
    rest, right, levels = rejected.copy(), np.zeros(len(rejected), dtype=bool), {}
    for level in LEVELS:
        taxa, truth = find_taxa(probabilities, calibration.taxonomy, level), np.array(calibration.taxonomy[level])
        accepted = rest & taxa.accept(calibration.levels[level])
        right |= accepted & (taxa.names == truth[split.labels])
        rest &= ~accepted
        levels[level] = {"taxa": len({*truth} - {""}), "classes": int((truth != "").sum())}
        levels[level] |= {"accepted": int(accepted.sum()), "correct": int((right & accepted).sum())}
    accepted = rejected & ~rest
    return {
        "rejected": int(rejected.sum()),
        "accepted": int(accepted.sum()),
        "correct": int(right.sum()),
        "share_correct": float(right[rejected].mean()) if rejected.any() else None,
        "share_interval": wilson_interval(right[rejected]) if rejected.any() else None,
        "precision": float(right[accepted].mean()) if accepted.any() else None,
        "precision_interval": wilson_interval(right[accepted]) if accepted.any() else None,
        **levels,
    }
