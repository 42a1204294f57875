"""Several images of one plant: their log-probabilities fused, with a weight fitted on val.

If images were independent given the plant, their log-probabilities would add up; copies of one image add nothing, and
the mean is right. In between, the mean of n images' scores (n, C) is divided by T / n^a, where T is the temperature for
one image and a, from 0 (mean) to 1 (sum), is what makes the true classes of val's pairs likeliest: a logarithmic
opinion pool (Genest & Zidek 1986). Threshold and prediction sets are fitted anew for pairs, and used for more images.

Pairs are of one observation where the data says what images are of one plant, else of one class: these are images of
different plants, as far as is known, and so tell more. No image is in two pairs.
"""

import random
from collections import defaultdict

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from evaluation.calibration import Calibration, calibrate
from evaluation.hierarchy import fit_levels
from evaluation.metrics import SplitScores, mean_interval, measure_selective, wilson_interval

MIN_PAIRS = 30  # of observations, below which pairs of a class are used


def find_pairs(split: SplitScores, share: str) -> np.ndarray:
    """(m, 2) images that share an observation, or a class and no known observation, drawn with a fixed seed."""
    plants = split.plants or [""] * len(split.ids)
    members: dict[tuple[int, str], list[int]] = defaultdict(list)
    seen = set()
    for index in sorted(range(len(split.ids)), key=split.ids.__getitem__):
        label, plant = int(split.labels[index]), plants[index]
        if share == "observation" and plant:
            members[label, plant].append(index)
        elif share == "class" and (label, plant) not in seen:
            members[label, ""].append(index)
            seen |= {(label, plant)} if plant else set()
    draw, pairs = random.Random(0), list[tuple[int, int]]()
    for _, indices in sorted(members.items()):
        draw.shuffle(indices)
        pairs += list(zip(indices[::2], indices[1::2]))
    return np.array(pairs, dtype=int).reshape(-1, 2)


def fuse(split: SplitScores, pairs: np.ndarray) -> SplitScores:
    """The mean scores of each pair."""
    ids = [f"{split.ids[first]} + {split.ids[second]}" for first, second in pairs]
    return SplitScores(ids, split.labels[pairs[:, 0]], split.scores[pairs].mean(axis=1))


def fit_pairs(split: SplitScores, calibration: Calibration) -> Calibration:
    """The calibration of one image, with that of pairs; without it where val has no pair."""
    share, pairs = "observation", find_pairs(split, "observation")
    if len(pairs) < MIN_PAIRS:
        share, pairs = "class", find_pairs(split, "class")
    if not len(pairs):
        return calibration
    fused = fuse(split, pairs)

    def loss(exponent: float) -> float:
        scores = fused.scores * 2**exponent / calibration.temperature
        return -log_softmax(scores, axis=1)[np.arange(len(pairs)), fused.labels].mean()

    exponent = float(minimize_scalar(loss, bounds=(0, 1), method="bounded").x)
    coverage = calibration.conformal["target"] if calibration.conformal else 0.9
    fitted = calibrate(fused, calibration.target_selective_accuracy, coverage, calibration.temperature / 2**exponent)
    fitted = fit_levels(fused, fitted, calibration.taxonomy)
    kept = {key: value for key, value in fitted._asdict().items() if key not in ("pairs", "pairs_share", "taxonomy")}
    return calibration._replace(pairs=kept, pairs_share=share)


def explain_doubt(calibration: Calibration | None) -> str | None:
    """Why answers for several images are not to be relied on, as a sentence; None: as much as those for one."""
    if calibration is None:
        return None
    if calibration.pairs is None:
        reason = "val had no two images of one class, or was scored by an older program (python evaluate.py RUN)"
        return f"the scores of several images are averaged, as nothing better was fitted: {reason}"
    if (pairs := calibration.pairs["images"]) < MIN_PAIRS:
        return f"several images of one plant were calibrated on only {pairs} pairs of val; do not rely on it"
    if calibration.pairs_share == "class":
        reason = "val does not say which images show one plant, so pairs are of different plants, which tell more"
        return f"the confidence for several images of one plant may be too high: {reason}"
    return None


def measure_fusion(split: SplitScores, calibration: Calibration) -> dict[str, dict]:
    """What a second image gains, by what pairs share: {"class" or "observation": metrics}, of which there are any."""
    found = {}
    for kind in ("class", "observation"):
        pairs = find_pairs(split, kind)
        if not len(pairs):
            continue
        fused, single = fuse(split, pairs), split.correct[pairs].mean(axis=1)
        gain = fused.correct - single
        found[kind] = {
            "pairs": len(pairs),
            "single_top1": float(single.mean()),
            "pair_top1": float(fused.correct.mean()),
            "pair_interval": wilson_interval(fused.correct),
            "gain": float(gain.mean()),
            "gain_interval": mean_interval(gain),
            "single_coverage": float(calibration.accept(split.scores[pairs.ravel()]).mean()),
            **measure_selective(calibration.of_images(2).accept(fused.scores), fused.correct),
        }
    return found
