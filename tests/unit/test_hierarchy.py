"""Genus or family where the class is not sure, on synthetic probabilities whose truth is known."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from evaluation.calibration import Calibration, calibrate
from evaluation.fusion import fit_pairs
from evaluation.hierarchy import find_taxa, fit_levels, measure_levels
from evaluation.metrics import SplitScores
from evaluation.predictor import Prediction, Taxon

# Genus A has classes 0 and 1, B 2 and 3, C 4; class 5 has no genus. Families: A and B are one, 4 and 5 another.
TAXONOMY = {"genus": ["A", "A", "B", "B", "C", ""], "family": ["AB", "AB", "AB", "AB", "C5", "C5"]}


def draw(images: int, seed: int) -> SplitScores:
    """True log-probabilities of classes that features separate by genus, hardly within one."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, images)
    means = np.array([[4, 0, 0.4], [4, 0, -0.4], [0, 4, 0.4], [0, 4, -0.4], [-4, 0, 0], [-4, -4, 0]])
    features = rng.normal(size=(images, 3)) * 1.2 + means[labels]
    distances = ((features[:, None] - means[None]) ** 2).sum(axis=2)
    scores = log_softmax(-distances / (2 * 1.2**2), axis=1)
    return SplitScores([f"{index:05d}" for index in range(images)], labels, scores)


def fit(split: SplitScores, target: float = 0.9) -> Calibration:
    return fit_levels(split, calibrate(split, target), TAXONOMY)


def test_probabilities_sum_up_the_tree():
    probabilities = np.array([[0.3, 0.25, 0.0, 0.0, 0.05, 0.4], [0.0, 0.1, 0.3, 0.25, 0.35, 0.0], [0.1] * 5 + [0.5]])
    genus, family = (find_taxa(probabilities, TAXONOMY, level) for level in ("genus", "family"))
    assert genus.names.tolist() == ["A", "B", ""] and genus.confidences == pytest.approx([0.55, 0.55, 0.5])
    assert family.names.tolist() == ["AB", "AB", "C5"] and family.confidences == pytest.approx([0.55, 0.65, 0.6])
    assert genus.accept(0.5).tolist() == [True, True, False] and not genus.accept(None).any()
    alone = {level: [""] * 6 for level in TAXONOMY}
    assert find_taxa(probabilities, alone, "genus").confidences == pytest.approx(probabilities.max(axis=1))
    assert find_taxa(np.eye(6), {"genus": ["A"] * 6}, "genus").confidences == pytest.approx(np.ones(6))


@pytest.mark.parametrize("images", [1, 3, 40])
def test_a_family_of_all_classes_is_always_sure(images):
    """Its probability is 1 but for rounding, which must neither miss a threshold of 1 nor exceed 1."""
    taxonomy = {"genus": [""] * 7, "family": ["Rosaceae"] * 7}
    for seed in range(40):
        scores = log_softmax(np.random.default_rng(seed).normal(size=(100, 7)), axis=1)
        split = SplitScores([""] * 100, np.zeros(100, dtype=int), scores)
        val = SplitScores([""] * images, np.arange(images) % 7, scores[:images])
        calibration = fit_levels(val, calibrate(val, 0.9)._replace(threshold=None), taxonomy)
        assert calibration.levels["family"] <= 1 and measure_levels(split, calibration)["family"]["accepted"] == 100


def test_the_mean_confidence_of_what_a_level_answers_is_the_target():
    """So its threshold is below the target; of classes without a genus no confidence counts."""
    val, target = draw(3000, 0), 0.99
    calibration = fit(val, target)
    taxa = find_taxa(softmax(val.scores / calibration.temperature, axis=1), TAXONOMY, "genus")
    confidences = np.sort(taxa.confidences[~calibration.accept(val.scores) & (taxa.names != "")])[::-1]
    means = np.cumsum(confidences) / np.arange(1, len(confidences) + 1)
    last = np.flatnonzero(means >= target)[-1]
    assert calibration.levels["genus"] == confidences[last] < target - 0.05 and 50 < last < len(means) - 50


def test_the_taxa_of_images_that_are_not_sure_are_right_as_often_as_promised():
    """Classes of a genus are hardly separated, genera nearly always, so that most images get a genus and no class."""
    val, test = draw(3000, 0), draw(6000, 1)
    calibration = fit(val)
    found = measure_levels(test, calibration)
    assert found["rejected"] == (~calibration.accept(test.scores)).sum() > 3000
    assert found["share_correct"] > 0.8 and found["precision"] > 0.88
    assert found["precision_interval"][0] < found["precision"] < found["precision_interval"][1]
    assert found["share_interval"][0] < found["share_correct"] < found["share_interval"][1]
    assert found["accepted"] == found["genus"]["accepted"] + found["family"]["accepted"]
    assert found["correct"] == found["genus"]["correct"] + found["family"]["correct"] <= found["accepted"]
    assert (found["genus"]["taxa"], found["genus"]["classes"], found["family"]["taxa"]) == (3, 5, 2)
    on_val = measure_levels(val, calibration)
    assert on_val["genus"]["correct"] / on_val["genus"]["accepted"] >= 0.9


def test_counts_are_those_of_a_loop_over_the_images():
    val, test = draw(600, 2), draw(500, 3)
    calibration = fit(val)
    accepted = right = 0
    for scores, label in zip(test.scores, test.labels):
        shares = softmax(scores / calibration.temperature)
        if calibration.threshold is not None and shares.max() >= calibration.threshold:
            continue
        for level, threshold in calibration.levels.items():
            sums = {}
            for place, share in enumerate(shares):
                key = TAXONOMY[level][place] or place
                sums[key] = sums.get(key, 0) + share
            best = max(sums, key=sums.get)
            if isinstance(best, str) and threshold is not None and sums[best] >= threshold:
                accepted, right = accepted + 1, right + (best == TAXONOMY[level][label])
                break
    found = measure_levels(test, calibration)
    assert (found["accepted"], found["correct"]) == (accepted, right) and accepted > 100


def test_where_no_image_of_val_is_that_sure_the_target_is_the_threshold():
    val = draw(2000, 4)
    mixed = val._replace(labels=np.random.default_rng(5).integers(0, 6, 2000))
    nothing = fit(mixed, 0.99)
    assert set(nothing.levels.values()) == {0.99}
    found = measure_levels(mixed, nothing)
    assert (found["rejected"], found["accepted"]) == (2000, 0)
    assert (found["precision"], found["precision_interval"]) == (None, None)
    assert fit_levels(val, calibrate(val, 0.9), None).levels is None
    assert measure_levels(val, calibrate(val, 0.9)) is None
    certain = fit(val)._replace(threshold=0.0)
    assert measure_levels(val, certain)["share_correct"] is None


@pytest.mark.parametrize("images", [6, 20, 100])
def test_few_images_of_val_do_not_break_the_promise(images):
    """A threshold by what was right would: where the first of few are right, all below them are let through."""
    accepted = correct = 0
    for seed in range(30):
        found = measure_levels(draw(300, 100 + seed), fit(draw(images, seed), 0.95))
        accepted, correct = accepted + found["accepted"], correct + found["correct"]
    assert accepted > 300 and correct / accepted > 0.92


def test_pairs_have_thresholds_of_their_own():
    calibration = fit_pairs(draw(3000, 6), fit(draw(3000, 6)))
    pairs = calibration.of_images(2)
    assert pairs.taxonomy == TAXONOMY and pairs.levels["genus"] is not None and "taxonomy" not in calibration.pairs


def test_the_deepest_level_that_is_sure_is_the_answer():
    taxa = {"genus": Taxon("Rosa", 0.9, True), "family": Taxon("Rosaceae", 0.97, True)}
    unsure = {"genus": taxa["genus"]._replace(is_confident=False), "family": taxa["family"]}
    likeliest = [("dog rose", 0.5), ("tea rose", 0.4)]
    assert Prediction(likeliest, True, taxa=taxa).level == "name"
    assert Prediction(likeliest, False, taxa=taxa).level == "genus"
    assert Prediction(likeliest, False, taxa=unsure).level == "family"
    assert Prediction(likeliest, False).level is None
