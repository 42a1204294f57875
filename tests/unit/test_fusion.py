"""Several images of one plant, on synthetic scores whose right weight is known."""

import numpy as np
import pytest

from evaluation.calibration import Calibration, calibrate
from evaluation.fusion import explain_doubt, find_pairs, fit_pairs, measure_fusion
from evaluation.metrics import SplitScores, confidence, expected_calibration_error
from runtime.run_files import TOGETHER, validate

CLASSES, SIGNAL = 10, 1.5


def draw(images: int, seed: int, copies: bool = False, scale: float = 1.0) -> SplitScores:
    """Features around the mean of each class: `scale` 1 gives the exact log-likelihoods, so those of two images add up.

    With `copies` both images of a plant are the same, and their mean is right.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(0, CLASSES, images // 2), 2)
    features = rng.normal(size=(images, CLASSES)) + SIGNAL * np.eye(CLASSES)[labels]
    if copies:
        features[1::2] = features[::2]
    plants = [f"plant {index // 2}" for index in range(images)]
    return SplitScores([f"{index:05d}" for index in range(images)], labels, scale * SIGNAL * features, plants)


def fit(split: SplitScores) -> Calibration:
    return fit_pairs(split, calibrate(split, 0.9))


def test_pairs_share_a_plant_or_a_class_and_no_image_is_in_two():
    split = draw(200, 0)
    split = split._replace(plants=["" if index < 20 else plant for index, plant in enumerate(split.plants)])
    pairs = find_pairs(split, "observation")
    assert len(pairs) == 90 and pairs.min() >= 20
    assert all(split.plants[first] == split.plants[second] for first, second in pairs)
    by_class = find_pairs(split, "class")
    # Of each known plant one image, so that pairs are of different ones.
    assert (
        len(by_class) >= (90 + 20 - CLASSES) / 2
        and (split.labels[by_class[:, 0]] == split.labels[by_class[:, 1]]).all()
    )
    plants = [split.plants[index] for index in by_class.ravel() if split.plants[index]]
    assert len(plants) == len(set(plants)) > 60
    for found in (pairs, by_class):
        assert len(set(found.ravel().tolist())) == 2 * len(found)
    shuffled = SplitScores(*(np.array(each)[::-1] for each in split[:3]), split.plants[::-1])
    assert {frozenset(split.ids[n] for n in pair) for pair in by_class} == {
        frozenset(shuffled.ids[n] for n in pair) for pair in find_pairs(shuffled, "class")
    }


@pytest.mark.parametrize(("copies", "low", "high"), [(False, 0.85, 1.0), (True, 0.0, 0.1)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_weight_is_that_of_the_sum_or_of_the_mean(copies, low, high, scale):
    calibration = fit(draw(4000, 1, copies, scale))
    temperature = calibration.of_images(2).temperature
    assert low <= np.log2(calibration.temperature / temperature) <= high
    assert calibration.of_images(1) is calibration
    exponent = np.log2(calibration.temperature / temperature)
    assert calibration.of_images(4).temperature == pytest.approx(calibration.temperature / 4**exponent)


def test_a_second_image_gains_what_it_tells_and_is_calibrated_anew():
    val, test = draw(4000, 2), draw(4000, 3)
    calibration = fit(val)
    found = measure_fusion(test, calibration)
    for kind in ("class", "observation"):
        of_kind = found[kind]
        assert of_kind["gain"] == pytest.approx(of_kind["pair_top1"] - of_kind["single_top1"])
        low, high = of_kind["gain_interval"]
        assert 0.05 < low < of_kind["gain"] < high < low + 0.1
        assert of_kind["pair_interval"][0] < of_kind["pair_top1"] < of_kind["pair_interval"][1]
        assert of_kind["coverage"] > of_kind["single_coverage"] + 0.1 and of_kind["selective_accuracy"] > 0.87
    pairs = find_pairs(test, "observation")
    mean, labels = test.scores[pairs].mean(axis=1), test.labels[pairs[:, 0]]
    confidences = confidence(mean, calibration.of_images(2).temperature)
    assert expected_calibration_error(confidences, mean.argmax(axis=1) == labels) < 0.03
    unfitted = confidence(mean, calibration.temperature)
    assert expected_calibration_error(unfitted, mean.argmax(axis=1) == labels) > 0.1


def test_copies_gain_nothing():
    calibration = fit(draw(2000, 4, copies=True))
    of_plants = measure_fusion(draw(2000, 5, copies=True), calibration)["observation"]
    assert of_plants["gain"] == 0 and of_plants["gain_interval"] is None
    assert of_plants["coverage"] == pytest.approx(of_plants["single_coverage"], abs=0.05)


def test_what_two_pairs_tell_is_read_back():
    """Student's t knows no bounds: the interval of two gains is wider than any gain can be."""
    scores = np.log([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.1, 0.9]])
    found = measure_fusion(SplitScores(list("abcd"), np.array([0, 0, 1, 1]), scores), Calibration(1.0, 0.5, 0.9, 4))
    low, high = found["class"]["gain_interval"]
    assert low < -2 and high > 2 and validate(found, {str: TOGETHER}) == found


def test_few_pairs_or_none_are_said():
    val = draw(60, 6)
    one_each = SplitScores(val.ids[:3], np.arange(3), val.scores[:3], [""] * 3)
    calibration = fit(one_each)
    assert calibration.pairs is None and calibration.of_images(3) is calibration
    assert "val had no two images of one class" in explain_doubt(calibration)
    assert measure_fusion(one_each, calibration) == {}
    few = fit(SplitScores(val.ids[:10], val.labels[:10], val.scores[:10], val.plants[:10]))
    assert f"only {few.pairs['images']} pairs of val" in explain_doubt(few)
    assert explain_doubt(fit(draw(200, 7))) is None and explain_doubt(None) is None
    unknown = fit(draw(200, 7)._replace(plants=[""] * 200))
    assert unknown.pairs_share == "class" and "val does not say which images show one plant" in explain_doubt(unknown)
    assert "may be too high" in explain_doubt(unknown)


def test_pairs_of_observations_are_preferred_where_there_are_enough():
    split = draw(400, 8, copies=True)
    by_plant, by_class = fit(split), fit(split._replace(plants=[""] * 400))
    assert by_plant.of_images(2).temperature > 1.5 * by_class.of_images(2).temperature
    few = fit(split._replace(plants=[plant if index < 40 else "" for index, plant in enumerate(split.plants)]))
    assert fit_pairs(split, calibrate(split, 0.9, coverage=0.8)).pairs["conformal"]["target"] == 0.8
    assert few.of_images(2).temperature == pytest.approx(by_class.of_images(2).temperature, rel=0.1)
    assert (by_plant.pairs_share, by_class.pairs_share, few.pairs_share) == ("observation", "class", "class")
