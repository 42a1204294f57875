"""Prediction sets on scores whose truth is known."""

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import betabinom, t

from evaluation.calibration import Calibration, calibrate
from evaluation.conformal import METHODS, explain_missing, find_quantile, find_sets, fit_sets, nonconformity
from evaluation.metrics import SplitScores

RESPLITS, CLASSES = 100, 10


def draw(images, sharpness=1.0, seed=0):
    """(scores, labels): labels follow softmax(scores / sharpness), so that other scores than at 1 are wrong."""
    rng = np.random.default_rng(seed)
    honest = 1.5 * rng.normal(size=(images, CLASSES))
    return sharpness * honest, np.array([rng.choice(CLASSES, p=row) for row in softmax(honest, axis=1)])


def resplit(labels, images):
    for seed in range(RESPLITS):
        order = np.random.default_rng(seed).permutation(len(labels))
        yield order[:images], order[images:]


def band(images, target=0.9):
    """(expected coverage, four standard errors of its mean over RESPLITS): that of a fit is Beta(k, n + 1 - k)."""
    rank = int(np.ceil((images + 1) * target - 1e-9))
    mean = rank / (images + 1)
    return mean, 4 * np.sqrt(mean * (1 - mean) / (images + 2) / RESPLITS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_either_score_covers_at_the_target_of_a_model_however_wrong(method, sharpness):
    """With 20 images the corrected quantile gives 19/21, the plain one 18/21, which lies outside of the band."""
    scores, labels = draw(2000, sharpness)
    true = nonconformity(softmax(scores, axis=1), method)[np.arange(2000), labels]
    coverages = [(true[test] <= find_quantile(true[val], 0.9)).mean() for val, test in resplit(labels, 20)]
    expected, width = band(20)
    assert abs(np.mean(coverages) - expected) < width < expected - 18 / 21


@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_the_whole_fit_covers_at_the_target(sharpness):
    """Temperature, choice of the score and quantile from the same 200 images."""
    scores, labels = draw(2000, sharpness)
    found = []
    for val, test in resplit(labels, 200):
        calibration = calibrate(SplitScores([""] * 200, labels[val], scores[val]), 0.95, 0.9)
        found.append(calibration.measure_sets(SplitScores([], labels[test], scores[test])))
    expected, width = band(200)
    assert abs(np.mean([each["coverage"] for each in found]) - expected) < width < 0.01
    low, high = betabinom(1800, 181, 20).interval(0.95)
    inside = [low <= 1800 * each["coverage"] <= high for each in found]
    assert np.mean(inside) >= 0.9 and {each["target"] for each in found} == {0.9}
    sizes = np.array([each["mean_size"] for each in found])
    assert 3 < sizes.mean() < 5  # of ten
    low, high = np.array([each["mean_size_interval"] for each in found]).T
    assert (low < sizes).all() and (sizes < high).all() and (high - low < 0.5).all()


def test_the_interval_of_the_mean_size_is_students():
    scores, labels = (
        np.log([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04], [0.4, 0.35, 0.25], [0.96, 0.03, 0.01]]),
        np.zeros(4, int),
    )
    calibration = Calibration(1.0, None, 0.95, 20, {"method": "lac", "target": 0.9, "quantile": 0.75})
    found = calibration.measure_sets(SplitScores([], labels, scores))
    assert found["mean_size"] == 1.75  # of 2, 1, 3 and 1 names
    width = t.ppf(0.975, 3) * np.std([2, 1, 3, 1], ddof=1) / 2
    assert found["mean_size_interval"] == pytest.approx([1.75 - width, 1.75 + width])
    assert calibration.measure_sets(SplitScores([], labels[:1], scores[:1]))["mean_size_interval"] is None


def test_sets_of_a_model_that_knows_nothing_hold_nine_names_of_ten():
    scores, labels = draw(4000)[0], np.random.default_rng(1).integers(CLASSES, size=4000)
    probabilities = softmax(scores, axis=1)
    sets = find_sets(probabilities[2000:], fit_sets(probabilities[:2000], labels[:2000], 0.9))
    assert sets.mean() == pytest.approx(0.9, abs=0.02) and sets[np.arange(2000), labels[2000:]].mean() < 0.93


@pytest.mark.parametrize(
    ("row", "lac", "aps"),
    [
        ([0.2, 0.5, 0.3], [0.8, 0, 0.7], [0.8, 0, 0.5]),
        ([0.4, 0.2, 0.4], [0, 0.8, 0], [0, 0.8, 0]),
        ([0.3, 0.4, 0.3], [0.7, 0, 0.7], [0.4, 0, 0.4]),
        ([0.25] * 4, [0] * 4, [0] * 4),
        ([1.0, 0.0, 0.0], [0, 1, 1], [0, 1, 1]),
    ],
)
def test_equal_probabilities_score_alike_and_the_likeliest_zero(row, lac, aps):
    for method, expected in (("lac", lac), ("aps", aps)):
        assert nonconformity(np.array([row]), method)[0] == pytest.approx(expected)


def test_a_set_holds_what_scores_exactly_the_quantile_and_is_never_empty():
    probabilities = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    for quantile, sizes in ((0.0, [1, 1]), (0.7, [2, 1]), (np.nextafter(0.7, 0), [1, 1]), (1.0, [3, 3])):
        sets = find_sets(probabilities, {"method": "lac", "target": 0.9, "quantile": float(quantile)})
        assert sets.sum(axis=1).tolist() == sizes and sets[:, 0].all()


@pytest.mark.parametrize(
    ("images", "target", "rank"), [(9, 0.9, 9), (8, 0.9, None), (19, 0.9, 18), (20, 0.9, 19), (99, 0.55, 55)]
)
def test_the_quantile_is_the_corrected_one_exactly(images, target, rank):
    """100 x 0.55 is 55.00000000000001 in floating point, and would be rounded up to 56."""
    scores = np.random.default_rng(0).permutation(images) + 1.0
    assert find_quantile(scores, target) == rank


@pytest.mark.parametrize(("images", "target", "needed"), [(8, 0.9, 9), (9, 0.9, None), (98, 0.99, 99), (3, 0.75, None)])
def test_too_few_images_for_the_target_are_reported(images, target, needed):
    scores, labels = draw(images)
    calibration = calibrate(SplitScores([""] * images, labels, scores), 0.95, target)
    reason, found = explain_missing(calibration._asdict()), calibration.measure_sets(None)
    assert (found["method"] is None) == (needed is not None) and found["coverage"] is None
    expected = (
        f"no prediction sets: {images} images of val are too few for a coverage of {target}, which needs {needed}"
    )
    assert reason == (expected if needed else None)
    assert (find_sets(softmax(scores, axis=1), calibration.conformal) is None) == (needed is not None)


def test_the_score_with_the_smaller_sets_is_used():
    found = set()
    for seed in range(40):
        probabilities = softmax(draw(60, 2.5, seed)[0], axis=1)
        labels = draw(60, 2.5, seed)[1]
        sizes = {}
        for method in METHODS:
            scores = nonconformity(probabilities, method)
            sizes[method] = (scores <= find_quantile(scores[np.arange(60), labels], 0.8)).sum()
        method = fit_sets(probabilities, labels, 0.8)["method"]
        assert method == ("aps" if sizes["aps"] < sizes["lac"] else "lac")
        found.add(method)
    assert found == set(METHODS)
